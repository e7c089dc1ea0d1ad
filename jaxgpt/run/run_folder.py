"""The run folder: config and provenance of a run, and the check that a continuation matches it.

RUN/config.json    the resolved config, and where each value came from
RUN/starts.jsonl   one line per start: versions, git state, mesh, data digest, command, step
RUN/config_before_STEP.json   see `config_changes`
RUN/environments/  see `provenance.environment`
RUN/files.json     see `provenance.seal`
RUN/train.lock     see `run_lock`
RUN/tokenizer/     a copy of the data's tokenizer
RUN/code/          copies of the user files FILE.py:NAME that the config names, if any
RUN/metrics.jsonl  see `metric_writers`
RUN/checkpoints/   see `checkpoints`
RUN/frozen/        parameters that are not trained, see `checkpoints`
RUN/reference/     the weights that a preference run started from
RUN/teacher/       the weights of a distillation's teacher
"""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from jaxgpt import config
from jaxgpt.config import installed, user_code
from jaxgpt.config.keys import KEYS, lora_targets
from jaxgpt.errors import UserError
from jaxgpt.run import run_lock, throughput
from jaxgpt.run.compression import record as record_lib
from jaxgpt.run.provenance import environment, seal
from jaxgpt.run.provenance import rewinds as rewinds_lib
from jaxgpt.storage import atomic, buckets, os_errors, strict_json
from jaxgpt.text.tokenizers.base import Tokenizer

CHECKPOINTS = seal.CHECKPOINTS
_CONFIG = "config.json"
_STARTS = seal.STARTS
_TOKENIZER = "tokenizer"
_CODE = "code"
_ANOTHER = "choose another folder or change its permissions"
_CHANGES = 5  # changed keys to show with their values, and without
# config.json is written last. A start that was killed before leaves only these.
_BEFORE_CONFIG = {_TOKENIZER, _CODE, environment.FOLDER, seal.FILE, run_lock.NAME}
_BEFORE_CONFIG |= {name + atomic.PART for name in (_CONFIG, seal.FILE)}
# Packages whose versions each start records.
_PACKAGES = (
  "jaxgpt",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "array-record",
  "sentencepiece",
  "ml-collections",
  "numpy",
)


def enter(
  folder: epath.PathLike,
  c: ml_collections.ConfigDict,
  origin: Mapping[str, str],
  mesh: jax.sharding.Mesh,
  data_digest: str,
  tokenizer: Tokenizer,
  step: int = 0,
  changes: Mapping[str, tuple[Any, Any]] | None = None,
  timing: Mapping[str, Any] | None = None,
  rewinds: Sequence[rewinds_lib.Rewind] = (),
) -> list[str]:
  """Makes a run folder, or checks that the existing one belongs to this run, and records the start.

  Args:
    folder: The run folder.
    c: The resolved config.
    origin: {flat key: where its value came from}, see `config.load`.
    mesh: The device mesh.
    data_digest: Digest of the data's manifest. Empty for an imported model.
    tokenizer: Tokenizer of the data, which is saved in the folder.
    step: Step from which this start goes on.
    changes: {flat key: (old, new value)} of changes to the config that the user asked for.
    timing: Entries of the start's record for the account of wall time, see `timing`.
    rewinds: New ones, which come after those of earlier starts.

  Returns:
    Lines on files of the folder that are not as the run wrote them, but do not stop it. They are
    sealed as they are, and this start's record tells of them.

  Raises:
    UserError: The folder cannot be written, or holds a run with another config or other data, or a
      file without which it is not the run was changed.
  """
  folder = epath.Path(folder)
  buckets.check(folder)
  code, damaged = user_code.files(c), list[str]()
  try:
    if resumed := (folder / _CONFIG).exists():
      _check_same_run(folder, c, origin, data_digest, bool(changes))
      _check_code(folder, code)
      damaged = _check_seal(folder)
    else:
      check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    git = environment.git()
    around = environment.record(folder, environment.collect(mesh, git))
    text = _config_text(c, origin)
    # config.json makes the folder a run, so it is written after the tokenizer: a kill in between
    # leaves a folder that the next start can complete.
    if not resumed:
      tokenizer.save(folder / _TOKENIZER)
      for name, source in code.items():
        (folder / _CODE / name).parent.mkdir(parents=True, exist_ok=True)
        atomic.write(folder / _CODE / name, source)
      seal.begin(folder, {_CONFIG: text})
      atomic.write(folder / _CONFIG, text)
    elif changes:
      before = folder / f"config_before_{step}.json"
      if not before.exists():  # else no step was made with the config in between
        atomic.write(before, (folder / _CONFIG).read_text())
    record = _start(c, mesh, data_digest, code) | {"git": git, "environment": around, "step": step}
    record |= {"config_digest": digest_of(c), **(timing or {})}
    record |= {"changes": dict(changes)} if changes else {}
    earlier = read_starts(folder) if (folder / _STARTS).exists() else []
    record |= rewinds_lib.entry([*rewinds_lib.of(earlier), *rewinds])
    _add_start(folder, record, damaged)
    if changes:
      seal.replace(folder, _CONFIG, text)
  except OSError as e:
    raise os_errors.user_error(f"--workdir={folder} can't be written", e, _ANOTHER) from e
  return damaged


def timing(launched: float, last_beat: float | None, repeats: int) -> dict[str, Any]:
  """Entries of a start's record that tell the time outside of its own account.

  Args:
    launched: When the process was launched, in seconds since the epoch.
    last_beat: The last sign of life of the start before, see `run_lock.last_beat`.
    repeats: Steps that the start before did and this one repeats.
  """
  before = {} if last_beat is None else {"last_beat": throughput.utc(last_beat)}
  return {"launched": throughput.utc(launched), **before, "repeats": max(repeats, 0)}


def _check_seal(folder: epath.Path) -> list[str]:
  """Lines on changed files that do not stop a run.

  Raises:
    UserError: A file that the run needs was changed.
  """
  found = seal.check(folder)
  for damage in found:
    if damage.vital:
      raise UserError(f"--workdir={folder}: {damage.describe(folder)}")
  return [damage.describe(folder) for damage in found]


def _add_start(folder: epath.Path, record: dict[str, Any], damaged: list[str]) -> None:
  """Adds a line to starts.jsonl, and seals the folder."""
  if damaged:
    seal.renew(folder)
    record = record | {"damaged": damaged}
  record = record | {"metrics": seal.metrics_prefix(folder, record["step"])}
  starts = read_starts(folder) if (folder / _STARTS).exists() else []
  # Objects in a bucket cannot be appended to, so the file is written as a whole.
  atomic.write(folder / _STARTS, seal.sign([*starts, seal.new(record)]))
  seal.write(folder, len(starts) + 1)


def _config_text(c: ml_collections.ConfigDict, origin: Mapping[str, str]) -> str:
  """The content of config.json."""
  # Relative to the run folder, so that the folder may move.
  values = json.loads(c.to_json()) | {"code_folder": _CODE if user_code.files(c) else ""}
  return strict_json.dumps({"config": values, "origin": origin}, indent=2) + "\n"


def digest_of(c: ml_collections.ConfigDict) -> str:
  """Digest of the keys of a resolved config that determine the result."""
  values = {k: v for k, v in config.flatten(c).items() if not config.is_free_on_resume(k)}
  return hashlib.sha256(strict_json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_run(folder: epath.PathLike) -> bool:
  """Whether a folder holds a run."""
  return (epath.Path(folder) / _CONFIG).exists()


def check_free(folder: epath.PathLike) -> None:
  """Raises a UserError if a folder holds something other than a run, or is a file."""
  try:
    is_free = is_run(folder) or not holds_something_else(folder)
  except OSError as e:
    raise os_errors.user_error(f"--workdir={folder} can't be written", e, _ANOTHER) from e
  if not is_free:
    raise UserError(
      f"--workdir={folder} is not empty and holds no run ({_CONFIG} is missing); "
      "choose a new folder"
    )


def holds_something_else(folder: epath.PathLike) -> bool:
  """Whether a folder without a run holds more than a killed start leaves behind."""
  folder = epath.Path(folder)
  return folder.exists() and not {p.name for p in folder.iterdir()} <= _BEFORE_CONFIG


def changes(folder: epath.PathLike, c: ml_collections.ConfigDict, origin: Mapping[str, str]) -> str:
  """The keys whose values differ from those of the run in a folder, or '' if none does.

  The keys that a user set come first: on the command line, in the file, by a preset. Keys that
  derive their value from others come last.

  Args:
    folder: A run folder with a run.
    c: A resolved config.
    origin: As in `enter`. {} if it is not known.
  """
  changed = config.difference(read_config(folder), c)
  before = json.loads((epath.Path(folder) / _CONFIG).read_text()).get("origin", {})

  def rank(key: str) -> int:
    of_both = {origin.get(key, "base"), before.get(key, "base")}
    ranks = {"command line": 0, "file": 1, "config.json": 1, "base": 4}
    found = min(ranks.get(name, 2) for name in of_both)  # 2: a preset
    derived = key in KEYS and KEYS[key].derive is not None
    return found if found < 4 or derived else 3

  changed.sort(key=lambda change: (rank(change[0]), change[0]))
  lines = "; ".join(f"{key} was {a!r}, is {b!r}" for key, a, b in changed[:_CHANGES])
  rest = [key for key, _, _ in changed[_CHANGES:]]
  return (
    lines
    + (f"; and {', '.join(rest[:_CHANGES])}" if rest else "")
    + (f" and {len(rest) - _CHANGES} more" if len(rest) > _CHANGES else "")
  )


def _check_same_run(
  folder: epath.Path,
  c: ml_collections.ConfigDict,
  origin: Mapping[str, str],
  data_digest: str,
  accept: bool,
) -> None:
  if data_digest and is_imported(folder):
    raise UserError(
      f"--workdir={folder} holds an imported model; train it in another --workdir "
      f"with --config.init_from={folder}"
    )
  if made := record_lib.has_no_steps(folder):
    raise UserError(
      f"--workdir={made}, so it has no state to go on from; train it in another --workdir with "
      f"--config.init_from={folder}"
    )
  if not accept and (lines := changes(folder, c, origin)):
    changed = [key for key, _, _ in config.difference(read_config(folder), c)]
    fixed = next((key for key in changed if config.effect_of_change(key) is None), None)
    ways = (
      "add --accept-changes to go on with the new ones,"
      if fixed is None
      else f"{fixed} can't change in a run, since {config.why_fixed(fixed)};"
    )
    raise UserError(
      f"--workdir={folder} holds a run of another config: {lines}; give the "
      f"old values to continue it, {ways} or choose another --workdir to start a new run"
    )
  if not (folder / _STARTS).exists():  # killed between the two files
    return
  digest = read_starts(folder)[0]["data_digest"]
  if digest != data_digest:
    raise UserError(
      f"--workdir={folder} holds a run on other data: the digest of its manifest was "
      f"{digest[:12]}, but that of data.path={c.data.path!r} is {data_digest[:12]}; "
      "point data.path at the old data, or choose another --workdir"
    )


def _check_code(folder: epath.Path, code: dict[str, str]) -> None:
  """Refuses user files that changed since the run began."""
  for name, text in code.items():
    recorded = folder / _CODE / name
    old, new = user_code.digest(recorded.read_text()), user_code.digest(text)
    if old != new:
      raise UserError(
        f"{name} changed since --workdir={folder} began: its SHA-256 was {old[:12]}, is "
        f"{new[:12]}; restore it from {recorded}, or train in another --workdir"
      )


def _start(
  c: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, data_digest: str, code: dict[str, str]
) -> dict[str, Any]:
  """A line of starts.jsonl."""
  device = mesh.devices.flat[0]
  free = {k: v for k, v in config.flatten(c).items() if config.is_free_on_resume(k)}
  return {
    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "command": sys.argv,
    "python": platform.python_version(),
    "packages": {name: installed.version(name) for name in _PACKAGES},
    "device_kind": device.device_kind,
    "platform": device.platform,
    "processes": jax.process_count(),
    "mesh": dict(mesh.shape),
    "data_digest": data_digest,
    **({"code": {name: user_code.digest(source) for name, source in code.items()}} if code else {}),
    "config": free,  # the keys that may differ from config.json
  }


def require_run(folder: epath.PathLike) -> epath.Path:
  """The folder as a path.

  Raises:
    UserError: It holds no run.
  """
  buckets.check(folder)
  if not is_run(folder):
    raise UserError(
      f'--workdir={folder} holds no run ({_CONFIG} is missing); start one with "jaxgpt train"'
    )
  return epath.Path(folder)


def read_config(folder: epath.PathLike, step: int | None = None) -> ml_collections.ConfigDict:
  """The resolved config of a run.

  Args:
    folder: The run folder.
    step: Number of a step that was made with the config, see `config_changes`. None: the newest.

  Raises:
    UserError: The folder holds no run, or its config.json is broken.
  """
  path = config_path(require_run(folder), step)
  seal.require(folder, path.name, f"{_CODE}/")
  try:
    c = config.from_dict(json.loads(path.read_text())["config"])
    if c.code_folder:
      c.code_folder = str(epath.Path(folder) / c.code_folder)
    # Targets that matched no weight were once accepted, and if none did, all weights were trained.
    c.model.lora.targets = lora_targets.matching(c.model)
    if not c.model.lora.targets:
      c.model.lora.rank = 0
    return config.resolve(c)
  except UserError as e:
    raise UserError(f"{path}: {e}") from e
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
    if (cause := os_errors.passing(e)) is not None:
      raise os_errors.user_error(f"{path} can't be read", cause, "") from e
    raise UserError(
      f"{path} is broken ({type(e).__name__}: {e}); restore it, or start over in another folder"
    ) from e


def config_path(folder: epath.PathLike, step: int | None = None) -> epath.Path:
  """The file with the config of a step. None: the newest."""
  later = [] if step is None else [s for s in changed_at(folder) if s > step]
  return epath.Path(folder) / (f"config_before_{min(later)}.json" if later else _CONFIG)


def changed_at(folder: epath.PathLike) -> list[int]:
  """The steps from which a run went on with another config. The files themselves tell."""
  names = [path.name for path in epath.Path(folder).glob("config_before_*.json")]
  numbers = [name.removeprefix("config_before_").removesuffix(".json") for name in names]
  return sorted(int(number) for number in numbers if number.isdecimal())


def read_starts(folder: epath.PathLike) -> list[dict[str, Any]]:
  """The records of all starts of a run, oldest first.

  Raises:
    UserError: The file is missing or broken.
  """
  path = epath.Path(folder) / _STARTS
  try:
    starts = [json.loads(line) for line in path.read_text().splitlines()]
    if not all("data_digest" in start for start in starts) or not starts:
      raise ValueError("a start without its data_digest")
    return starts
  except (OSError, ValueError, TypeError) as e:
    raise UserError(f"{path} is broken ({e}); restore it, or start over in another folder") from e


def note_saved(folder: epath.PathLike, step: int, account: Mapping[str, Any] | None = None) -> None:
  """Records in the newest start that the checkpoint of a step is complete, and seals it.

  The metrics that are there by now are sealed as well.

  Args:
    folder: The run folder.
    step: The step.
    account: The wall time of this start so far, see `throughput.Timer.account`.
  """
  spent = {"account": account} if account else {}
  _amend_start(folder, saved=step, metrics=seal.metrics_prefix(folder), **spent)
  seal.note_checkpoint(folder, step)


def note_ended(folder: epath.PathLike, account: Mapping[str, Any]) -> None:
  """Records in the newest start that it ended with everything saved, and its whole account."""
  _amend_start(folder, ended=True, account=account)


def note_failed(folder: epath.PathLike, step: int) -> None:
  """Records in the newest start that a checkpoint could not be saved."""
  _amend_start(folder, failed=step)


def note_start(folder: epath.PathLike, step: int) -> None:
  """Records in the newest start that it goes on from another step than the newest checkpoint's."""
  newest = read_starts(folder)[-1]
  repeats = newest.get("repeats", 0) + newest.get("step", step) - step
  values = {"step": step, "repeats": repeats, "metrics": seal.metrics_prefix(folder, step)}
  if "changes" in newest and step < newest.get("step", step):  # they are not from this step on
    values |= {"changes": None, "changes_undone": newest["changes"]}
  _amend_start(folder, **values)


def _amend_start(folder: epath.PathLike, **values: Any) -> None:
  starts = read_starts(folder)
  starts[-1] = seal.new({k: v for k, v in (starts[-1] | values).items() if v is not None})
  atomic.write(epath.Path(folder) / _STARTS, seal.sign(starts))


def is_imported(folder: epath.PathLike) -> bool:
  """Whether a folder holds an imported published model, not a training run."""
  starts = epath.Path(folder) / _STARTS
  return starts.exists() and not read_starts(folder)[0]["data_digest"]


def tokenizer_folder(folder: epath.PathLike) -> epath.Path:
  """The folder of a run's tokenizer."""
  return epath.Path(folder) / _TOKENIZER
