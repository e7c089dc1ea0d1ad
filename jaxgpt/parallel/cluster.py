"""Cluster detection: whether this process is one of several, and which machines belong to the run.

The answer comes from command-line flags, from the environment variables of JAX if all three are
set, or from a cluster that JAX knows (SLURM, Open MPI, Cloud TPU, TPUs on GKE), in this order.
"""

import ipaddress
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from jaxgpt.errors import UserError

_ENV = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_ESTABLISHED = "01"  # connection state in /proc/net/tcp


class Settings(NamedTuple):
  """How a process joins the others. All None if JAX detects the cluster on its own.

  Attributes:
    coordinator: HOST:PORT at which process 0 listens.
    num_processes: Number of processes.
    process_id: Number of this process.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


_FLAGS = tuple(f"--{name.replace('_', '-')}" for name in Settings._fields)


def find(
  coordinator: str | None = None,
  num_processes: str | int | None = None,
  process_id: str | int | None = None,
  env: Mapping[str, str] = os.environ,
  on_tpu: bool | None = None,
) -> Settings | None:
  """Finds out how this process joins others.

  Args:
    coordinator: HOST:PORT at which process 0 listens, from the command line.
    num_processes: Number of processes, from the command line.
    process_id: Number of this process, from the command line.
    env: Environment variables.
    on_tpu: Whether this machine has TPU chips. None: look for their device files.

  Returns:
    Settings, or None if this process is alone.

  Raises:
    UserError: Some settings are missing or out of range.
  """
  given = (coordinator, num_processes, process_id)
  from_env = tuple(env.get(name) for name in _ENV)
  values = tuple(from_env[i] if v is None else v for i, v in enumerate(given))
  # JAX also reads the address alone, and asks the cluster for the rest.
  explicit = any(v is not None for v in given) or None not in from_env
  if not explicit and _is_cluster(env, on_tpu):
    return Settings()
  if all(v is None for v in values):
    return None
  missing = [f"{flag} (or {name})" for flag, name, v in zip(_FLAGS, _ENV, values) if v is None]
  if missing:
    there = ", ".join(f"{flag}={v}" for flag, v in zip(_FLAGS, values) if v is not None)
    raise UserError(
      f"{there}: {' and '.join(missing)} is missing; several processes need all three"
    )
  return _checked(*map(str, values))


def _checked(coordinator: str, num_processes: str, process_id: str) -> Settings | None:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise UserError(
      f"--coordinator={coordinator} must be HOST:PORT, a host name or address that "
      "all processes can reach and a free port on it"
    )
  try:
    count, index = int(num_processes), int(process_id)
  except ValueError as e:
    raise UserError(
      f"--num-processes={num_processes} and --process-id={process_id} must be integers"
    ) from e
  if not 0 <= index < count:
    raise UserError(f"--process-id={index} must lie in [0, --num-processes={count})")
  return Settings(coordinator, count, index) if count > 1 else None


def _is_cluster(env: Mapping[str, str], on_tpu: bool | None) -> bool:
  """Whether JAX can detect the processes on its own: SLURM, Open MPI, Cloud TPU, TPUs on GKE."""
  # In a batch script outside of srun there are tasks, but no step.
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


def hosts(
  env: Mapping[str, str] = os.environ, run: Callable[..., Any] = subprocess.run
) -> tuple[str, ...]:
  """Host names of the cluster's machines if the environment lists them, otherwise ().

  Args:
    env: Environment variables.
    run: Runs SLURM's `scontrol`, which expands lists such as node[01-04,07].
  """
  if nodes := env.get("SLURM_STEP_NODELIST"):
    try:
      found = run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=10
      )
    except (OSError, subprocess.SubprocessError):
      return ()
    return tuple(found.stdout.split())
  return tuple(filter(None, env.get("TPU_WORKER_HOSTNAMES", "").split(",")))


def connected(
  port: int, tables: Iterable[str | os.PathLike[str]] = ("/proc/net/tcp", "/proc/net/tcp6")
) -> set[str]:
  """Addresses with an open TCP connection to a port of this machine.

  Args:
    port: A port on which a process of this machine listens.
    tables: Linux's tables of connections.
  """
  found = set()
  for table in map(pathlib.Path, tables):
    for line in table.read_text().splitlines()[1:] if table.exists() else ():
      _, mine, theirs, state, *_ = line.split()
      if state == _ESTABLISHED and int(mine.rpartition(":")[2], 16) == port:
        found.add(_address(theirs.rpartition(":")[0]))
  return found


def _address(text: str) -> str:
  """Decodes an address of Linux's table, a hex number of 32-bit words in native byte order."""
  words = [int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8)]
  address = ipaddress.ip_address(b"".join(words))
  return str(getattr(address, "ipv4_mapped", None) or address)


def absent(port: int, names: Iterable[str]) -> list[str]:
  """Machines without a connection to a port of this one.

  Args:
    port: A port of this machine.
    names: Host names. This machine's own name is skipped.

  Returns:
    The names without a connection, including those that cannot be resolved.
  """
  there, me = connected(port), socket.gethostname()
  out = []
  for name in names:
    if name.partition(".")[0] == me.partition(".")[0]:
      continue
    try:
      addresses = {info[4][0] for info in socket.getaddrinfo(name, None)}
    except OSError:
      addresses = set()
    if not addresses & there:
      out.append(name)
  return out


def has_tpu_chips() -> bool:
  """Whether this machine has device files of TPU chips."""
  dev = pathlib.Path("/dev")
  return any(dev.glob("accel[0-9]*")) or any((dev / "vfio").glob("[0-9]*"))
