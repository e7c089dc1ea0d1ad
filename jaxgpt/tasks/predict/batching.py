"""Batches of a chunk of rows, by length: no row's result depends on the devices there are.

A matmul may round differently in another shape, so a row's result depends, in its last bits, on the
batch that it is in. The batches of a chunk are therefore a function of the chunk alone:

    rows by length     2 3 3 5 | 7 8 9 9 | 11 30        batches of 4 rows, each for one device
    padded to          16        16        32           and to a length from a short list
    on two devices     [batch 1, batch 2]  [batch 3, empty]

A step runs as many batches of one length as the mesh has shards of rows.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

_SHORTEST = 16


class Step(NamedTuple):
  """The rows that run together.

  Attributes:
    length: Tokens that each row is padded to.
    batches: For each shard of rows, the indices of its rows. The last may be empty.
  """

  length: int
  batches: list[list[int]]


def padded(length: int, longest: int) -> int:
  """The length that a row is padded to: 16, 24, 32, 48, 64, 96, … or `longest`.

  Few lengths mean few compiled programs. Padding is at most half of a row of more than 16 tokens.
  """
  size = _SHORTEST
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return min(size, longest)


def steps(lengths: Sequence[int], rows: int, shards: int, longest: int) -> Iterator[Step]:
  """Yields the steps that run the rows of a chunk.

  Args:
    lengths: Tokens of each row.
    rows: Rows of a batch.
    shards: Batches of a step.
    longest: Largest length, to which longer rows have been cut.
  """
  order = sorted(range(len(lengths)), key=lambda i: lengths[i])  # stable
  by_length: dict[int, list[list[int]]] = {}
  for start in range(0, len(order), rows):
    batch = order[start : start + rows]
    by_length.setdefault(padded(lengths[batch[-1]], longest), []).append(batch)
  for length, batches in by_length.items():
    for start in range(0, len(batches), shards):
      together = batches[start : start + shards]
      yield Step(length, together + [[] for _ in range(shards - len(together))])
