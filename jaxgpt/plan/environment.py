"""Environment variables that libtpu reads while it is loaded."""

import os

# By default libtpu looks for TPUs of this machine and queries the cloud's metadata server. These
# values make it a compiler only. Variables that are already set keep their values.
_VARIABLES = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "JAX_PLATFORMS": "cpu",
}


def prepare() -> None:
  """Tells libtpu that there are no TPUs to look for. Call it before JAX is imported."""
  for key, value in _VARIABLES.items():
    os.environ.setdefault(key, value)
