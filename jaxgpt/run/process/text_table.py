"""Tables of plain text."""

from collections.abc import Sequence


def lines(
  head: Sequence[str],
  rows: Sequence[Sequence[object]],
  left: int = 1,
  last_left: bool = False,
) -> list[str]:
  """Lines of a table with aligned columns.

  Example:
    >>> text_table.lines(("step", "loss"), [(4, "2.31")])
    ['step  loss', '4     2.31']

  Args:
    head: Names of the columns.
    rows: Cells.
    left: First columns that are aligned to the left. The others are aligned to the right.
    last_left: Align the last column to the left as well.
  """
  texts = [[str(cell) for cell in row] for row in (head, *rows)]
  widths = [max(map(len, column)) for column in zip(*texts)]
  return [
    "  ".join(
      cell.ljust(width) if i < left or (last_left and i == len(row) - 1) else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in texts
  ]


def size(num_bytes: float) -> str:
  """Bytes in readable form: '3.2 GB'."""
  for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if num_bytes >= factor:
      return f"{num_bytes / factor:.1f} {unit}"
  return f"{num_bytes:.0f} B"
