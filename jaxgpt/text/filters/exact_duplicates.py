"""Exact duplicates: digests of texts and labels, and the documents whose digests are equal."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.text.readers.documents import Document
from jaxgpt.text.readers.fields import LABELS

_SORTED = 1 << 24  # digests to sort at once


def digest(document: Document, options: Mapping[str, Any] | None, by_fields: bool) -> bytes:
  """Bytes that duplicates share.

  Args:
    document: The document.
    options: Options of `--dedup=exact`, or None if exact duplicates are not requested.
    by_fields: Compare the fields of a labelled kind one by one, not their texts joined. So 'a b'
      and 'c' differ from 'a' and 'b c', and a user's turn from an assistant's.

  Returns:
    16 bytes of the text, zeros without `options`. With `by_fields` 8 bytes of the label follow.
  """

  def same(text: str) -> str:
    assert options is not None
    text = text.lower() if options["ignore_case"] else text
    return " ".join(text.split()) if options["ignore_space"] else text

  if not by_fields:
    return bytes(16) if options is None else _hash(same(document.text), 16)
  fields = dict(document.fields)
  label = _hash("".join(str(fields.pop(name)) for name in LABELS if name in fields), 8)
  if options is None:
    return bytes(16) + label
  return _hash(json.dumps(_each_text(fields, same), sort_keys=True), 16) + label


def _hash(text: str, size: int) -> bytes:
  return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
  """Plain JSON with each of its strings changed."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, dict):
    return {key: _each_text(item, change) for key, item in value.items()}
  return [_each_text(item, change) for item in value] if isinstance(value, list) else value


class Found(NamedTuple):
  """The result of `find`.

  Attributes:
    duplicates: int64 [R, 2], sorted: a document that equals an earlier one, and the first such
      document.
    conflicts: Texts with more than one label.
    example: Two documents with one of these texts, or [].
  """

  duplicates: np.ndarray
  conflicts: int
  example: list[int]


def find(digests: Sequence[np.ndarray], starts: np.ndarray) -> Found:
  """Finds the documents that equal an earlier one.

  Equal texts fall into the same residue class, so the classes are sorted one after the other.

  Args:
    digests: For each task uint64 [documents, columns], from `digest`: two of the text, and perhaps
      one of the label.
    starts: The first document of each task in the corpus, and the end.
  """
  classes = -(-int(starts[-1]) // _SORTED)
  found, conflicts, example = [np.zeros((0, 2), np.int64)], 0, list[int]()
  for residue in range(classes):
    chosen = [np.flatnonzero(d[:, 0] % np.uint64(classes) == residue) for d in digests]
    where = np.concatenate([c + start for c, start in zip(chosen, starts)])
    table = np.concatenate([d[c] for c, d in zip(chosen, digests)])
    order = np.lexsort((where, *table.T[::-1]))
    table, where = table[order], where[order]
    text, same = np.zeros(len(where), bool), np.zeros(len(where), bool)  # as the one before
    text[1:] = (table[1:, :2] == table[:-1, :2]).all(axis=1)
    same[1:] = (table[1:] == table[:-1]).all(axis=1)
    first = where[np.maximum.accumulate(np.where(same, 0, np.arange(len(where))))]
    found.append(np.column_stack((where[same], first[same])))
    other = np.flatnonzero(text & ~same)  # one text, two labels
    conflicts += len(np.unique(np.cumsum(~text)[other]))
    if len(other) and not example:
      example = sorted((int(first[other[0] - 1]), int(where[other[0]])))
  same_as = np.concatenate(found)
  return Found(same_as[np.argsort(same_as[:, 0])], conflicts, example)
