"""Whether this process is one of several, from flags, the environment or a known cluster."""

import os
import pathlib
from importlib.util import find_spec
from typing import NamedTuple

from jaxgpt.errors import UserError

_ENV = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_FLAGS = ("--coordinator", "--num-processes", "--process-id")


class Settings(NamedTuple):
  """Where the processes meet; all None where JAX finds that out by itself."""
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def find(coordinator=None, num_processes=None, process_id=None, env=os.environ, on_tpu=None):
  """How this process is to join others, from flags, the environment or a known cluster.

  Args:
    coordinator: HOST:PORT at which process 0 listens.
    num_processes, process_id: how many there are, and which this is.
    env: environment variables.
    on_tpu: whether this machine has TPU chips; None: looks.

  Returns:
    Settings, or None where this process is alone.

  Raises:
    UserError: only some of them are given, or they are out of range.
  """
  given = (coordinator, num_processes, process_id)
  from_env = tuple(env.get(name) for name in _ENV)
  values = tuple(from_env[i] if v is None else v for i, v in enumerate(given))
  if not any(v is not None for v in given) and _is_cluster(env, on_tpu):
    return Settings()
  if all(v is None for v in values):
    return None
  missing = [f"{flag} (or {name})" for flag, name, v in zip(_FLAGS, _ENV, values) if v is None]
  if missing:
    there = ", ".join(f"{flag}={v}" for flag, v in zip(_FLAGS, values) if v is not None)
    raise UserError(f"{there}: {' and '.join(missing)} is missing; several processes need all three")
  return _checked(*values)


def _checked(coordinator, num_processes, process_id):
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise UserError(f"--coordinator={coordinator} must be HOST:PORT, a host name or address that "
                    "all processes can reach and a free port on it")
  try:
    count, index = int(num_processes), int(process_id)
  except ValueError as e:
    raise UserError(f"--num-processes={num_processes} and --process-id={process_id} must be "
                    "integers") from e
  if not 0 <= index < count:
    raise UserError(f"--process-id={index} must lie in [0, --num-processes={count})")
  return Settings(coordinator, count, index) if count > 1 else None


def _is_cluster(env, on_tpu):
  """Whether JAX knows by itself who the others are: SLURM, Open MPI, Cloud TPU, TPUs on GKE."""
  if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in env:
    return True
  if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
    return True
  if env.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
    return False
  if on_tpu is None:
    on_tpu = bool(find_spec("libtpu")) and has_tpu_chips()
  hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
  alone = "TPU_SKIP_MDS_QUERY" in env and "," not in hosts
  return on_tpu and not alone


def has_tpu_chips():
  """Whether this machine has device files of TPU chips."""
  dev = pathlib.Path("/dev")
  return any(dev.glob("accel[0-9]*")) or any((dev / "vfio").glob("[0-9]*"))
