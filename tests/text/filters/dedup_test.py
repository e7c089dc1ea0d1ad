"""Duplicates planted in real text are found, the first one stays, and nothing else goes."""

import importlib.util
import pathlib
import pickle
import sys
import tempfile

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.filters import dedup, exact_duplicates
from jaxgpt.text.readers import documents as documents_lib

_spec = importlib.util.spec_from_file_location(
  "dedup_benchmark", pathlib.Path(__file__).parents[2] / "benchmarks" / "dedup.py"
)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

TEXTS = [
  f"Text {i} of a few that begin with the number {i} and go on with {i * i} words." * 2
  for i in range(40)
]


def documents(texts):
  return [documents_lib.Document(f"s:{i}", text) for i, text in enumerate(texts)]


def removed(texts, given, folder, tasks=3):
  return benchmark.remove(documents(texts), dedup.make(given), folder, tasks=tasks)


def files(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
  }


@pytest.fixture(scope="module")
def natural():
  """Real documents of this machine, and those of them that have no duplicate before them."""
  pytest.importorskip("datatrove")
  found = benchmark.corpus(500)
  with tempfile.TemporaryDirectory() as folder:
    gone = benchmark.remove(found, dedup.make(["exact", "near"]), folder)
  return found, gone, [d for i, d in enumerate(found) if i not in gone]


@pytest.mark.slow
def test_the_bar_on_real_documents(natural, tmp_path):
  """The benchmark, smaller: 99 % of exact copies, 90 % of changed ones, under 0.5 % of others."""
  found, gone, base = natural
  like = [benchmark.similarity(found[a].text, found[b].text) for a, b in gone.items()]
  assert np.mean(np.array(like) < 0.5) < 0.02, "what goes is like what stays"
  planted = benchmark.plant(base, 0.2, seed=1)
  share, false = benchmark.found(
    planted, benchmark.remove([d for d, *_ in planted], dedup.make(["exact", "near"]), tmp_path)
  )
  assert share["exact"] >= 0.99 and share["changed"] >= 0.90 and false < 0.005


def test_the_first_exact_duplicate_stays(tmp_path):
  texts = TEXTS[:10] + [TEXTS[3], " " + TEXTS[4].replace(" ", "\n"), TEXTS[5].upper(), TEXTS[3]]
  assert removed(texts, ["exact"], tmp_path / "a") == {10: 3, 11: 4, 13: 3}
  assert removed(texts, ["exact:ignore_space=false,ignore_case=true"], tmp_path / "b") == {
    10: 3,
    12: 5,
    13: 3,
  }


def test_digests_sorted_in_parts_find_the_same(tmp_path, monkeypatch):
  texts = TEXTS + TEXTS[10:20] + TEXTS[5:15]
  whole = removed(texts, ["exact"], tmp_path / "a")
  monkeypatch.setattr(exact_duplicates, "_SORTED", 7)
  assert removed(texts, ["exact"], tmp_path / "b") == whole
  assert (
    len(whole)
    == 20
    == sum(len(dedup.removals(rank, tmp_path / "b" / "cluster")) for rank in range(3))
  )


def test_an_exact_duplicate_is_no_near_duplicate_too(natural, tmp_path):
  text, other = (d.text for d in natural[2][:2])
  removed([text, other, text, text + " And more.", text], ["exact", "near"], tmp_path, tasks=1)
  assert dedup.removals(0, tmp_path / "cluster").tolist() == [
    [2, 0, 0, 0],
    [3, 1, 0, 0],
    [4, 0, 0, 0],
  ]


@pytest.mark.parametrize("given", [["near"], ["exact", "near"]])
def test_how_the_corpus_is_cut_into_tasks_changes_nothing(natural, tmp_path, given):
  base = [d.text for d in natural[2]]
  texts = base[:50] + [t + " And more." for t in base[30:60]] + base[20:40]
  results = [removed(texts, given, tmp_path / str(n), tasks=n) for n in (1, 3, 7)]
  assert results[0] == results[1] == results[2]
  assert len(results[0]) >= 38
  assert all(first < document for document, first in results[0].items())


def test_a_chain_of_likenesses_does_not_remove_what_is_not_like_what_stays(tmp_path):
  """Each is like its neighbour, the last is not like the first: a connected group would go."""
  pytest.importorskip("datatrove")
  words = [f"w{i}" for i in range(400)]
  texts = [" ".join(words[30 * i : 30 * i + 200]) for i in range(6)]
  likeness = [benchmark.similarity(texts[0], t) for t in texts]
  assert likeness[1] > 0.7 > 0.6 > likeness[2]
  gone = removed(texts, ["near"], tmp_path)
  assert 0 not in gone and gone
  assert all(benchmark.similarity(texts[a], texts[b]) > 0.6 for a, b in gone.items())
  stay = [t for i, t in enumerate(texts) if i not in gone]
  assert all(benchmark.similarity(a, b) < 0.75 for a in stay for b in stay if a is not b)


def test_shared_buckets_are_not_enough(natural, tmp_path):
  """With one hash a bucket all share buckets; only what is like goes."""
  base = [d.text for d in natural[2][:60]]
  assert removed(base + [base[7]], ["near:hashes=1,buckets=100,threshold=0.95"], tmp_path) == {
    60: 7
  }


def test_a_long_text_is_hashed_in_parts(tmp_path, monkeypatch):
  pytest.importorskip("datatrove")
  texts = [" ".join(TEXTS), *TEXTS[:3]]
  config = dedup.make(["near"])
  for name, size in (("a", dedup._SHINGLES), ("b", 5)):
    monkeypatch.setattr(dedup, "_SHINGLES", size)
    (tmp_path / name).mkdir()
    dedup.signatures(documents(texts), 0, tmp_path / name, config)
  assert files(tmp_path / "a") == files(tmp_path / "b")


def test_stages_write_the_same_each_time(tmp_path):
  pytest.importorskip("datatrove")
  results = [removed(TEXTS + TEXTS[:9], ["exact", "near"], tmp_path / name) for name in "ab"]
  assert results[0] == results[1] and results[0]
  assert files(tmp_path / "a") == files(tmp_path / "b")


def test_kept_documents_and_the_account(natural, tmp_path):
  texts = [*TEXTS[:6], TEXTS[2], natural[2][0].text, TEXTS[4] + " one"]
  texts += [texts[7] + " And a little more."]
  config = dedup.make(["exact", "near:threshold=0.9"])
  benchmark.remove(documents(texts), config, tmp_path, tasks=1)
  dropped = documents_lib.Dropped()
  left = [d.source for d in dedup.kept(documents(texts), 0, tmp_path / "cluster", dropped)]
  assert dropped.counts["duplicate"] == 1
  assert len(left) + sum(dropped.counts.values()) == len(texts)
  assert "s:6: like document 2 of input group 0" in dropped.examples["duplicate"]
  assert "s:9: like document 7 of input group 0" in dropped.examples["near duplicate"]


def test_short_and_no_documents(tmp_path):
  pytest.importorskip("datatrove")
  assert removed(["a", "b", "a", "!", "a b", "a b"], ["exact", "near"], tmp_path / "a") == {
    2: 0,
    5: 4,
  }
  assert removed([], ["exact", "near"], tmp_path / "b") == {}


@pytest.mark.parametrize(
  "given, message",
  [
    (["exakt"], "did you mean 'exact'"),
    (["near:bucket=3"], "did you mean 'buckets'"),
    (["near:threshold=2"], "threshold=2.0"),
    (["near:hashes=0"], "hashes=0"),
    (["near:seed=-1"], "seed=-1"),
    (["near:seed=4294967296"], "seed=4294967296"),
  ],
)
def test_bad_specs_are_named(given, message):
  with pytest.raises(UserError, match=message):
    dedup.make(given)


def test_near_duplicates_without_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "datatrove.pipeline.dedup.minhash", None)
  with pytest.raises(UserError, match=r"pip install 'jaxgpt\[data\]'"):
    dedup.make(["near"])
  assert pickle.loads(pickle.dumps(dedup.make(["exact"]))) == dedup.make(["exact"])


def test_fields_are_compared_one_by_one_and_with_their_label():
  def digest(**fields):
    text = "\n".join(str(v) for k, v in fields.items() if k != "label")
    document = documents_lib.Document("s", text, "", fields)
    return exact_duplicates.digest(document, dedup.make(["exact"]).exact, True)

  same = digest(text="a  b", label="x")
  assert same == digest(text="a b", label="x")
  other = digest(text="a b", label="y")
  assert same[:16] == other[:16] and same != other, "a conflict has one text and two labels"
  assert digest(text="a", label=1) == digest(text="a", label="1")
  assert digest(text="a b", text_pair="c") != digest(text="a", text_pair="b c")
  turn = lambda role: [{"role": role, "content": "a"}]
  assert digest(messages=turn("user")) != digest(messages=turn("assistant"))


def test_like_texts_with_two_labels_are_no_near_duplicates(tmp_path):
  pytest.importorskip("datatrove")
  rows = [(text, "x") for text in TEXTS[:6]]
  rows += [(TEXTS[2] + " Also.", "x"), (TEXTS[3] + " Also.", "y"), (TEXTS[4], "y")]
  found = [
    documents_lib.Document(f"s:{i}", text, "", {"text": text, "label": label})
    for i, (text, label) in enumerate(rows)
  ]
  of = lambda given, name: benchmark.remove(
    found, dedup.make(given, by_fields=True), tmp_path / name, tasks=2
  )
  assert of(["near"], "a") == {6: 2}
  assert of(["exact", "near"], "b") == {6: 2}


def test_a_text_of_another_label_does_not_part_near_duplicates(tmp_path):
  pytest.importorskip("datatrove")
  rows = [(TEXTS[5] + "!" * i, "xy"[i % 2]) for i in range(6)]
  found = [
    documents_lib.Document(f"s:{i}", text, "", {"text": text, "label": label})
    for i, (text, label) in enumerate(rows)
  ]
  config = dedup.make(["near"], by_fields=True)
  assert benchmark.remove(found, config, tmp_path, tasks=2) == {2: 0, 3: 1, 4: 0, 5: 1}


def test_near_duplicates_are_alike_field_by_field(tmp_path):
  pytest.importorskip("datatrove")
  a, b = " ".join(TEXTS[:3]), " ".join(f"word{i}" for i in range(30))
  rows = [(a, b), (b, a), (a + " Also.", b), ("Yes", "No"), ("No", "Yes"), ("Yes.", "no thanks")]
  rows += [("yes", "No, thanks!")]
  found = [
    documents_lib.Document(f"s:{i}", f"{x}\n{y}", "", {"input": x, "target": y})
    for i, (x, y) in enumerate(rows)
  ]
  config = dedup.make(["near"], by_fields=True)
  assert benchmark.remove(found, config, tmp_path, tasks=2) == {2: 0, 6: 5}


@pytest.mark.parametrize("chunk", [1 << 24, 3])
def test_texts_with_two_labels_are_counted_once(monkeypatch, chunk):
  monkeypatch.setattr(exact_duplicates, "_SORTED", chunk)
  rows = [(7, 0, 1), (8, 0, 1), (7, 0, 2), (9, 0, 5), (7, 0, 1), (7, 0, 3), (9, 0, 6), (8, 0, 1)]
  digests = [np.array(rows[:5], np.uint64), np.array(rows[5:], np.uint64)]
  found = exact_duplicates.find(digests, np.array([0, 5, 8]))
  assert found.duplicates.tolist() == [[4, 0], [7, 1]]
  assert found.conflicts == 2
  a, b = found.example
  together = rows[:5] + rows[5:]
  assert together[a][:2] == together[b][:2] and together[a][2] != together[b][2]
