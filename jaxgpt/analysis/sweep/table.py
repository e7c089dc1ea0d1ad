"""The table of a sweep: for each setting, the median over its seeds and how far that is known.

The interval goes from the k-th smallest to the k-th largest value. The median of all seeds that one
could take lies in it with a probability that needs no assumption on their distribution (each seed
is above that median with probability 1/2). k is the largest for which this is at least 95 %; up to
five seeds allow none, and the interval then reaches from the smallest to the largest value. The
table says the probability.
"""

import math
import shlex
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgpt.analysis.sweep import schedule
from jaxgpt.analysis.sweep import state as state_lib
from jaxgpt.analysis.sweep.definition import Setting
from jaxgpt.analysis.sweep.members import Member, Plan
from jaxgpt.run.process import text_table

CONFIDENCE = 0.95
WAITING, ENDED = "not done", "ended early"


class Row(NamedTuple):
  """A setting.

  Attributes:
    setting: Its values.
    step: Step of the values: the last one that all its runs reached, as far as they did not fail.
    values: The metric of each seed, +-inf for runs that diverged, None for runs that failed or are
      not there.
    median: Their median, or None without a value.
    low, high: Its interval.
    coverage: Probability that the interval holds the median of all seeds.
    at_end: Whether the step is the last one of the runs.
    note: What kept runs from the end, or ''.
  """

  setting: Setting
  step: int
  values: dict[int, float | None]
  median: float | None
  low: float | None
  high: float | None
  coverage: float
  at_end: bool
  note: str

  @property
  def is_finite(self) -> bool:
    """Whether the median is a number."""
    return self.median is not None and math.isfinite(self.median)


class Table(NamedTuple):
  """A sweep's result.

  Attributes:
    metric: The metric of the validation split.
    maximize: Whether the largest is the best.
    names: {key: its name as the head of a column}.
    coverage: Probability that an interval holds the median of all seeds, if no run failed.
    rows: Best first: those that trained to the end, then those that ended early.
    failures: {name of a run: why it will not go on}.
    flags: Flags of `jaxgpt train` that give the best setting.
    base: The base config.
  """

  metric: str
  maximize: bool
  names: dict[str, str]
  coverage: float
  rows: list[Row]
  failures: dict[str, state_lib.Failure]
  flags: list[str]
  base: str

  @property
  def is_complete(self) -> bool:
    """Whether no run is left to train."""
    return not any(WAITING in row.note for row in self.rows)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
  """An interval for the median of the distribution of some values, see above.

  Returns:
    (low, high, probability that the median lies between them).
  """
  ordered, n = sorted(values), len(values)
  best = (ordered[0], ordered[-1], _coverage(n, 1))
  for k in range(2, n // 2 + 1):
    if _coverage(n, k) >= CONFIDENCE:
      best = (ordered[k - 1], ordered[n - k], _coverage(n, k))
  return best


def _coverage(n: int, k: int) -> float:
  """Probability that the median lies between the k-th smallest and the k-th largest of n values."""
  return max(0.0, 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n)


def make(plan: Plan, states: schedule.States) -> Table:
  """The table of a sweep, complete or not."""
  alive = schedule.going_on(plan, states)
  rows, order = [], dict[int, tuple[Any, ...]]()
  for number in alive[0]:
    members = [member for member in plan.members if member.number == number]
    rung = max(i for i, settings in enumerate(alive) if number in settings)
    rows.append(_row(plan, states, members, rung))
    row = rows[-1]
    sign = -1 if plan.sweep.maximize else 1
    value = sign * (row.median or 0.0) if row.is_finite else 0.0
    order[len(rows) - 1] = (-row.step, not row.is_finite, value, number)
  best = min(order, key=lambda i: order[i])
  first = next(member for member in plan.members if member.number == alive[0][best])
  return Table(
    plan.sweep.metric,
    plan.sweep.maximize,
    plan.varied,
    interval([0.0] * len(plan.sweep.seeds))[2],
    [rows[i] for i in sorted(order, key=lambda i: order[i])],
    {
      member.name: failure
      for member in plan.members
      if (failure := states[member.name].failure) is not None
    },
    list(first.overrides[:-1]) if rows[best].is_finite else [],
    plan.base,
  )


def _row(plan: Plan, states: schedule.States, members: Sequence[Member], rung: int) -> Row:
  """A setting whose runs are to train up to a rung."""
  going = [member for member in members if states[member.name].failure is None]
  reached = rung
  while reached > 0 and any(
    states[m.name].value_at(schedule.target(plan, m, reached)) is None for m in going
  ):
    reached -= 1
  step = schedule.target(plan, members[0], reached)
  values = {m.seed: states[m.name].compared_at(step, plan.sweep.maximize) for m in members}
  there = [value for value in values.values() if value is not None]
  low, high, coverage = interval(there) if there else (None, None, 0.0)
  median = statistics.median(there) if there else None
  notes = [] if rung == len(plan.rungs) else [ENDED]
  wanted = schedule.target(plan, members[0], rung)
  if left := sum(states[m.name].value_at(wanted) is None for m in going):
    notes = [f"{left} {WAITING}"]
  kinds = [failure.kind for m in members if (failure := states[m.name].failure)]
  notes += [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
  if there and len(there) < len(members) > 1:
    notes.append(f"probability {coverage:.0%}")
  at_end = reached == len(plan.rungs)
  return Row(
    members[0].setting, step, values, median, low, high, coverage, at_end, ", ".join(notes)
  )


def lines(table: Table) -> list[str]:
  """The table as text."""
  head = (*table.names.values(), "step", "seeds", table.metric, "interval", "")
  cells = [
    (
      *(str(row.setting.get(key, "")) for key in table.names),
      row.step,
      sum(value is not None for value in row.values.values()),
      "" if row.median is None else _value(row.median),
      "" if row.low is None or row.high is None else f"[{_value(row.low)}, {_value(row.high)}]",
      row.note,
    )
    for row in table.rows
  ]
  out = text_table.lines(head, cells, left=len(table.names), last_left=True)
  seeds = max(len(row.values) for row in table.rows)
  if seeds > 1:
    out.append(
      f"{table.metric}: median over seeds; its interval holds the median of all seeds with "
      f"probability {table.coverage:.0%}"
    )
  else:
    out.append(f"{table.metric}: of one seed, so there is no interval; add seeds=(0, 1, 2)")
  if table.flags:
    command = shlex.join(["jaxgpt", "train", f"--config={table.base}", *table.flags])
    out.append(f"best: {command} --workdir=RUN")
  return out


def _value(value: float) -> str:
  """A metric as text. Runs that diverged, and metrics that are no number, have no finite one."""
  return f"{value:.4f}" if math.isfinite(value) else "not finite"


def to_json(table: Table) -> dict[str, Any]:
  """The table as plain JSON."""
  return table._asdict() | {
    "complete": table.is_complete,
    "rows": [
      row._asdict() | {"values": {str(k): v for k, v in row.values.items()}} for row in table.rows
    ],
    "failures": {name: failure._asdict() for name, failure in table.failures.items()},
  }
