"""HTML from texts and numbers. Every text is escaped here, and nowhere else."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jaxgpt.errors import printable


class Html(str):
  """Text that is HTML already."""


def text(value: Any) -> Html:
  """A value as escaped text."""
  return value if isinstance(value, Html) else Html(html.escape(printable(str(value), keep="\n")))


def tag(name: str, *content: Any, **attributes: Any) -> Html:
  """An element.

  Example:
    >>> tag("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'

  Args:
    name: Its name.
    *content: Texts, which are escaped, and `Html`.
    **attributes: Attributes. `class_` is class, `data_x` is data-x. None and False: left out.
  """
  given = [
    f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
    for key, value in attributes.items()
    if value is not None and value is not False
  ]
  return Html(f"<{name}{''.join(given)}>{''.join(map(text, content))}</{name}>")


def join(parts: Iterable[Any]) -> Html:
  """Parts in a row."""
  return Html("".join(map(text, parts)))


def number(value: Any, digits: int = 5) -> str:
  """A number for people: '12,345', '0.01234', '1.2e-05'. '' for None, other values as text."""
  if value is None:
    return ""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if isinstance(value, int):
    return f"{value:,}"
  if not math.isfinite(value):
    return "not finite"
  if value == int(value) and abs(value) < 1e15:
    return f"{int(value):,}"
  if abs(value) >= 10_000:
    return f"{value:,.0f}"
  return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
  """A duration for people: '2 d 3 h', '4 min 10 s', '0.42 s'."""
  if seconds < 60:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
  units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
  left, out = round(seconds), list[str]()
  for unit, size in units:
    if (count := left // size) or out:
      out += [f"{count} {unit}"] if count else []
      left -= count * size
    if len(out) == 2:
      break
  return " ".join(out)


def table(
  caption: str,
  head: Sequence[str],
  rows: Iterable[Sequence[Any]],
  *,
  row_classes: Sequence[str] = (),
  hidden_caption: bool = False,
) -> Html:
  """A table that the page's script makes sortable.

  A column is aligned to the right if all its values are numbers. A cell is a value, or a pair
  (value to sort by, text or HTML to show).

  Args:
    caption: Its caption.
    head: Names of the columns.
    rows: Cells.
    row_classes: A class for each row.
    hidden_caption: The caption is for screen readers only.
  """
  rows = [[_cell(cell) for cell in row] for row in rows]
  numeric = [
    bool(values := [row[i][0] for row in rows if row[i][0] not in (None, "")])
    and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    for i in range(len(head))
  ]
  heads = [
    tag("th", name, scope="col", class_="num" if right else None)
    for name, right in zip(head, numeric)
  ]
  body = []
  for n, row in enumerate(rows):
    cells = [
      tag(
        "th" if i == 0 else "td",
        shown,
        scope="row" if i == 0 else None,
        class_="num" if numeric[i] else None,
        data_v=value if numeric[i] and value is not None else None,
      )
      for i, (value, shown) in enumerate(row)
    ]
    body.append(
      tag("tr", *cells, class_=row_classes[n] if row_classes and row_classes[n] else None)
    )
  inner = tag(
    "table",
    tag("caption", caption, class_="unseen" if hidden_caption else None),
    tag("thead", tag("tr", *heads)),
    tag("tbody", *body),
  )
  return tag("div", inner, class_="scroll", role="group", aria_label=caption, tabindex=0)


def _cell(cell: Any) -> tuple[Any, Any]:
  if isinstance(cell, tuple):
    return cell
  return cell, number(cell) if not isinstance(cell, Html) else cell
