"""`jaxgpt data nearest`: finds the documents that share most with a text."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option
from jaxgpt.errors import UserError, printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestOptions:
  path: str = option(positional=True, metavar="DIR", help="prepared folder")
  text: str | None = option(None, unset="--file", help="the text, such as one that a model wrote")
  file: str | None = option(None, metavar="FILE", unset="--text", help="file with the text")
  split: str = option("train", choices=("train", "validation", "test"), help="split to search")
  size: int = integer(8, least=1, help="tokens of an n-gram")
  top: int = integer(5, least=1, help="documents to print")
  chars: int = integer(200, help="characters of each shared passage to print; 0: all")

  def __post_init__(self) -> None:
    if (self.text is None) == (self.file is None):
      raise UserError("give the text with --text=TEXT or with --file=FILE, and not with both")


def run(args: NearestOptions) -> None:
  """Prints the documents and the longest passage that each shares with the text."""
  from jaxgpt.commands.actions.interpret import nearest_documents

  text = args.text if args.text is not None else nearest_documents.read(args.file or "")
  for line in nearest_documents.lines(args.path, args.split, text, args.size, args.top, args.chars):
    print(printable(line, keep="\t"))


COMMAND = Command(
  "data nearest",
  "find the documents of a prepared folder that share most with a text",
  NearestOptions,
  run,
)
