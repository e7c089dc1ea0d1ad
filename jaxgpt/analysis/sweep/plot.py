"""The plot of a sweep: one SVG file that loads nothing.

The metric against one key, a line for each combination of the others. Points are medians, bars
their intervals. Settings that ended early or have no value are left out, and counted.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgpt.analysis.report.tags import Html, number, tag
from jaxgpt.analysis.sweep.table import Row, Table
from jaxgpt.errors import UserError

_SIZE = (720, 440)
_BOX = (70, 40, 500, 380)  # left, top, right, bottom of the axes
_COLORS = ("#3553c4", "#c4353b", "#2e8b57", "#b8860b", "#7b3fa0", "#008b9a", "#d2691e", "#555555")
_STYLE = (
  "text{font:12px sans-serif;fill:#222}.grid{stroke:#ddd}.axis{stroke:#222;fill:none}"
  ".line{fill:none;stroke-width:2}"
)


class Axis(NamedTuple):
  """A scale from values to places.

  Attributes:
    low, high: Its ends, as logarithms if `log`.
    log: Whether it is logarithmic.
    first, last: Places of its ends.
    ticks: Values to mark.
  """

  low: float
  high: float
  log: bool
  first: float
  last: float
  ticks: Sequence[float]

  def at(self, value: float) -> float:
    """The place of a value."""
    x = math.log(value) if self.log else value
    return self.first + (x - self.low) / (self.high - self.low) * (self.last - self.first)


def axis_key(table: Table, wanted: str = "") -> str:
  """The key of the horizontal axis.

  Args:
    table: The sweep's table.
    wanted: The key that a user asks for. '': the one with the most values.

  Raises:
    UserError: The key has no numbers, or no key has.
  """
  values = {key: _numbers(table.rows, key) for key in table.names}
  if wanted:
    found = [key for key, name in table.names.items() if wanted in (key, name)]
    if not found or not values[found[0]]:
      raise UserError(
        f"--x={wanted}: not a key of this sweep with numbers; choose one of "
        f"{', '.join(key for key in values if values[key]) or 'none'}"
      )
    return found[0]
  if not any(values.values()):
    raise UserError("no key of this sweep has numbers to plot against")
  return max(values, key=lambda key: len(values[key]))


def _numbers(rows: Sequence[Row], key: str) -> set[float]:
  """The values of a key, empty unless all are numbers."""
  found = [row.setting.get(key) for row in rows]
  if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in found):
    return set()
  return {float(v) for v in found if isinstance(v, int | float)}


def svg(table: Table, key: str) -> str:
  """The plot as an SVG document.

  Args:
    table: The sweep's table.
    key: The key of the horizontal axis, from `axis_key`.
  """
  shown = [row for row in table.rows if row.at_end and row.is_finite]
  groups: dict[str, list[Row]] = {}
  for row in shown:
    rest = ", ".join(f"{name}={row.setting.get(k)}" for k, name in table.names.items() if k != key)
    groups.setdefault(rest, []).append(row)
  left, top, right, bottom = _BOX
  parts: list[Html] = []
  if shown:
    xs = sorted({float(row.setting[key]) for row in shown})
    x = _axis(xs, left, right, xs)
    ends = [v for row in shown for v in (row.low, row.high, row.median) if v is not None]
    y = _axis([v for v in ends if math.isfinite(v)], bottom, top)
    parts += _frame(x, y)
    for i, (name, rows) in enumerate(groups.items()):
      parts += _series(rows, key, x, y, _COLORS[i % len(_COLORS)])
      parts += _legend(i, name, _COLORS[i % len(_COLORS)])
  left_out = len(table.rows) - len(shown)
  note = f"; {left_out} settings without a value at the end are left out" if left_out else ""
  title = f"{table.metric} of the validation split: medians over seeds with intervals{note}"
  parts += [
    tag("text", title, x=left, y=22),
    tag("text", table.names[key], x=(left + right) / 2, y=bottom + 42, text_anchor="middle"),
  ]
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_SIZE[0]} {_SIZE[1]}" '
    f'width="{_SIZE[0]}" height="{_SIZE[1]}" role="img" aria-label="{tag("title", title)[7:-8]}">'
    f"<style>{_STYLE}</style>"
    f'<rect width="{_SIZE[0]}" height="{_SIZE[1]}" fill="white"/>{"".join(parts)}</svg>\n'
  )


def _axis(
  values: Sequence[float], first: float, last: float, ticks: Sequence[float] | None = None
) -> Axis:
  """An axis that holds some values. It is logarithmic if its ticks are given and far apart."""
  low, high = min(values), max(values)
  log = ticks is not None and low > 0 and high / low >= 4
  if log:
    low, high = math.log(low), math.log(high)
  room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
  low, high = low - room, high + room
  return Axis(low, high, log, first, last, ticks if ticks is not None else _round(low, high))


def _round(low: float, high: float) -> list[float]:
  """Round numbers between two."""
  size = 10 ** math.floor(math.log10((high - low) / 4))
  step = next(size * f for f in (1, 2, 5, 10) if (high - low) / (size * f) <= 6)
  return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _frame(x: Axis, y: Axis) -> list[Html]:
  left, top, right, bottom = _BOX
  out: list[Html] = []
  for value in y.ticks:
    at = round(y.at(value), 1)
    out.append(tag("path", d=f"M{left} {at}H{right}", class_="grid"))
    out.append(tag("text", number(value, 4), x=left - 8, y=at + 4, text_anchor="end"))
  before = -math.inf
  for value in x.ticks:
    at = round(x.at(value), 1)
    out.append(tag("path", d=f"M{at} {bottom}V{bottom + 5}", class_="axis"))
    if at - before >= 45:  # room for a number
      out.append(tag("text", f"{value:g}", x=at, y=bottom + 20, text_anchor="middle"))
      before = at
  out.append(tag("path", d=f"M{left} {top}V{bottom}H{right}", class_="axis"))
  return out


def _series(rows: Sequence[Row], key: str, x: Axis, y: Axis, color: str) -> list[Html]:
  """The line of one group of settings, with a bar at each point."""
  ordered = sorted(rows, key=lambda row: float(row.setting[key]))
  points: list[tuple[float, float]] = []
  out: list[Html] = []
  for row in ordered:
    median: Any = row.median
    at = round(x.at(float(row.setting[key])), 1)
    points.append((at, round(y.at(median), 1)))
    if row.low is not None and row.high is not None and row.low < row.high:
      # The bar of a setting some of whose runs diverged ends with the axis.
      low, high = (round(y.at(min(max(v, y.low), y.high)), 1) for v in (row.low, row.high))
      bar = f"M{at} {low}V{high}M{at - 4} {low}h8M{at - 4} {high}h8"
      out.append(tag("path", d=bar, class_="line", stroke=color))
  path = "M" + "L".join(f"{px} {py}" for px, py in points)
  out.append(tag("path", d=path, class_="line", stroke=color))
  out += [tag("circle", cx=px, cy=py, r=4, fill=color) for px, py in points]
  return out


def _legend(i: int, name: str, color: str) -> list[Html]:
  at = _BOX[1] + 12 + 20 * i
  return [
    tag("rect", x=_BOX[2] + 16, y=at - 10, width=12, height=12, fill=color),
    tag("text", name or "all settings", x=_BOX[2] + 34, y=at),
  ]
