"""Random access to stored documents, and what a damaged folder says."""

import json
import pickle
import threading

import numpy as np
import pytest

from jaxgpt.data import source
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import shards
from jaxgpt.text.readers import documents as documents_lib
from jaxgpt.text.tokenizers import examples, tokenizer


def write(folder, documents, shard_tokens=1 << 20):
  """A prepared folder of documents given as arrays of ids; returns what is stored."""
  folder.mkdir()
  t = tokenizer.ByteTokenizer()
  writer = shards.SplitWriter(folder, "train", t, shard_tokens)
  for i, ids in enumerate(documents):
    writer.add(examples.Encoded(np.concatenate(([1], ids, [2]))), 10 * i, f"file\n{i}.txt")
  empty = shards.SplitWriter(folder, "test", t, shard_tokens).finish()
  shards.write_manifest(
    folder,
    shards.make_manifest(t, {"train": writer.finish(), "test": empty}, documents_lib.Dropped()),
  )
  return [np.concatenate(([1], ids, [2])) for ids in documents]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  rng = np.random.default_rng(0)
  sizes = [1, 40, 150_000, 7, shards.RECORD_TOKENS - 2, shards.RECORD_TOKENS - 1, 90, 3]
  path = tmp_path_factory.mktemp("source") / "data"
  stored = write(path, [rng.integers(3, 259, n) for n in sizes], shard_tokens=100)
  return path, stored


def test_any_piece_of_any_document(folder):
  path, stored = folder
  s = source.open_split(path, "train")
  assert len(s.manifest["splits"]["train"]["shards"]) > 3
  assert s.num_documents == len(stored) and s.bytes == 10 * sum(range(len(stored)))
  np.testing.assert_array_equal(s.lengths, [len(d) - 1 for d in stored])
  edges = (0, 1, shards.RECORD_TOKENS - 1, shards.RECORD_TOKENS, 2 * shards.RECORD_TOKENS)
  pieces = [
    (i, start, length)
    for i, d in enumerate(stored)
    for start in edges
    for length in (0, 1, 2, 5, shards.RECORD_TOKENS + 1, len(d) - start)
    if start < len(d) and start + length <= len(d)
  ]
  for (i, start, length), got in zip(pieces, s.read_many(*zip(*pieces, strict=True)), strict=True):
    np.testing.assert_array_equal(got, stored[i][start : start + length])
    np.testing.assert_array_equal(s.read(i, start, length), got)
  assert s.read_many([], [], []) == []


def test_only_the_records_of_a_piece_are_read(folder, monkeypatch):
  s = source.open_split(folder[0], "train")
  size, read, keys = shards.RECORD_TOKENS, s._records, []
  monkeypatch.setattr(s, "_records", lambda k: keys.extend(k.tolist()) or read(k))
  s.read_many([2, 2, 2, 2], [0, size - 1, size - 1, 2 * size], [size, 1, 2, 9])
  assert keys == [2, 2, 2, 3, 4], "document 2 has the records 2, 3 and 4"


@pytest.mark.parametrize("piece", [(0, 0, 4), (8, 0, 1), (-1, 0, 1), (1, -1, 2), (1, 41, 2)])
def test_a_piece_outside_its_document(folder, piece):
  with pytest.raises(IndexError):
    source.open_split(folder[0], "train").read(*piece)


def test_names(folder):
  s = source.open_split(folder[0], "train")
  assert [s.source_name(i) for i in (0, 5, 7)] == ["file\n0.txt", "file\n5.txt", "file\n7.txt"]


def test_threads_and_pickled_copies_read_the_same(folder):
  path, stored = folder
  s = source.open_split(path, "train")
  s.read(0, 0, 1)
  copies, wrong = [s, pickle.loads(pickle.dumps(s))], []

  def work(seed):
    rng = np.random.default_rng(seed)
    for _ in range(100):
      docs = rng.integers(0, len(stored), 8)
      starts = rng.integers(0, s.lengths[docs] + 1)
      lengths = np.minimum(s.lengths[docs] + 1 - starts, 50)
      for d, at, n, got in zip(
        docs, starts, lengths, copies[seed % 2].read_many(docs, starts, lengths), strict=True
      ):
        if not np.array_equal(got, stored[d][at : at + n]):
          wrong.append((d, at, n))

  threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert not wrong


def test_a_split_that_is_not_there_or_empty(folder):
  with pytest.raises(UserError, match="'dev' is not in"):
    source.open_split(folder[0], "dev")
  with pytest.raises(UserError, match=r"test split of .* is empty.*larger --test share"):
    source.open_split(folder[0], "test")


def damage_shard(path):
  next(path.glob("*.arrayrecord")).write_bytes(b"short")


def damage_format(path):
  manifest = json.loads((path / "manifest.json").read_text())
  (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


def damage_content(path):
  text = (path / "manifest.json").read_text()
  (path / "manifest.json").write_text(text.replace('"bytes": 10', '"bytes": 11'))


@pytest.mark.parametrize(
  "damage, message",
  [
    (damage_shard, r"train-0.*\.arrayrecord has 5 bytes instead of"),
    (lambda path: (path / "train-00001-of-00002.arrayrecord").unlink(), "00001.* is missing"),
    (lambda path: (path / "train.tokens.npy").unlink(), "tokens.npy is missing"),
    (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
    (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    (damage_format, "format 99"),
    (damage_content, "does not match its digest"),
  ],
)
def test_a_damaged_folder_names_the_file_and_the_way_out(tmp_path, damage, message):
  write(tmp_path / "data", [np.arange(3, 9), np.arange(3, 6)], shard_tokens=1)
  damage(tmp_path / "data")
  with pytest.raises(UserError, match=message) as e:
    source.open_split(tmp_path / "data", "train")
  assert "run `jaxgpt data`" in str(e.value)


def test_a_token_without_a_row_in_the_embedding_is_an_error_that_names_the_document(folder):
  path, stored = folder
  s = source.open_split(path, "train")
  s.rows = 259
  s.read_many(range(len(stored)), [0] * len(stored), [2] * len(stored))
  s.rows = int(stored[1].max())  # one too few
  with pytest.raises(
    UserError, match=rf"(?s)document 1 .* uses token {s.rows}, .*vocab_size={s.rows}"
  ):
    s.read(1, 0, len(stored[1]))
