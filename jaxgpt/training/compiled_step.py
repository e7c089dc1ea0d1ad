"""A compiled train step as a file, so that a start need not wait for the compiler.

A file is a line of JSON, which says what the program was made from, and JAX's serialized executable.
Loading one unpickles it: trust such a file as you trust code.
"""

import hashlib
import json
import os
import platform
import re

import jax
from etils import epath
from jax.experimental import serialize_executable

from jaxgpt.config import installed
from jaxgpt.errors import UserError
from jaxgpt.storage import atomic
from jaxgpt.training import xla_options

_FORMAT = "jaxgpt compiled step 1"
_COMPILERS = ("jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")
# Places in the source of Pallas kernels, which the program does not depend on.
_LOCATIONS = re.compile(r"\\22debug_locations\\22: \\22[^\\]*\\22")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def identity(lowered, mesh, options=()):
  """What a compiled step depends on: {what: text}.

  Args:
    lowered: from `train_step.lower`.
    mesh: the device mesh.
    options: of XLA, each "name=value", beside and before those of `compiler.DEFAULTS`.
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


def _is_of(package, platform_name):
  """Whether a compiler's package makes programs for a platform: 'cpu', 'tpu', 'gpu' or 'cuda'."""
  return platform_name != "cpu" and (package == "libtpu") == (platform_name == "tpu")


def _digest(text):
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _processor():
  """What tells processors apart for which XLA makes other code."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
      lines = [line for line in f if line.startswith(("model name", "flags", "Features"))]
  except OSError:
    lines = []
  return f"{platform.machine()} {_digest(''.join(sorted(set(lines))))}"


def save(path, compiled, made_from):
  """Writes a compiled step.

  Args:
    path: a file, also in a bucket.
    compiled: from JAX, of devices that are there or only compile.
    made_from: its `identity`.

  Returns:
    The file's size in bytes.

  Raises:
    UserError: it cannot be written, or JAX cannot serialize this program.
  """
  try:
    payload = serialize_executable.serialize(compiled)[0]
  except Exception as e:  # pickle, JAX and its runtime share no class
    raise UserError(
      f"this program cannot be saved: {type(e).__name__}: "
      f"{(str(e).splitlines() or ['?'])[0]}; set JAX_COMPILATION_CACHE_DIR instead, and "
      "the first start fills it"
    ) from e
  head = {"format": _FORMAT, "made_from": made_from, "sha256": hashlib.sha256(payload).hexdigest()}
  whole = json.dumps(head).encode() + b"\n" + payload
  path = epath.Path(path)
  try:
    atomic.write(path, whole)
  except OSError as e:
    raise UserError(f"{path} cannot be written: {e.strerror or e}") from e
  return len(whole)


def load(path, lowered, mesh, options=()):
  """A compiled step from a file, where it is the very program that compiling would give.

  Args:
    path: what `save` wrote.
    lowered, mesh, options: as in `identity`.

  Returns:
    (the compiled function, None), or (None, why it cannot be used).

  Raises:
    UserError: there is no such file, or it is something else.
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
      f"mesh.compiled_step={path!r} is no compiled step of this version of jaxgpt; "
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
  except Exception as e:  # of JAX's runtime, or of what was pickled
    return None, f"{type(e).__name__}: {(str(e).splitlines() or ['?'])[0]}"


def differences(old, new):
  """What differs between two identities, in words."""
  return [
    f"{what} was {old.get(what) or 'none'}, and is {new.get(what) or 'none'}"
    for what in (new | old)
    if old.get(what, "") != new.get(what, "")
  ]
