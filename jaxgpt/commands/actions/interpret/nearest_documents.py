"""Lines of `jaxgpt data nearest`."""

from collections.abc import Iterator

import numpy as np
from etils import epath

from jaxgpt.analysis.interpret import nearest
from jaxgpt.data import source
from jaxgpt.errors import UserError, first_line
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib


def read(path: str) -> str:
  """The text of a file.

  Raises:
    UserError: It can't be read as UTF-8.
  """
  try:
    return epath.Path(path).read_text()
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f"--file={path}: can't be read ({first_line(e)}); name a text file") from e


def lines(
  folder: epath.PathLike, split: str, text: str, size: int, top: int, chars: int
) -> Iterator[str]:
  """Describes the documents of a prepared folder that are nearest to a text.

  Args:
    folder: The prepared folder.
    split: Split to search.
    text: The text.
    size: Tokens of an n-gram.
    top: Number of documents.
    chars: Characters of each passage to show. 0: all.

  Raises:
    UserError: There is no such split, or the text is too short.
  """
  documents = source.open_split(folder, split)
  tokenizer = tokenizer_lib.load(epath.Path(folder) / "tokenizer")
  ids = np.asarray(tokenizer.encode(text))
  if len(ids) < size:
    raise UserError(
      f"--size={size}: the text has {len(ids)} tokens; give a longer one, or a smaller --size"
    )
  found = nearest.search(documents, ids, size, top)
  yield (
    f"{found.covered:,} of {found.grams:,} different {size}-grams of the text are in the {split} "
    f"split of {folder} ({documents.num_documents:,} documents, {found.tokens:,} tokens); "
    f"{found.documents:,} documents have one"
  )
  names = documents.source_names([near.doc for near in found.nearest])
  for near, name in zip(found.nearest, names, strict=True):
    yield (
      f"{name} (document {near.doc}): {near.shared:,} shared, at most {near.length} tokens in a "
      f"row, from token {near.text_start} of the text and {near.doc_start} of the document"
    )
    passage = tokenizer.decode(ids[near.text_start : near.text_start + near.length])
    if chars and len(passage) > chars:
      passage = f"{passage[:chars]}… ({len(passage) - chars:,} more characters)"
    yield from (f"    | {line}" for line in passage.split("\n"))
