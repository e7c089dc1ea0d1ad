"""The wall time of a run by activity, as far as its folder tells.

Each start of a run keeps an account from its launch on (`throughput.Timer.account`), which is
written with each checkpoint and at a good end. The rest follows from the times of the starts and
from the signs of life of the run (`run_lock.last_beat`), which the next start records:

  start 1 launched ──── last checkpoint ──── last sign of life ╳     start 2 launched ──── end
          └─ account of start 1 ─┘└────────── lost ───────────┘└ between ┘└── its account ──┘

Lost is the work after the last checkpoint of a killed start, or all of a start without one: the
next start repeats its steps. A start that ends at a signal saves first and loses nothing. Steps
count once as training steps, when they lead to a checkpoint. While a run goes on, those since its
last checkpoint are not saved yet.

A process that goes back from a spike lives on, and so do its signs of life: the start that it ends
is over when the next one begins.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from jaxgpt.analysis import curves
from jaxgpt.run import run_folder, run_lock, throughput
from jaxgpt.run.compression import record as record_lib

_LABELS = {  # activity: (label, what it covers)
  throughput.STEPS: ("training steps", "the device computes steps"),
  throughput.INPUT: ("waiting for data", "the next batch was not ready"),
  throughput.COMPILE: ("compiling", "the train step, at each start and stage"),
  throughput.EVALUATION: ("evaluation", "validation and tasks, compiling included"),
  throughput.SAMPLING: ("sampling", "texts that the model writes as training goes on"),
  throughput.SAVING: ("saving", "time for which checkpoints held up training"),
  throughput.RESTORE: ("restoring", "first weights, or those of the last checkpoint"),
  throughput.STARTUP: ("start-up", "from the launch of the process to the first compile; closing"),
}
_LOST = ("lost", "work after the last checkpoint of a start that was killed")
_UNSAVED = ("not saved yet", "work since the last checkpoint of a run that is going on")
_BETWEEN = ("between starts", "not running")
_REST = ("all else", "evaluation, saving, compiling, pauses: this run kept no account of them")
_UNKNOWN = "nothing is known of its time: it has no metrics"


class Part(NamedTuple):
  """A part of the wall time.

  Attributes:
    name: Its label.
    seconds: Its length.
    meaning: What it covers.
  """

  name: str
  seconds: float
  meaning: str


class Account(NamedTuple):
  """The wall time of a run.

  Attributes:
    parts: Its parts, with those of no length left out.
    starts: Number of starts.
    repeated: Steps that were done again after a kill, as far as their metrics were written.
    notes: What the account does not cover.
  """

  parts: list[Part]
  starts: int
  repeated: int
  notes: list[str]

  @property
  def seconds(self) -> float:
    """The wall time in all."""
    return sum(part.seconds for part in self.parts)

  @property
  def goodput(self) -> float | None:
    """The share of training steps, or None if nothing is known."""
    steps = sum(p.seconds for p in self.parts if p.name == _LABELS[throughput.STEPS][0])
    return steps / self.seconds if self.seconds else None


def of(
  starts: Sequence[Mapping[str, Any]],
  records: curves.Curves,
  until: float | None,
  last_beat: float | None = None,
  goes_on: bool = False,
) -> Account:
  """The account of a run.

  Args:
    starts: The records of its starts, from `run_folder.read_starts`.
    records: Its metrics.
    until: When its last checkpoint was complete, in seconds since the epoch. None: unknown.
    last_beat: Its last sign of life, see `run_lock.last_beat`. None: unknown.
    goes_on: A process is training it.
  """
  if not any("account" in start or "launched" in start for start in starts):
    return _from_metrics(starts, records, until)
  spent = dict.fromkeys(throughput.ACTIVITIES, 0.0)
  between = lost = unsaved = 0.0
  notes = []
  ends: list[float] = []
  for number, start in enumerate(starts, 1):
    began = _began(start)
    if ends and began is not None:
      between += max(began - ends[-1], 0.0)
    account = start.get("account")
    end = began
    if account:
      spent[throughput.STARTUP] += _before_account(start)
      for name, value in account["seconds"].items():
        spent[name] = spent.get(name, 0.0) + value
      end = (seconds_of(account["began"]) or began or 0.0) + sum(account["seconds"].values())
    beat = _beat_after(starts[number:], last_beat)
    if end is not None and beat is not None and beat > end and not start.get("ended"):
      if goes_on and number == len(starts):
        unsaved = beat - end
      else:
        lost += beat - end
      end = beat
    elif not account and "launched" not in start:
      notes.append(f"start {number} ended before its first checkpoint was complete, or kept none")
    ends += [end] if end is not None else []
  parts = [Part(_LABELS[name][0], spent[name], _LABELS[name][1]) for name in _LABELS]
  others = ((_LOST, lost), (_UNSAVED, unsaved), (_BETWEEN, between))
  parts += [Part(name, seconds, meaning) for (name, meaning), seconds in others]
  if not starts[-1].get("ended"):
    notes.append("the account of the last start ends with its last complete checkpoint")
  repeated = sum(start.get("repeats") or 0 for start in starts)
  return Account([part for part in parts if part.seconds > 0], len(starts), repeated, notes)


def of_run(
  folder: epath.PathLike, records: curves.Curves | None = None, until: float | None = None
) -> Account:
  """The account of the run in a folder.

  Args:
    folder: The run folder.
    records: Its metrics, if they have been read.
    until: See `of`.

  Raises:
    UserError: The folder holds no run, or its record of starts or of its making is broken.
  """
  run_folder.require_run(folder)
  starts = run_folder.read_starts(folder)
  if why := _without_training(folder):
    return Account([], len(starts), 0, [why])
  records = curves.read(folder) if records is None else records
  beat = run_lock.last_beat(folder)
  goes_on = run_lock.holder(folder) is not None
  return of(starts, records, until, beat, goes_on)


def _without_training(folder: epath.PathLike) -> str:
  """The reason why a run took no time to train, or ''."""
  if made := record_lib.has_no_steps(folder):
    return f"{made}: nothing trained it"
  return "a published model was imported: nothing trained it" * run_folder.is_imported(folder)


def _began(start: Mapping[str, Any]) -> float | None:
  """When a start's process was launched. Of an earlier version: when it entered the folder."""
  return seconds_of(start.get("launched", start.get("time", "")))


def _before_account(start: Mapping[str, Any]) -> float:
  """Seconds from the launch of a start to the beginning of its account, 0 in this version."""
  began, account = _began(start), seconds_of(start["account"]["began"])
  return max(account - began, 0.0) if began is not None and account is not None else 0.0


def _beat_after(later: Sequence[Mapping[str, Any]], last_beat: float | None) -> float | None:
  """The last sign of life of a start, which the next one recorded, or None.

  It is not later than the beginning of the next one, see the top of this file.
  """
  if not later:
    return last_beat
  beat, began = seconds_of(later[0].get("last_beat", "")), _began(later[0])
  return beat if beat is None or began is None else min(beat, began)


def _from_metrics(
  starts: Sequence[Mapping[str, Any]], records: curves.Curves, until: float | None
) -> Account:
  """The account of a run of an earlier version: its steps, and the rest."""
  train = [record for (kind, _), record in records.items() if kind == "train"]
  steps = waiting = 0.0
  before = 0
  for record in train:
    seconds = (record.get("step_time") or 0.0) * (record["step"] - before)
    share = record.get("input_wait") or 0.0
    steps, waiting = steps + seconds * (1 - share), waiting + seconds * share
    before = record["step"]
  first = seconds_of(starts[0].get("time", "")) if starts else None
  rest = 0.0
  if until is not None and first is not None:
    rest = max(until - first - steps - waiting, 0.0)
  label = _LABELS
  found = [
    Part(label[throughput.STEPS][0], steps, "from the logged step times"),
    Part(label[throughput.INPUT][0], waiting, "from the logged shares of input wait"),
    Part(_REST[0], rest, f"{_REST[1]}; until the last checkpoint was complete"),
  ]
  note = "an earlier version trained this run: only the times of its steps were logged"
  parts = [part for part in found if part.seconds > 0]
  return Account(parts, len(starts), 0, [note if parts else _UNKNOWN])


def seconds_of(time: str) -> float | None:
  """Seconds since the epoch of a time in starts.jsonl, or None if it is not one."""
  try:
    return datetime.datetime.fromisoformat(time).timestamp()
  except (ValueError, TypeError):
    return None
