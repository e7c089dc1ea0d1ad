"""The seal of a run folder: digests that tell whether its files are those that the run wrote.

  RUN/files.json      SHA-256 of each small file of the run, size and SHA-256 of the files of each
                      checkpoint, the number of lines of starts.jsonl, and a digest of all this
  RUN/starts.jsonl    each line has a digest of itself. The newest has size and SHA-256 of the part
                      of metrics.jsonl that came before the newest checkpoint

A file is never written by the run without its seal, so another content is an accident or an edit.
The seal is no protection against an attacker. A folder of an earlier version has no files.json: it
is sealed as it is by its next start.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.run import metric_writers
from jaxgpt.storage import atomic, buckets, strict_json

FILE = "files.json"
STARTS = "starts.jsonl"
METRICS = metric_writers.JSONL
CHECKPOINTS = "checkpoints"
_TREES = ("tokenizer", "code", "environments")  # folders whose files are sealed
_FILES = (
  "config.json",
  "generation_config.json",
  "chat_template.jinja",
  "init.json",
  "stored.json",
  "compression.json",
)
# Files without which a run is not the run. Training refuses to go on if one has changed.
_VITAL = ("config.json", "tokenizer/", "code/", STARTS)
# Bytes. Larger files of a checkpoint have arrays, which have digests of their own.
_HASHED = 1 << 20
_DIGEST = "digest"
_ACCEPT = f"if the change is yours, delete {FILE}: the next start seals the folder as it is"


class Damage(NamedTuple):
  """A file that is not as the run wrote it.

  Attributes:
    file: Its name in the run folder.
    problem: What is wrong with it, such as 'is missing'.
    way_out: What the user can do.
    vital: The run cannot go on.
  """

  file: str
  problem: str
  way_out: str
  vital: bool = False

  def describe(self, folder: epath.PathLike) -> str:
    """One line for the user."""
    return f"{epath.Path(folder) / self.file} {self.problem}; {self.way_out}"


def sealed_names(folder: epath.PathLike) -> list[str]:
  """The files of a run folder that a seal covers, as far as they are there."""
  folder = epath.Path(folder)
  found = [name for name in _FILES if (folder / name).is_file()]
  found += sorted(path.name for path in folder.glob("config_before_*.json"))
  for tree in _TREES:
    found += [f"{tree}/{name}" for name in _below(folder / tree)]
  return found


def _below(folder: epath.Path) -> Iterator[str]:
  """Names of the files below a folder, which need not exist."""
  if not folder.is_dir():
    return
  for path in sorted(folder.iterdir()):
    if path.name.endswith(atomic.PART):
      continue
    if path.is_dir():
      yield from (f"{path.name}/{name}" for name in _below(path))
    else:
      yield path.name


def begin(folder: epath.PathLike, ahead: Mapping[str, str]) -> None:
  """Seals a new run.

  Args:
    folder: The run folder.
    ahead: {file: text} of files that are written after this.
  """
  files = {name: _sha(epath.Path(folder) / name) for name in sealed_names(folder)}
  files |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in ahead.items()}
  _write(epath.Path(folder), {"files": files, "checkpoints": {}, "unsigned": 0, "starts": 0})


def write(folder: epath.PathLike, starts: int) -> None:
  """Seals the files of a run that have no seal yet.

  Args:
    folder: The run folder.
    starts: Lines of starts.jsonl that must be there from now on.
  """
  folder = epath.Path(folder)
  sealed = _read(folder) or {"files": {}, "checkpoints": {}, "unsigned": _unsigned(folder)}
  files = {name: sealed["files"].get(name) or _sha(folder / name) for name in sealed_names(folder)}
  _write(folder, sealed | {"files": files, "starts": starts})


def renew(folder: epath.PathLike) -> None:
  """Seals a folder as it is, in place of an earlier seal. Keeps the lists of checkpoints."""
  folder = epath.Path(folder)
  before = _read(folder) or {}
  files = {name: _sha(folder / name) for name in sealed_names(folder)}
  new = {"files": files, "checkpoints": before.get("checkpoints", {})}
  count = len(_lines(folder / STARTS))
  _write(folder, new | {"unsigned": _unsigned(folder), "starts": count})


def replace(folder: epath.PathLike, name: str, text: str) -> None:
  """Replaces a sealed file. A kill leaves the old file or the new one, and a seal that fits it."""
  folder = epath.Path(folder)
  sealed = _read(folder)
  if sealed is None:
    atomic.write(folder / name, text)
    return
  old, new = sealed["files"].get(name, ""), hashlib.sha256(text.encode()).hexdigest()
  _write(folder, sealed | {"files": sealed["files"] | {name: f"{old} {new}"}})
  atomic.write(folder / name, text)
  _write(folder, sealed | {"files": sealed["files"] | {name: new}})


def forget(folder: epath.PathLike, names: Iterable[str]) -> None:
  """Takes files out of the seal, before they are moved away."""
  folder = epath.Path(folder)
  if (sealed := _read(folder)) is not None:
    gone = set(names)
    files = {name: digest for name, digest in sealed["files"].items() if name not in gone}
    _write(folder, sealed | {"files": files})


def note_checkpoint(folder: epath.PathLike, step: int) -> None:
  """Seals the files of a complete checkpoint of a local run, and files that are new."""
  folder = epath.Path(folder)
  sealed = _read(folder)
  if sealed is None or buckets.is_remote(folder):
    return
  where = pathlib.Path(folder, CHECKPOINTS)
  kept = {s: files for s, files in sealed["checkpoints"].items() if (where / s).is_dir()}
  new = {name: sealed["files"].get(name) or _sha(folder / name) for name in sealed_names(folder)}
  if (where / str(step)).is_dir():
    kept[str(step)] = _listing(where / str(step))
  _write(folder, sealed | {"files": new, "checkpoints": kept})


def _listing(folder: pathlib.Path) -> dict[str, list[Any]]:
  """{file: [size, SHA-256 or None if it is large]} of the files below a folder."""
  found = {}
  for name in _below(epath.Path(folder)):
    size = (folder / name).stat().st_size
    found[name] = [size, _sha(epath.Path(folder) / name) if size <= _HASHED else None]
  return found


def damaged_checkpoint(folder: epath.PathLike, step: int) -> list[str]:
  """What is wrong with the files of a checkpoint: lines such as 'params/_METADATA was changed'.

  Args:
    folder: The run folder.
    step: Step of a checkpoint. Without a seal of its files, nothing is known.
  """
  where = pathlib.Path(folder, CHECKPOINTS, str(step))
  sealed = (_read(epath.Path(folder)) or {}).get("checkpoints", {}).get(str(step))
  if sealed is None or buckets.is_remote(folder):
    return []
  there, out = _listing(where), []
  for name in sorted(sealed.keys() | there.keys()):
    if name not in there:
      out.append(f"{name} is missing")
    elif name not in sealed:
      out.append(f"{name} was not written by the run")
    elif there[name][0] != sealed[name][0]:
      out.append(f"{name} has {there[name][0]:,} bytes instead of {sealed[name][0]:,}")
    elif there[name][1] != sealed[name][1]:
      out.append(f"{name} was changed")
  return out


def sign(records: Iterable[Mapping[str, Any]]) -> str:
  """The lines of starts.jsonl: each record with a digest of itself and of its place.

  Records of earlier versions, which have no digest, come first and stay as they are.
  """
  out = []
  for i, record in enumerate(records):
    rest = {key: value for key, value in record.items() if key != _DIGEST}
    signed = rest | {_DIGEST: _digest([i, rest])} if _DIGEST in record else rest
    out.append(strict_json.dumps(signed) + "\n")
  return "".join(out)


def new(record: Mapping[str, Any]) -> dict[str, Any]:
  """A record for `sign` to sign."""
  return {**record, _DIGEST: ""}


def metrics_prefix(folder: epath.PathLike, step: int | None = None) -> dict[str, Any]:
  """The seal of metrics.jsonl for a line of starts.jsonl: {'bytes', 'sha256'}.

  Args:
    folder: The run folder.
    step: The lines up to this step, which come first, and which the next start keeps. None: all.
  """
  data = _bytes(epath.Path(folder) / METRICS)
  if step is not None:
    data = metric_writers.kept_until(data.decode(errors="replace"), step)[1].encode()
  return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def check(folder: epath.PathLike, only: tuple[str, ...] = ()) -> list[Damage]:
  """Compares a run folder with its seal. Checkpoints are not among it.

  Args:
    folder: The run folder.
    only: Beginnings of the names of files to look at. (): all.

  Returns:
    The files that are not as the run wrote them. [] for a folder without a seal.
  """
  folder = epath.Path(folder)
  try:
    sealed = _read(folder, strict=True)
  except ValueError as e:
    way = f"{_ACCEPT}. What else was changed since is not known"
    return [Damage(FILE, f"is damaged ({e})", way)]
  if sealed is None:
    if any(_DIGEST in (_parsed(line) or {}) for line in _lines(folder / STARTS)):
      way = "restore it, or the next start seals the folder as it is"
      return [Damage(FILE, "is missing", way)]
    return []
  found = []
  for name, digest in sealed["files"].items():
    if only and not name.startswith(only):
      continue
    if not (folder / name).is_file():
      found.append(_damage(name, "is missing"))
    elif _sha(folder / name) not in digest.split():
      found.append(_damage(name, "is not as the run wrote it"))
  if not only:
    found += _check_starts(folder, sealed)
    found += _check_metrics(folder)
  return found


def require(folder: epath.PathLike, *names: str) -> None:
  """Raises a UserError if a file of a run is not as the run wrote it.

  Args:
    folder: The run folder.
    *names: Beginnings of the names of the files.
  """
  for damage in check(folder, names):
    if damage.file.startswith(names):
      raise UserError(damage.describe(folder))


def _damage(name: str, problem: str) -> Damage:
  vital = name.startswith(_VITAL)
  return Damage(name, problem, f"restore it from a copy; {_ACCEPT}", vital)


def _check_starts(folder: epath.Path, sealed: Mapping[str, Any]) -> list[Damage]:
  lines = _lines(folder / STARTS)
  if len(lines) < sealed["starts"]:
    return [_damage(STARTS, f"has {len(lines)} lines of {sealed['starts']}")]
  for i, line in enumerate(lines):
    record = _parsed(line)
    rest = {key: value for key, value in (record or {}).items() if key != _DIGEST}
    if i >= sealed["unsigned"] and (record or {}).get(_DIGEST) != _digest([i, rest]):
      return [_damage(STARTS, f"was changed in line {i + 1}")]
  return []


def _check_metrics(folder: epath.Path) -> list[Damage]:
  lines = _lines(folder / STARTS)
  prefix = (_parsed(lines[-1]) or {}).get("metrics") if lines else None
  if not prefix or not prefix["bytes"]:
    return []
  data = _bytes(folder / METRICS)
  way = "its curves are not the run's; restore it from a copy, or go on without those lines"
  if len(data) < prefix["bytes"]:
    text = f"has {len(data):,} bytes of the {prefix['bytes']:,} that the run wrote"
    return [Damage(METRICS, text, way)]
  if hashlib.sha256(data[: prefix["bytes"]]).hexdigest() != prefix["sha256"]:
    return [Damage(METRICS, "was edited since the run wrote it", way)]
  return []


def _unsigned(folder: epath.Path) -> int:
  """Lines of starts.jsonl of an earlier version, which have no digest."""
  return sum(_DIGEST not in (_parsed(line) or {}) for line in _lines(folder / STARTS))


def _read(folder: epath.Path, strict: bool = False) -> dict[str, Any] | None:
  """The content of files.json, or None if there is none or, unless `strict`, it is damaged.

  Raises:
    ValueError: It is damaged.
  """
  path = folder / FILE
  try:
    if not path.is_file():
      return None
    found = json.loads(path.read_text(encoding="utf-8"))
    rest = {key: value for key, value in found.items() if key != _DIGEST}
    if found.get(_DIGEST) != _digest(rest):
      raise ValueError("its content does not match its digest")
    return rest
  except (OSError, ValueError, AttributeError) as e:
    if strict:
      raise ValueError(str(e)) from e
    return None


def _write(folder: epath.Path, sealed: Mapping[str, Any]) -> None:
  text = strict_json.dumps({**sealed, _DIGEST: _digest(sealed)}, indent=1)
  atomic.write(folder / FILE, text + "\n")


def _digest(value: Any) -> str:
  text = strict_json.dumps(value, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def _sha(path: epath.Path) -> str:
  return hashlib.sha256(_bytes(path)).hexdigest()


def _bytes(path: epath.Path) -> bytes:
  try:
    return path.read_bytes()
  except FileNotFoundError:
    return b""


def _lines(path: epath.Path) -> list[bytes]:
  return [line for line in _bytes(path).split(b"\n") if line]


def _parsed(line: bytes) -> dict[str, Any] | None:
  try:
    found = json.loads(line)
    return found if isinstance(found, dict) else None
  except ValueError:
    return None
