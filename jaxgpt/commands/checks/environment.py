"""Checks of the machine: the versions of JAX and its plugins, the cluster, the devices."""

import contextlib
import glob
import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Iterable, Iterator

import jax

from jaxgpt.commands.checks.finding import (
  OK,
  PROBLEM,
  WARNING,
  Finding,
  tried,
  within,
)
from jaxgpt.config import installed
from jaxgpt.errors import first_line
from jaxgpt.parallel import cluster as cluster_lib
from jaxgpt.run.process import text_table

_BACKEND_SECONDS = 120  # a backend that waits for a lock or for other hosts waits forever
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record")
_PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
_LOCK = "/tmp/libtpu_lockfile"


def versions() -> Iterator[Finding]:
  """Lists the installed packages and checks that JAX and its plugins fit together."""
  have = {name: installed.version(name) for name in (*_PACKAGES, *_PLUGINS)}
  text = ", ".join(f"{name} {version}" for name, version in have.items() if version)
  yield Finding(
    OK,
    "versions",
    f"jaxgpt {installed.version('jaxgpt') or '(a checkout)'}, Python "
    f"{platform.python_version()}, {text}",
  )
  for name, wanted in jax_requirements().items():
    found = have.get(name)
    if found and not fits(found, wanted):
      yield Finding(
        PROBLEM,
        "versions",
        f"{name} {found} does not fit jax {have['jax']}, "
        f"which needs {name}{wanted}: pip install '{name}{wanted}'",
      )


def jax_requirements() -> dict[str, str]:
  """{package: versions that the installed JAX works with}, for jaxlib and the plugins."""
  out = {}
  for line in importlib.metadata.requires("jax") or ():
    match = re.match(r"([\w-]+)(?:\[[^]]*\])?\s*([<>=!~][^;]*)(;.*)?$", line)
    if match and "minimum-jaxlib" not in line and '"ci"' not in line:
      name, wanted, extra = match.groups()
      if name in _PLUGINS or (name == "jaxlib" and not extra):
        out[name] = wanted.strip()
  return out


def fits(version: str, wanted: str) -> bool:
  """Whether a version satisfies a requirement such as '<=0.10.2,>=0.10.0' or '==0.0.42.*'.

  Compares the leading numbers only, so a development version counts as its release.
  """

  def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[^\d.]", text)[0]))

  for part in wanted.split(","):
    match = re.match(r"\s*([<>=!~]+)\s*(.*?)\s*$", part)
    assert match, wanted
    sign, value = match.groups()
    have, want = numbers(version), numbers(value.removesuffix(".*"))
    if sign == "==" and have[: len(want)] != want:
      return False
    if (sign == ">=" and have < want) or (sign == "<=" and have[: len(want)] > want):
      return False
  return True


def cluster() -> Iterator[Finding]:
  """Says whether `jaxgpt train`, started like this command, would join other processes."""
  settings, finding = tried("processes", cluster_lib.find)
  if finding:
    yield finding
  elif settings is None:
    yield Finding(OK, "processes", "1: there are no launcher settings and no cluster")
  elif settings.coordinator:
    yield Finding(
      OK,
      "processes",
      f"this is process {settings.process_id} of "
      f"{settings.num_processes}, the coordinator is {settings.coordinator}; the checks below "
      "are of this process only",
    )
  else:
    yield Finding(
      OK,
      "processes",
      "the cluster (SLURM, Open MPI or Cloud TPU) tells JAX about the others; the checks below are "
      "of this process only",
    )


def devices() -> Iterator[Finding]:
  """Lists the devices that JAX uses, and accelerators of this machine that it does not use."""
  found, failure = _start_backend()
  chosen = os.environ.get("JAX_PLATFORMS")
  if failure:
    yield Finding(PROBLEM, "devices", failure)
  else:
    kinds = sorted({d.device_kind for d in found})
    memory = (found[0].memory_stats() or {}).get("bytes_limit")
    text = f"{len(found)} x {', '.join(kinds)} ({found[0].platform})"
    text += f", {text_table.size(memory)} each" if memory else ""
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
      else "its driver and JAX's CUDA plugin do not fit: run nvidia-smi, update the driver"
      if plugin
      else "JAX has no CUDA plugin: pip install 'jaxgpt[cuda]'"
    )
    yield Finding(WARNING, "devices", f"there is an NVIDIA GPU that would not be used; {why}")


def _unused_tpu(chosen: str | None) -> Iterator[Finding]:
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
      cure = f"process {holder[0]} ({holder[1]}) has them; end it, or wait for it"
    yield Finding(PROBLEM, "devices", f"there are TPU chips that JAX cannot use: {cure}")


def who_has(paths: Iterable[str]) -> tuple[int, str] | None:
  """(process id, program) of another process that has one of these files open, or None."""
  wanted = {os.path.realpath(path) for path in paths}
  for link in glob.glob("/proc/[0-9]*/fd/*"):
    pid = int(link.split("/")[2])
    with contextlib.suppress(OSError):  # it has ended, or is another user's
      if pid != os.getpid() and os.readlink(link) in wanted:
        return pid, pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
  return None


def _start_backend(
  seconds: float = _BACKEND_SECONDS,
) -> tuple[list[jax.Device], str | None]:
  """(JAX's devices, None), or ([], the reason why there are none)."""
  found, error = within(seconds, jax.devices)
  if isinstance(error, TimeoutError):
    return [], (
      f"JAX's backend does not start within {seconds} s: it waits for a lock ({_LOCK}), "
      "or for the other hosts of this TPU slice: run doctor on all of them at once"
    )
  if found is None:
    reason = first_line(error) if error else "?"
    return [], f"JAX finds no device: {reason}; see JAX_PLATFORMS, and the lines below"
  return found, None
