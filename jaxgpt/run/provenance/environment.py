"""The environment of a run: code, installed versions, hardware, flags. Recorded at each start.

  RUN/environments/DIGEST.json   an environment. Starts in the same one share a file
  RUN/environments/DIGEST.diff   changes to tracked files of the checkout that had no commit yet

A line of starts.jsonl names the DIGEST.
"""

import functools
import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.storage import atomic, strict_json

FOLDER = "environments"
_PACKAGE = pathlib.Path(__file__).parents[2]
# Variables that change compiled programs, devices or numbers.
_PREFIXES = ("XLA_", "JAX_", "LIBTPU_", "TPU_", "NVIDIA_TF32", "CUDA_VISIBLE", "NCCL_", "TF_CUDNN")
_NAMES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED")
_PLACES = ("JAX_COMPILATION_CACHE_DIR", "JAX_COORDINATOR")  # differ without an effect
_SETTINGS = (  # of JAX that change numbers
  "jax_enable_x64",
  "jax_default_matmul_precision",
  "jax_default_prng_impl",
  "jax_threefry_partitionable",
  "jax_numpy_dtype_promotion",
  "jax_numpy_rank_promotion",
  "jax_disable_jit",
  "jax_debug_nans",
)
_TOPICS = ("code", "versions", "hardware", "flags")
_COMPUTING = ("python", "jax", "jaxlib", "numpy", "ml-dtypes", "flax", "optax", "libtpu", "grain")
_LONGEST_DIFF = 10 << 20  # bytes

Git = Mapping[str, Any]


class Environment(NamedTuple):
  """The environment of a start.

  Attributes:
    facts: {topic: {name: value}}, plain JSON. The topics are code, versions, hardware and flags.
    diff: Changes of tracked files that have no commit, as `git diff` prints them.
  """

  facts: dict[str, dict[str, Any]]
  diff: str = ""

  @property
  def digest(self) -> str:
    """A short digest of it all."""
    text = strict_json.dumps([self.facts, self.diff], sort_keys=True)
    return _short_digest(text.encode())


class Difference(NamedTuple):
  """A fact that differs between two environments. None: it is not there."""

  topic: str
  name: str
  first: Any
  second: Any

  def describe(self) -> str:
    """Such as 'versions: jax was 0.12.0, is 0.12.1'."""
    if self.topic == "code" and "/" in self.name:
      change = (
        "was added" if self.first is None else "is gone" if self.second is None else "differs"
      )
      return f"code: {self.name} {change}"
    show = lambda value: "not there" if value is None else value
    return f"{self.topic}: {self.name} was {show(self.first)}, is {show(self.second)}"


def collect(mesh: jax.sharding.Mesh, git: Git | None = None) -> Environment:
  """The environment of this process.

  Args:
    mesh: The device mesh.
    git: The commit of the checkout, see `git`, or None outside of one.
  """
  device = mesh.devices.flat[0]
  diff = _diff() if git and git["dirty"] else ""
  code = {"package": "jaxgpt", **_sources()}
  if git:
    code["commit"] = git["commit"]
  hardware = {
    "device": device.device_kind,
    "platform": device.platform,
    "devices": mesh.size,
    "processes": jax.process_count(),
    "mesh": " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "1",
    "machine": platform.machine(),
    "cpu": _cpu(),
    "cores": os.cpu_count(),
    "system": platform.system(),
  }
  if version := getattr(device.client, "platform_version", None):
    hardware["driver"] = " ".join(str(version).split())
  facts = {
    "code": code,
    "versions": {"python": platform.python_version(), **_versions()},
    "hardware": hardware,
    "flags": _flags(),
  }
  return Environment(facts, diff)


@functools.cache
def git() -> dict[str, Any] | None:
  """{'commit', 'dirty'} of the checkout that this package runs from, or None outside of one.

  A process asks once: it runs the code that it imported, whatever becomes of the files.
  """
  try:
    if _git("ls-files", "--error-unmatch", __file__):
      return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
  except (OSError, subprocess.SubprocessError):
    pass  # no git, no checkout, or an installed package inside another project's checkout
  return None


def _git(*args: str) -> str:
  return subprocess.run(
    ["git", "-C", str(_PACKAGE), *args], capture_output=True, text=True, check=True, timeout=10
  ).stdout.strip()


@functools.cache
def _diff() -> str:
  try:
    text = _git("diff", "HEAD", "--", ":/")
  except (OSError, ValueError, subprocess.SubprocessError):
    return ""
  return text if len(text) <= _LONGEST_DIFF else f"{text[:_LONGEST_DIFF]}\n(cut)"


@functools.cache
def _sources() -> dict[str, str]:
  """{file: short SHA-256} of the Python files of this package, whether it is a checkout or not."""
  return {
    f"jaxgpt/{path.relative_to(_PACKAGE).as_posix()}": _short_digest(path.read_bytes())
    for path in sorted(_PACKAGE.rglob("*.py"))
  }


@functools.cache
def _versions() -> dict[str, str]:
  """{distribution: version} of everything that is installed, by the names of its folders.

  Reading the metadata of each distribution would take a start half a second.
  """
  found: dict[str, str] = {}
  for place in map(pathlib.Path, sys.path):
    for path in sorted(place.glob("*.dist-info")) if place.is_dir() else ():
      name, _, version = path.name.removesuffix(".dist-info").partition("-")
      found.setdefault(name.lower().replace("_", "-"), version)
  return dict(sorted(found.items()))


def _short_digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]


def _cpu() -> str:
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  except OSError:
    pass
  return platform.processor() or "unknown"


def _flags() -> dict[str, Any]:
  found: dict[str, Any] = {
    name: value
    for name, value in sorted(os.environ.items())
    if name.startswith(_PREFIXES + _NAMES) and not name.startswith(_PLACES)
  }
  for name in _SETTINGS:
    value = getattr(jax.config, name, None)
    value = getattr(value, "value", value)  # of an enumeration
    found[name] = value if isinstance(value, bool | int | str) or value is None else str(value)
  return found


def record(folder: epath.PathLike, environment: Environment) -> str:
  """Writes an environment into a run folder, unless it is there. Returns its digest."""
  where = epath.Path(folder) / FOLDER
  path = where / f"{environment.digest}.json"
  if not path.exists():
    where.mkdir(parents=True, exist_ok=True)
    if environment.diff:
      atomic.write(where / f"{environment.digest}.diff", environment.diff + "\n")
    atomic.write(path, strict_json.dumps(environment.facts, indent=1) + "\n")
  return environment.digest


def read(folder: epath.PathLike, start: Mapping[str, Any]) -> Environment:
  """The environment of a start of a run.

  Args:
    folder: The run folder.
    start: A line of starts.jsonl. Those of earlier versions have less.

  Raises:
    UserError: The file that it names is missing or broken.
  """
  digest = start.get("environment")
  if digest is None:
    return Environment(_of_old_start(start))
  path = epath.Path(folder) / FOLDER / f"{digest}.json"
  try:
    facts = json.loads(path.read_text(encoding="utf-8"))
    diff = path.with_suffix(".diff")
    found = Environment(facts, diff.read_text().removesuffix("\n") if diff.exists() else "")
  except (OSError, ValueError) as e:
    raise UserError(f"{path} can't be read ({e}); restore it from a copy") from e
  return found


def _of_old_start(start: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  mesh = start.get("mesh") or {}
  text = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "1"
  versions = {k: v for k, v in (start.get("packages") or {}).items() if v is not None}
  return {
    "code": dict(start.get("git") or {}),
    "versions": {"python": start.get("python"), **versions},
    "hardware": {
      "device": start.get("device_kind"),
      "platform": start.get("platform"),
      "processes": start.get("processes"),
      "mesh": text,
    },
    "flags": {},
  }


def differences(first: Environment, second: Environment) -> list[Difference]:
  """The facts that differ. A commit counts if a file of the package differs too.

  Args:
    first: The environment of a run. If an earlier version recorded it, facts that only one of the
      two has do not count.
    second: Another one.
  """
  out = []
  complete = _is_complete(first) and _is_complete(second)
  for topic in first.facts:
    a, b = first.facts[topic], second.facts.get(topic, {})
    for name in sorted(a.keys() | b.keys() if complete else a.keys() & b.keys()):
      if a.get(name) != b.get(name):
        out.append(Difference(topic, name, a.get(name), b.get(name)))
  files = any(d.topic == "code" and "/" in d.name for d in out)
  if complete and not files:
    out = [d for d in out if d.topic != "code"]
  return sorted(out, key=_order)


def _order(difference: Difference) -> tuple[int, bool, str]:
  """By topic. Files come before the commit, and packages that compute before all others."""
  topic, name = difference.topic, difference.name
  first = name in _COMPUTING if topic == "versions" else "/" in name
  return _TOPICS.index(topic), not first, name


def _is_complete(environment: Environment) -> bool:
  return "package" in environment.facts["code"]
