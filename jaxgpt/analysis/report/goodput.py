"""The wall time of a run by activity, as far as its folder tells.

Each start of a run keeps an account (`throughput.Timer.account`), which is written with each
checkpoint. What is outside of it follows from the times of the starts:

  start 1 entered ─ began ──── last checkpoint ╳       start 2 entered ─ began ── last checkpoint
          └─start-up─┘└─ account of start 1 ─┘└─── between the starts ──┘└─start-up─┘└─ account ─┘

The time between two starts is downtime, and work after the last checkpoint that was lost.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.analysis import curves
from jaxgpt.run import throughput

_LABELS = {  # activity: (label, what it covers)
  throughput.STEPS: ("training steps", "the device computes steps"),
  throughput.INPUT: ("waiting for data", "the next batch was not ready"),
  throughput.COMPILE: ("compiling", "the train step, at each start and stage"),
  throughput.EVALUATION: ("evaluation", "validation and tasks, compiling included"),
  throughput.SAVING: ("saving", "time for which checkpoints held up training"),
}
_STARTUP = ("start-up", "from the entry in starts.jsonl to the first compile: data, weights")
_BETWEEN = ("between starts", "not running, or repeated later: work after the last checkpoint")
_REST = ("all else", "evaluation, saving, compiling, pauses: this run kept no account of them")


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
    notes: What the account does not cover.
  """

  parts: list[Part]
  starts: int
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


def of(starts: Sequence[Mapping[str, Any]], records: curves.Curves, until: float | None) -> Account:
  """The account of a run.

  Args:
    starts: The records of its starts, from `run_folder.read_starts`.
    records: Its metrics.
    until: When its last checkpoint was complete, in seconds since the epoch. None: unknown.
  """
  accounts = [start.get("account") for start in starts]
  if not any(accounts):
    return _from_metrics(starts, records, until)
  spent = dict.fromkeys(throughput.ACTIVITIES, 0.0)
  startup = between = 0.0
  notes = []
  ends: list[float] = []
  for number, (start, account) in enumerate(zip(starts, accounts), 1):
    entered = seconds_of(start.get("time", ""))
    if ends and entered is not None:
      between += max(entered - ends[-1], 0.0)
    if not account:
      notes.append(f"start {number} ended before its first checkpoint was complete, or kept none")
      ends += [entered] if entered is not None else []
      continue
    began = seconds_of(account["began"])
    if began is not None and entered is not None:
      startup += max(began - entered, 0.0)
    for name, value in account["seconds"].items():
      spent[name] = spent.get(name, 0.0) + value
    ends += [(began or entered or 0.0) + sum(account["seconds"].values())]
  parts = [Part(_LABELS[name][0], spent[name], _LABELS[name][1]) for name in _LABELS]
  parts += [Part(_STARTUP[0], startup, _STARTUP[1]), Part(_BETWEEN[0], between, _BETWEEN[1])]
  notes.append("the account of each start ends with its last complete checkpoint")
  return Account([part for part in parts if part.seconds > 0], len(starts), notes)


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
  return Account([part for part in found if part.seconds > 0], len(starts), [note])


def seconds_of(time: str) -> float | None:
  """Seconds since the epoch of a time in starts.jsonl, or None if it is not one."""
  try:
    return datetime.datetime.fromisoformat(time).timestamp()
  except (ValueError, TypeError):
    return None
