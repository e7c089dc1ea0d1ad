"""Compiled train steps in files, so that a start does not wait for the compiler.

A file has a line of JSON with the program's identity, then JAX's serialized executable. Loading it
unpickles the executable: trust such a file as you trust code.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import ml_collections
from etils import epath
from jax.experimental import serialize_executable

from jaxgpt.config import installed
from jaxgpt.errors import UserError, first_line
from jaxgpt.parallel import distributed
from jaxgpt.storage import atomic
from jaxgpt.training import xla_options

# {fact: its value}, such as {'the mesh': 'data=2 fsdp=4'}. The keys are stored in the files.
Identity: TypeAlias = dict[str, str]

_FORMAT = "jaxgpt compiled step 1"
_COMPILERS = ("jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")
# Source locations of Pallas kernels, which do not change the program.
_LOCATIONS = re.compile(r"\\22debug_locations\\22: \\22[^\\]*\\22")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def identity(
  lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh, options: Iterable[str] = ()
) -> Identity:
  """Everything that a compiled step depends on. Equal identities mean equal programs.

  Args:
    lowered: From `train_step.lower`.
    mesh: The device mesh.
    options: XLA options "name=value", which override those of the chip.
  """
  devices = list(mesh.devices.flat)
  places = [(d.id, getattr(d, "coords", None), getattr(d, "core_on_chip", None)) for d in devices]
  compilers = {name: installed.version(name) for name in _COMPILERS}
  flags = xla_options.options(devices[0].device_kind, options)
  out = {
    "the program": _digest(_LOCATIONS.sub("", lowered.as_text())),
    "the devices": f"{len(devices)} x {devices[0].device_kind}",
    "the mesh": " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1),
    "the order of the devices": _digest(json.dumps(places)),
    "jax": jax.__version__,
    "the compiler": " ".join(
      f"{name} {v}"
      for name, v in compilers.items()
      if v and (name == "jaxlib" or _is_of(name, devices[0].platform))
    ),
    "the compiler's options": " ".join(f"{name}={v}" for name, v in sorted(flags.items())),
  }
  out |= {f"the variable {name}": os.environ.get(name, "") for name in _FLAGS}
  if devices[0].platform == "cpu":
    out["the processor"] = _processor()
  return out


def _is_of(package: str, platform_name: str) -> bool:
  """Whether a compiler's package compiles for a platform: 'cpu', 'tpu', 'gpu' or 'cuda'."""
  return platform_name != "cpu" and (package == "libtpu") == (platform_name == "tpu")


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _processor() -> str:
  """A digest of the processor's model and features, which XLA compiles for."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
      lines = [line for line in f if line.startswith(("model name", "flags", "Features"))]
  except OSError:
    lines = []
  return f"{platform.machine()} {_digest(''.join(sorted(set(lines))))}"


def save(path: epath.PathLike, compiled: jax.stages.Compiled, made_from: Identity) -> int:
  """Writes a compiled step.

  Args:
    path: A local file, or one in a bucket.
    compiled: The program, for devices of this host or for a topology.
    made_from: Its `identity`.

  Returns:
    The file's size in bytes.

  Raises:
    UserError: The file cannot be written, or JAX cannot serialize this program.
  """
  try:
    payload = serialize_executable.serialize(compiled)[0]
  except Exception as e:  # errors of pickle, JAX and its runtime share no base class
    raise UserError(
      f"this program cannot be saved: {type(e).__name__}: {first_line(e)}; set "
      "JAX_COMPILATION_CACHE_DIR instead, and the first start fills it"
    ) from e
  head = {"format": _FORMAT, "made_from": made_from, "sha256": hashlib.sha256(payload).hexdigest()}
  whole = json.dumps(head).encode() + b"\n" + payload
  path = epath.Path(path)
  try:
    atomic.write(path, whole)
  except OSError as e:
    raise UserError(f"{path} cannot be written: {e.strerror or e}") from e
  return len(whole)


def load(
  path: epath.PathLike,
  lowered: jax.stages.Lowered,
  mesh: jax.sharding.Mesh,
  options: Iterable[str] = (),
) -> tuple[Any, str | None]:
  """Loads a compiled step if it is the program that compiling would give.

  Args:
    path: A file that `save` wrote.
    lowered: From `train_step.lower`.
    mesh: The device mesh.
    options: XLA options, as in `identity`.

  Returns:
    (compiled function, None), or (None, the reason why it cannot be used).

  Raises:
    UserError: There is no such file, or it is not a compiled step.
  """
  try:
    first, _, payload = epath.Path(path).read_bytes().partition(b"\n")
  except OSError as e:
    raise UserError(
      f"mesh.compiled_step={path!r} cannot be read ({e.strerror or e}); write it with "
      "`jaxgpt plan --save`, or leave the key empty"
    ) from e
  try:
    head = json.loads(first)
    made_from, digest = head["made_from"], head["sha256"]
  except (ValueError, KeyError, TypeError):
    head = {}
  if head.get("format") != _FORMAT:
    raise UserError(
      f"mesh.compiled_step={path!r} is not a compiled step of this version of jaxgpt; "
      "write it with `jaxgpt plan --save`, or leave the key empty"
    )
  if hashlib.sha256(payload).hexdigest() != digest:
    return None, "the file is damaged"
  wrong = differences(made_from, identity(lowered, mesh, options))
  if wrong:
    return None, "; ".join(wrong)
  devices = list(mesh.devices.flat)
  in_tree = jax.tree.structure(lowered.args_info)
  try:
    return serialize_executable.deserialize_and_load(
      payload, in_tree, lowered.out_tree, backend=devices[0].client, execution_devices=devices
    ), None
  except Exception as e:  # errors of JAX's runtime and of unpickling share no base class
    return None, f"{type(e).__name__}: {first_line(e)}"


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
  """The differences between two identities, in words."""
  return [
    f"{fact} was {old.get(fact) or 'none'}, and is {new.get(fact) or 'none'}"
    for fact in {**new, **old}
    if old.get(fact, "") != new.get(fact, "")
  ]


def of_config(
  c: ml_collections.ConfigDict, lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh
) -> Any:
  """The step in the file `mesh.compiled_step`, or None if it is another program or not set.

  Prints in the first process whether it is used. All processes must call this.

  Args:
    c: A resolved config.
    lowered: From `train_step.lower`.
    mesh: The device mesh.

  Raises:
    UserError: The file is not a compiled step, or the processes disagree.
  """
  path = c.mesh.compiled_step
  if not path:
    return None
  compiled, why = load(path, lowered, mesh, c.mesh.compiler_options)
  distributed.check_same(
    f"the use of mesh.compiled_step={path!r}",
    why or "it is used",
    "give all hosts the same file, versions and flags",
  )
  if distributed.is_first():
    used = "matches this step: nothing is compiled"
    if why:
      used = f"does not match this step; compiling it instead: {why}"
    print(f"mesh.compiled_step={path!r} {used}", flush=True)
  return compiled
