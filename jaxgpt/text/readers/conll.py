"""Reader of tagged words in the form of the CoNLL shared tasks.

-DOCSTART- -X- O O          a word per line, its columns separated by spaces or tabs:
                            the word comes first, its tag last
EU NNP I-NP I-ORG
rejects VBZ I-VP O          a blank line ends a sentence, which is one record
"""

import itertools
import re
from collections.abc import Iterator

from jaxgpt.storage import files
from jaxgpt.text.readers import encodings, records

_BOUNDARY = "-DOCSTART-"  # stands for the start of a document
_SPACES = re.compile("[ \t]+")  # a no-break space is part of a word, such as '10\xa0000'


def read(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Yields a record {words, tags} per sentence, named after the line of its first word."""
  words, tags, first = list[str](), list[str](), 0
  fault: records.Item | None = None
  with encodings.open_text(file, want) as stream:
    # A last blank line ends a sentence at the end of the file.
    for number, line in itertools.chain(records.lines(file, stream, want), [(0, b"")]):
      where = f"{file.source}:{number}"
      found: records.Item = (
        records.too_long(where, want)
        if line is None
        else records.decoded(where, line, "utf-8-sig" if number == 1 else "utf-8")
      )
      columns = []
      if isinstance(found, records.Record):
        line_text = str(found.values).strip(" \t\r\n")
        columns = _SPACES.split(line_text) if line_text else []
      else:
        fault = fault or found
      if columns and columns[0] != _BOUNDARY:
        if len(columns) == 1 and fault is None:
          why = f"{columns[0][:40]!r} has no tag: a line has a word and its tag"
          fault = records.Fault("missing field", where, why)
        first = first or number
        words.append(columns[0])
        tags.append(columns[-1])
      elif isinstance(found, records.Record):
        if fault is not None:
          yield fault
        elif words:
          yield records.Record(f"{file.source}:{first}", {"words": words, "tags": tags})
        words, tags, first, fault = [], [], 0, None
