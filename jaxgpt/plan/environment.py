"""What libtpu reads from the environment while it is loaded."""

import os

# It looks for the machine's own TPUs and asks the cloud about them, unless told not to.
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


def prepare():
  """Tells libtpu, before JAX is imported, that there are no TPUs to look for."""
  for key, value in _VARIABLES.items():
    os.environ.setdefault(key, value)
