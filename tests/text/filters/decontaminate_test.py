"""Training documents that hold what is held out are found, whatever their layout."""

import pickle
import random

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.filters import decontaminate, words
from jaxgpt.text.readers import documents as documents_lib

RANDOM = random.Random(0)
VOCABULARY = ["".join(RANDOM.choices("abcdefghij", k=6)) for _ in range(2000)]


def text(n=60):
  return " ".join(RANDOM.choices(VOCABULARY, k=n))


def documents(texts):
  return [documents_lib.Document(f"s:{i}", t) for i, t in enumerate(texts)]


def make_filter(folder, held, config, tasks=1):
  """The filter of {name: texts}, each name collected in so many tasks."""
  folders = {}
  for name, texts in held.items():
    for task in range(tasks):
      out = folder / f"collect-{name}-{task}"
      out.mkdir(parents=True)
      decontaminate.collect(documents(texts[task::tasks]), out, config)
      folders.setdefault(name, []).append(out)
  (folder / "index").mkdir()
  decontaminate.merge(folders, folder / "index", config)
  return decontaminate.Filter(folder / "index", config)


def test_what_shares_thirteen_words_goes_and_the_rest_stays(tmp_path):
  held = [text() for _ in range(20)]
  clean = [text() for _ in range(50)]
  part = held[4].split()
  leaks = [
    f"{clean[0]}\n{' '.join(part[20:35])} {clean[1]}",
    f"{clean[2]} {', '.join(part[5:25]).upper()}! {clean[3]}",
  ]
  almost = f"{clean[4]} {' '.join(part[30:42])} {clean[5]}"
  judge = make_filter(tmp_path, {"bench": held}, decontaminate.make())
  dropped = documents_lib.Dropped()
  assert [d.text for d in judge(documents([*clean, *leaks, almost]), dropped)] == [*clean, almost]
  assert dropped.counts == {"contaminated": 2}
  assert judge.found == {"bench": 2}
  assert dropped.examples["contaminated"][0] == (
    f"s:50: bench: 3 of 123 runs, such as {' '.join(part[20:33])!r}"
  )


def test_every_planted_leak_is_found_and_nothing_else(tmp_path):
  held = [text(100) for _ in range(300)]
  train = [text(200) for _ in range(1000)]
  for i in range(0, 1000, 5):
    start = RANDOM.randrange(87)
    train[i] += " " + " ".join(held[i % 300].split()[start : start + 13])
  judge = make_filter(tmp_path, {"test": held}, decontaminate.make(), tasks=3)
  assert [i for i, t in enumerate(train) if judge.check(t)] == list(range(0, 1000, 5))


def test_names_are_told_apart_and_nothing_is_removed_where_only_a_report_is_asked_for(tmp_path):
  held = {"a": [text()], "b": [text()], "none": []}
  config = decontaminate.make("remove=false")
  judge = pickle.loads(pickle.dumps(make_filter(tmp_path, held, config)))
  dropped = documents_lib.Dropped()
  train = [held["a"][0], held["b"][0] + " " + held["a"][0], text()]
  assert [d.text for d in judge(documents(train), dropped)] == train
  assert judge.found == {"a": 2, "b": 1, "none": 0} and dropped.counts == {}


def test_phrases_of_many_held_out_texts_do_not_count(tmp_path):
  licence = text(40)
  held = [f"{text()} {licence}" for _ in range(6)]
  for common, found in ((5, False), (6, True), (0, True)):
    judge = make_filter(
      tmp_path / str(common), {"x": held}, decontaminate.make(f"common={common}"), tasks=2
    )
    assert bool(judge.check(f"{text()} {licence}")) == found
    assert judge.check(held[0])


def test_how_much_must_be_shared(tmp_path):
  held = text(60)
  train = f"{text(100)} {' '.join(held.split()[:20])}"  # 8 of 108 runs
  for given, found in (
    ("runs=8", True),
    ("runs=9", False),
    ("share=0.07", True),
    ("share=0.08", False),
    ("words=20", True),
    ("words=21", False),
  ):
    judge = make_filter(tmp_path / given, {"x": [held]}, decontaminate.make(given))
    assert bool(judge.check(train)) == found, given


def test_texts_that_are_too_short_to_be_found_are_counted(tmp_path):
  assert decontaminate.collect(
    documents(["one two", text(13), text(12)]), tmp_path, decontaminate.make()
  ) == {"documents": 3, "too short": 2}


def test_counting_in_parts_changes_nothing(tmp_path, monkeypatch):
  held = [text() for _ in range(9)] * 2
  config = decontaminate.make()
  arrays = []
  for held_at_once in (decontaminate._HELD, 50):
    monkeypatch.setattr(decontaminate, "_HELD", held_at_once)
    (tmp_path / str(held_at_once)).mkdir()
    decontaminate.collect(documents(held), tmp_path / str(held_at_once), config)
    arrays.append(np.load(tmp_path / str(held_at_once) / "runs.npy"))
  assert np.array_equal(*arrays)
  assert set(arrays[0]["texts"].tolist()) == {2} and len(arrays[0]) == 9 * 48


@pytest.mark.parametrize(
  "given, message",
  [
    ("word=3", "did you mean 'words'"),
    ("words=0", "at least 1"),
    ("remove=maybe", "no bool"),
    ("share=20", "share=20.0 must be in"),
    ("share=nan", "share=nan must be in"),
    ("share=-0.1", "share=-0.1 must be in"),
  ],
)
def test_bad_options_are_named(given, message):
  with pytest.raises(UserError, match=message):
    decontaminate.make(given)


def test_runs_have_the_same_hashes_on_every_machine():
  runs = words.ngram_hashes("a b, C\na b", 2)
  assert runs.dtype == np.uint64 and len(runs) == 4 and runs[0] == runs[3]
  assert len(set(runs.tolist())) == 3
  assert runs[0] != words.ngram_hashes("b a", 2)[0]
  assert words.ngram_hashes("golden hash", 2).tolist() == [0x37ACD92536D946BD]
  assert len(words.ngram_hashes("a", 2)) == 0


def test_a_long_text_is_hashed_in_parts_and_no_word_is_cut(monkeypatch):
  long = " ".join(f"{text(5)}\n{text(3)}" for _ in range(20))
  whole = words.ngram_hashes(long, 3)
  monkeypatch.setattr(words, "_CHUNK", 20)
  assert words.ngram_hashes(long, 3).tolist() == whole.tolist()
  assert len(words.ngram_hashes("x" * 100, 1)) == 5, "where there is no space, anywhere"
