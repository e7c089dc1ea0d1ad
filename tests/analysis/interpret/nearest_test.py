"""Nearest documents, against a search by loops, and on documents of which a text was made."""

import numpy as np
import pytest

from jaxgpt.analysis.interpret import nearest
from jaxgpt.commands.data import nearest as command
from jaxgpt.data import source
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import prepare


class Docs:
  """Documents in memory, with what `search` reads of a split."""

  def __init__(self, docs):
    self.docs = docs
    self.lengths = np.array([len(d) - 1 for d in docs])

  def read(self, doc, start, length):
    return self.docs[doc][start : start + length]


def by_definition(docs, text, size, top):
  grams = lambda ids: {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}
  wanted = grams(text.tolist())
  out = []
  for number, doc in enumerate(docs):
    shared = wanted & grams(doc.tolist())
    if not shared:
      continue
    longest = 0
    for i in range(len(text)):
      for j in range(len(doc)):
        n = 0
        while i + n < len(text) and j + n < len(doc) and text[i + n] == doc[j + n]:
          n += 1
        longest = max(longest, n)
    out.append((-len(shared), -longest, number))
  return sorted(out)[:top], len(out)


@pytest.mark.parametrize("block", [16, 64, 1 << 20])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_search_equals_its_definition(size, block):
  rng = np.random.default_rng(size)
  docs = [rng.integers(0, 4, rng.integers(1, 60)).astype("uint16") for _ in range(40)]
  text = np.concatenate([docs[7][:20], rng.integers(0, 4, 9), docs[12][-15:]])
  found = nearest.search(Docs(docs), text, size, 6, block)
  expected, count = by_definition(docs, text, size, 6)
  assert [(-n.shared, -n.length, n.doc) for n in found.nearest] == expected
  assert found.documents == count and found.tokens == sum(map(len, docs))
  for n in found.nearest:
    np.testing.assert_array_equal(
      text[n.text_start : n.text_start + n.length],
      docs[n.doc][n.doc_start : n.doc_start + n.length],
    )


def test_a_hash_that_collides_is_no_hit(monkeypatch):
  monkeypatch.setattr(nearest, "_hashes", lambda w: np.zeros(len(w), np.uint64))
  docs = [np.array([1, 2, 3]), np.array([7, 8, 9])]
  found = nearest.search(Docs(docs), np.array([1, 2, 3]), 3, 2)
  assert [n.doc for n in found.nearest] == [0]


def test_the_source_of_a_text_is_found_by_document(tmp_path, capsys):
  (tmp_path / "texts").mkdir()
  for i in range(12):
    words = " ".join(f"word{i}x{j}" for j in range(80))
    (tmp_path / "texts" / f"{i:02}.txt").write_text(words)
  prepare.prepare(
    [tmp_path / "texts"], tmp_path / "data", tokenizer="bytes", validation=0, test=0, cut_chars=0
  )
  text = "said: word7x30 word7x31 word7x32 and word3x5 word3"
  data = tmp_path / "data"
  command.run(command.NearestOptions(path=str(data), text=text, size=8, top=2))
  lines = capsys.readouterr().out.splitlines()
  assert "texts/07.txt" in lines[1] and "texts/03.txt" in lines[3]
  assert lines[2] == "    |  word7x30 word7x31 word7x32 "
  split = source.open_split(data, "train")
  assert f"{split.num_documents} documents, {(split.lengths + 1).sum():,} tokens" in lines[0]
  with pytest.raises(UserError, match="--size=90: the text has 50 tokens"):
    command.run(command.NearestOptions(path=str(data), text=text, size=90))
  with pytest.raises(UserError, match="--text=TEXT or with --file=FILE, and not with both"):
    command.NearestOptions(path=str(data))
