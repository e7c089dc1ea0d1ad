"""Writing documents one by one, many at once and in pieces makes the same folder."""

import numpy as np
import pytest

from jaxgpt.text.prepare import shards
from jaxgpt.text.tokenizers import tokenizer
from jaxgpt.text.tokenizers.examples import Encoded

LENGTHS = (3, 2, shards.RECORD_TOKENS, 5, 2 * shards.RECORD_TOKENS + 7, 900, 4)
NAMES = [f"a.jsonl:{i}" if i % 2 else f"ü/{i}.txt" for i in range(len(LENGTHS))]


def written(folder, fill, shard_tokens):
  folder.mkdir()
  writer = shards.SplitWriter(folder, "train", tokenizer.ByteTokenizer(), shard_tokens)
  fill(writer)
  return writer.finish()


@pytest.mark.parametrize("shard_tokens", [1 << 27, 1000])
def test_texts_are_written_the_same_in_any_way(tmp_path, shard_tokens):
  rng = np.random.default_rng(0)
  documents = [rng.integers(0, 264, n).astype(np.int32) for n in LENGTHS]

  def one_by_one(writer):
    for ids, name in zip(documents, NAMES):
      writer.add(Encoded(ids), 7, name)

  def together(writer):
    stored = np.concatenate([np.zeros(5, np.int32), *documents])  # others are in the array too
    ends = 5 + np.cumsum(LENGTHS)
    starts = ends - LENGTHS
    for few in (slice(0, 2), slice(2, 2), slice(2, 4), slice(4, None)):
      count = len(starts[few])
      writer.add_texts(stored, starts[few], ends[few], np.full(count, 7), NAMES[few])

  def in_pieces(writer):
    for ids, name in zip(documents, NAMES):
      writer.add_long(np.array_split(ids, 3), 7, name)

  want = written(tmp_path / "a", one_by_one, shard_tokens)
  assert want["documents"] == len(LENGTHS) and want["tokens"] == sum(LENGTHS)
  assert written(tmp_path / "b", together, shard_tokens) == want
  assert written(tmp_path / "c", in_pieces, shard_tokens) == want
