"""The machine as far as a run depends on it: JAX's parts, the cluster, the devices."""

import contextlib
import glob
import importlib.metadata
import os
import pathlib
import platform
import re
import threading
from typing import NamedTuple

import jax

from jaxgpt.config import installed
from jaxgpt.errors import UserError
from jaxgpt.parallel import cluster as cluster_lib

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_BACKEND_SECONDS = 120  # a backend that waits for a lock or for other hosts waits for ever
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record")
_PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
_LOCK = "/tmp/libtpu_lockfile"


class Finding(NamedTuple):
  """One thing that was looked at: ok, warning or problem; what it means and what to do."""

  status: str
  topic: str
  text: str


def tried(topic, function):
  """(what the function returns, None), or (None, the finding that it can't)."""
  try:
    return function(), None
  except UserError as e:
    return None, Finding(PROBLEM, topic, str(e))


def size_text(num_bytes):
  """Bytes for people: '3.2 GB'."""
  for unit, size in (("GB", 1e9), ("MB", 1e6)):
    if num_bytes >= size:
      return f"{num_bytes / size:.1f} {unit}"
  return f"{num_bytes / 1e3:.0f} kB"


def versions():
  """The installed packages, and whether JAX's parts fit together."""
  have = {name: installed.version(name) for name in (*_PACKAGES, *_PLUGINS)}
  text = ", ".join(f"{name} {version}" for name, version in have.items() if version)
  yield Finding(
    OK,
    "versions",
    f"jaxgpt {installed.version('jaxgpt') or '(a checkout)'}, Python "
    f"{platform.python_version()}, {text}",
  )
  for name, wanted in jax_requirements().items():
    if have.get(name) and not fits(have[name], wanted):
      yield Finding(
        PROBLEM,
        "versions",
        f"{name} {have[name]} does not fit jax {have['jax']}, "
        f"which needs {name}{wanted}: pip install '{name}{wanted}'",
      )


def jax_requirements():
  """{package: versions that the installed JAX works with}, of jaxlib and the plugins."""
  out = {}
  for line in importlib.metadata.requires("jax") or ():
    match = re.match(r"([\w-]+)(?:\[[^]]*\])?\s*([<>=!~][^;]*)(;.*)?$", line)
    if match and "minimum-jaxlib" not in line and '"ci"' not in line:
      name, wanted, extra = match.groups()
      if name in _PLUGINS or (name == "jaxlib" and not extra):
        out[name] = wanted.strip()
  return out


def fits(version, wanted):
  """Whether a version satisfies '<=0.10.2,>=0.10.0' or '==0.0.42.*'; of numbers and dots alone."""

  def numbers(text):
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[^\d.]", text)[0]))

  for part in wanted.split(","):
    sign, value = re.match(r"\s*([<>=!~]+)\s*(.*?)\s*$", part).groups()
    have, want = numbers(version), numbers(value.removesuffix(".*"))
    if sign == "==" and have[: len(want)] != want:
      return False
    if (sign == ">=" and have < want) or (sign == "<=" and have[: len(want)] > want):
      return False
  return True


def cluster():
  """Whether `jaxgpt train` would join other processes when it is started like this command."""
  settings, finding = tried("processes", cluster_lib.find)
  if finding:
    yield finding
  elif settings is None:
    yield Finding(OK, "processes", "one: nothing says that there are others")
  elif settings.coordinator:
    yield Finding(
      OK,
      "processes",
      f"this is process {settings.process_id} of "
      f"{settings.num_processes}, the coordinator {settings.coordinator}; what follows "
      "is looked at in this process alone",
    )
  else:
    yield Finding(
      OK,
      "processes",
      "JAX will be told by the cluster (SLURM, Open MPI or Cloud TPU) "
      "who the others are; what follows is looked at in this process alone",
    )


def devices():
  """What JAX runs on, and accelerators that are there but would not be used."""
  found, failure = _start_backend()
  chosen = os.environ.get("JAX_PLATFORMS")
  if failure:
    yield Finding(PROBLEM, "devices", failure)
  else:
    kinds = sorted({d.device_kind for d in found})
    memory = (found[0].memory_stats() or {}).get("bytes_limit")
    text = f"{len(found)} x {', '.join(kinds)} ({found[0].platform})"
    text += f", {size_text(memory)} each" if memory else ""
    text += f"; JAX_PLATFORMS={chosen} chose them" if chosen else ""
    yield Finding(OK, "devices", text)
  platforms = {d.platform for d in found}
  if cluster_lib.has_tpu_chips() and "tpu" not in platforms:
    yield from _unused_tpu(chosen)
  elif installed.version("libtpu") and not cluster_lib.has_tpu_chips() and chosen != "cpu":
    yield Finding(
      WARNING,
      "devices",
      "libtpu is installed, but this machine has no TPU chip: JAX "
      "looks for one at each start; set JAX_PLATFORMS=cpu",
    )
  if glob.glob("/dev/nvidia[0-9]*") and not platforms & {"cuda", "gpu"}:
    plugin = installed.version("jax-cuda13-plugin") or installed.version("jax-cuda12-plugin")
    why = (
      "JAX_PLATFORMS leaves it out: unset it"
      if plugin and chosen and "cuda" not in chosen
      else "its driver and JAX's CUDA plugin don't fit: run nvidia-smi, update the driver"
      if plugin
      else "JAX has no CUDA plugin: pip install 'jaxgpt[cuda]'"
    )
    yield Finding(WARNING, "devices", f"there is an NVIDIA GPU that would not be used; {why}")


def _unused_tpu(chosen):
  if not installed.version("libtpu"):
    yield Finding(
      WARNING, "devices", "there are TPU chips that would not be used: pip install 'jaxgpt[tpu]'"
    )
  elif chosen and "tpu" not in chosen:
    yield Finding(
      WARNING,
      "devices",
      f"there are TPU chips that JAX_PLATFORMS={chosen} leaves out: unset it to use them",
    )
  else:
    holder = who_has([_LOCK, *glob.glob("/dev/accel[0-9]*"), *glob.glob("/dev/vfio/[0-9]*")])
    cure = f"if no other process runs on them, delete {_LOCK} and try again"
    if holder:
      cure = f"process {holder[0]} ({holder[1]}) has them; end it, or wait until it is done"
    yield Finding(PROBLEM, "devices", f"there are TPU chips that JAX can't use: {cure}")


def who_has(paths):
  """(process id, its program) of another process that has one of these files open, or None."""
  wanted = {os.path.realpath(path) for path in paths}
  for link in glob.glob("/proc/[0-9]*/fd/*"):
    pid = int(link.split("/")[2])
    with contextlib.suppress(OSError):  # it has ended, or is another user's
      if pid != os.getpid() and os.readlink(link) in wanted:
        return pid, pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
  return None


def _start_backend(seconds=_BACKEND_SECONDS):
  """(JAX's devices, None), or ([], why there are none)."""
  found, error = within(seconds, jax.devices)
  if isinstance(error, TimeoutError):
    return [], (
      f"JAX's backend does not start within {seconds} s: it waits for a lock ({_LOCK}), "
      "or for the other hosts of this TPU slice: run doctor on all of them at once"
    )
  if error:
    return [], (
      f"JAX finds no device: {(str(error).splitlines() or ['?'])[0]}; see JAX_PLATFORMS, "
      "and the lines below"
    )
  return found, None


def within(seconds, function):
  """(what the function returns, None), or (None, what it raised, or a TimeoutError)."""
  result = []

  def call():
    try:
      result.append((function(), None))
    except Exception as e:  # it is told to the caller, whatever it is
      result.append((None, e))

  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(seconds)
  return result[0] if result else (None, TimeoutError(f"no answer within {seconds} s"))
