"""XLA's flags for tests: most of a test's time is compilation, so its slow parts are off."""

import importlib.metadata
import os

_VERSION = tuple(int(n) for n in importlib.metadata.version("jaxlib").split(".")[:2])

# With these flags tests/golden was made, and is compared to the bit: `make test-golden`.
_GOLDEN = ["--xla_llvm_disable_expensive_passes=true", "--xla_backend_optimization_level=0"]

# The fusion emitters take half of the time of a compilation. JAX 0.12 has no flag for them, and
# the suite on the newest Python tests programs that they made.
_WITHOUT_EMITTERS = [
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
  "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
]

# What jaxlib 0.10.2 chooses by itself. Golden files were made with it, and without this word
# `mesh.prepare_cpu` would choose otherwise.
_SUMS_OF_JAXLIB = "--xla_cpu_experimental_ynn_fusion_type=+reduce"


def _chosen() -> list[str]:
  if os.environ.get("JAXGPT_TEST_GOLDEN"):
    return [*_GOLDEN, _SUMS_OF_JAXLIB] if _VERSION < (0, 12) else _GOLDEN
  return _GOLDEN + _WITHOUT_EMITTERS if _VERSION < (0, 11) else _GOLDEN


COMPILE_QUICKLY = " ".join(_chosen())
EIGHT_DEVICES = (
  "--xla_force_host_platform_device_count=8 "
  # A busy machine may keep some of the eight waiting for long.
  "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + COMPILE_QUICKLY
)
