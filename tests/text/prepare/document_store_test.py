"""Documents come back as they were stored, a long one in a block of its own."""

import numpy as np

from jaxgpt.text.prepare import document_store, splits
from jaxgpt.text.readers.documents import Document


def store(folder, documents, split=""):
  with document_store.Writer(folder, "salt", split) as writer:
    for document in documents:
      assert writer.add(document) == len(document.text.encode())
  return document_store.Store(folder)


def test_documents_come_back_in_blocks(tmp_path):
  long = "é" * 700_000
  texts = ["a", "bb", long, "c", "d" * 200_000, "e" * 200_000, "f"]
  documents = [Document(f"x:{i}", text, id=str(i)) for i, text in enumerate(texts)]
  found = store(tmp_path, documents)
  assert list(found) == documents
  blocks = [(first, [d.source for d in block]) for first, block in found.blocks()]
  assert blocks == [
    (0, ["x:0", "x:1"]),
    (2, ["x:2"]),
    (3, ["x:3", "x:4", "x:5"]),
    (6, ["x:6"]),
  ]
  assert list(found.take([1, 2, 6])) == [documents[i] for i in (1, 2, 6)]
  assert found.index["bytes"].tolist() == [len(text.encode()) for text in texts]


def test_a_group_chooses_the_split_and_the_text_identifies_the_document(tmp_path):
  documents = [Document("x", text, group=group) for text, group in zip("aabb", "1213")]
  index = store(tmp_path, documents).index
  by_text = index["digest"][:, 0].tolist()
  assert by_text[0] == by_text[1] != by_text[2] == by_text[3]
  keys = index["key"].tolist()
  assert keys[0] == keys[2] and len(set(keys)) == 3


def test_a_store_of_one_split(tmp_path):
  found = store(tmp_path, [Document("x", str(i)) for i in range(50)], "test")
  assert found.splits(splits.Shares(0.5, 0.0)).tolist() == [2] * 50
  (tmp_path / "b").mkdir()
  by_hash = store(tmp_path / "b", [Document("x", str(i)) for i in range(50)])
  assert set(by_hash.splits(splits.Shares(0.5, 0.0)).tolist()) == {0, 1}
  assert not np.any(by_hash.splits(splits.Shares(0.0, 0.0)))
