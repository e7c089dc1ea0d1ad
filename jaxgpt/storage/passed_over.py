"""The account of files and folders that a listing leaves out."""

from typing import Any

from jaxgpt.errors import UserError


class PassedOver:
  """The account of files and folders below the given paths that are not read.

  Attributes:
    counts: {reason: files, or folders with all that is in them}. The reasons: 'hidden', 'excluded',
      'prepared data', 'pipe or device', 'found twice', 'no suffix', 'suffix .pdf'.
    examples: {reason: names}, at most `limit` for each.
    renamed: {given path: source of its first file}, for paths whose own name was taken.
    unused: Patterns of `exclude` that matched nothing in any listing. None: nothing was listed.
    limit: Examples to keep for each reason.
  """

  def __init__(self, limit: int = 3):
    self.counts: dict[str, int] = {}
    self.examples: dict[str, list[str]] = {}
    self.renamed: dict[str, str] = {}
    self.unused: set[str] | None = None
    self.limit = limit

  def add(self, reason: str, name: str) -> None:
    """Counts one file or folder."""
    self.counts[reason] = self.counts.get(reason, 0) + 1
    kept = self.examples.setdefault(reason, [])
    if len(kept) < self.limit:
      kept.append(name)

  def check_exclude(self) -> None:
    """Checks that each pattern of `exclude` matched a file or folder.

    Raises:
      UserError: One did not.
    """
    if self.unused:
      raise UserError(
        f"exclude={min(self.unused)!r} matches no file or folder; correct the pattern or leave it "
        "out"
      )

  def merge(self, other: "PassedOver") -> None:
    """Adds another account."""
    for reason, names in other.examples.items():
      for number in range(other.counts[reason]):
        self.add(reason, names[min(number, len(names) - 1)])
    self.renamed |= other.renamed

  def to_json(self) -> dict[str, Any]:
    """{reason: {'count': number, 'examples': names}}, the most frequent reason first."""
    return {
      reason: {"count": self.counts[reason], "examples": self.examples[reason]}
      for reason in sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))
    }

  def __str__(self) -> str:
    """'502 with suffix .pdf, such as a.pdf; 1 hidden, such as .git', or ''."""
    return "; ".join(
      f"{entry['count']:,} {reason.replace('suffix .', 'with suffix .')}, such as "
      f"{entry['examples'][0]}"
      for reason, entry in self.to_json().items()
    )
