"""A terminal for standard error, and the text that was drawn on it."""

import io
import re


class Terminal(io.StringIO):
  """A stream that says that it is a terminal."""

  def isatty(self) -> bool:
    return True

  @property
  def text(self) -> str:
    """Everything that was drawn, without control sequences."""
    return plain(self.getvalue())


def plain(text: str) -> str:
  """A text without control sequences."""
  return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
