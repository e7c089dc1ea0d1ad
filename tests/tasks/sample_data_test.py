"""Sample data: rows of their kinds, the same each time, with test rows that are new."""

import collections
import json
import random

import pytest

from jaxgpt.tasks.predict import rows as rows_lib
from jaxgpt.tasks.sample_data import docstrings, numbers, questions, retrieval, sentiment, tagging
from jaxgpt.tasks.sample_data.__main__ import DATA, SPLITS, main

KINDS = {
  "sentiment": "classification",
  "tagging": "tagging",
  "questions": "question_answering",
  "generated_answers": "seq2seq",
  "retrieval": "retrieval",
  "translation": "seq2seq",
  "chat": "chat",
}


@pytest.mark.parametrize("task", KINDS)
def test_rows_are_of_their_kind_and_the_same_each_time(task):
  make, _ = DATA[task]
  for split in SPLITS:
    found = make(random.Random(3), split, 40)
    assert len(found) == 40 and found == make(random.Random(3), split, 40)
    read = rows_lib.of_values(found, KINDS[task])
    assert [row.problem for row in read] == [""] * 40
    assert all(row.fields.keys() >= {*rows_lib.ANSWERS.get(KINDS[task], ())} for row in read)


def test_templates_of_the_splits_differ_and_together_are_all():
  for module in (sentiment, tagging):
    splits = [set(module.templates(split)) for split in SPLITS]
    assert all(len(split) > 60 for split in splits)
    assert not any(a & b for a in splits for b in splits if a is not b)


def test_half_of_the_reviews_are_good_and_words_of_both_sides_are_in_both():
  found = sentiment.make(random.Random(0), "test", 500)
  counts = collections.Counter(row["label"] for row in found)
  assert 200 < counts["good"] < 300
  awful = [row["label"] for row in found if "awful" in row["text"]]
  assert {*awful} == {"good", "bad"}


def test_names_and_numbers_of_passages_are_new():
  answers = {
    split: {row["answers"][0]["text"] for row in questions.make(random.Random(0), split, 600)}
    for split in SPLITS
  }
  shared = answers["test"] & (answers["train"] | answers["validation"])
  assert shared <= set(questions._STONES)
  ends = collections.Counter(text[-1] for text in answers["test"] if text.isdigit())
  assert len(ends) == 10  # no digit is missing from the last places


def test_topics_of_pairs_differ_and_share_hardly_a_word():
  found = {split: retrieval.make(random.Random(0), split, 400) for split in SPLITS}
  for row in found["test"]:
    common = set(row["query"].split()) & set(row["positive"].split())
    assert common <= {"a", "an", "the", "in", "at", "on", ",", "and", ":", "school"}
  texts = [{row["positive"] for row in rows} for rows in found.values()]
  assert not texts[2] & (texts[0] | texts[1])


def test_number_words_and_their_splits():
  assert [numbers.words(n) for n in (0, 19, 20, 45, 700, 42_017, 999_999)] == [
    "zero",
    "nineteen",
    "twenty",
    "forty-five",
    "seven hundred",
    "forty-two thousand seventeen",
    "nine hundred ninety-nine thousand nine hundred ninety-nine",
  ]
  splits = [set(numbers.of_split(split, 1000)) for split in SPLITS]
  assert sorted(n for split in splits for n in split) == list(range(1000))


def _function(name, summary):
  return f'@decorated\ndef {name}(x):\n  """{summary}\n\n  More.\n  """\n  return x\n'


def test_functions_lose_their_docstrings_and_modules_are_in_one_split(monkeypatch, tmp_path):
  library, site = tmp_path / "library", tmp_path / "site"
  for folder in (library / "test", site / "packaged_functions" / "tests"):
    folder.mkdir(parents=True)
  for i in range(40):
    text = _function(f"getName{i}_of", f"Return the number of things {i}.")
    (library / f"module{i}.py").write_text(text)
  monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
  monkeypatch.setattr(docstrings, "PACKAGES", ("packaged_functions", "not_installed"))
  monkeypatch.syspath_prepend(site)

  def make(split):
    """Rows that ask for a summary, and those that ask for the name."""
    rows = docstrings.make(random.Random(0), split, 200)
    names = [row for row in rows if row["input"].startswith(docstrings.NAME_OF)]
    return [row for row in rows if row not in names], names

  made = {split: make(split) for split in SPLITS}
  found = {split: rows for split, (rows, _) in made.items()}
  assert {split: (len(rows), len(names)) for split, (rows, names) in made.items()} == {
    "train": (35, 35),
    "validation": (1, 0),
    "test": (4, 0),
  }
  assert len({row["target"] for rows in found.values() for row in rows}) == 40
  for row in found["test"]:
    number = row["target"].split()[-1].strip(".")
    assert row["input"] == f"def get name {number} of ( x ):\nreturn x"
    assert row["target"] == f"Return the number of things {number}."
  for row in made["train"][1]:
    assert row["input"] == f"name of def {row['target']} ( x ):"
  # Packages add to the training rows what is neither a held-out function nor its docstring.
  target = found["test"][0]["target"]
  code = _function("copied", target) + _function("new_one", "Something that is new.")
  (site / "packaged_functions" / "__init__.py").write_text(code)
  number = target.split()[-1].strip(".")
  code = _function(f"get_name_{number}_of", "The function again, with another docstring.")
  (site / "packaged_functions" / "again.py").write_text(code)
  (site / "packaged_functions" / "tests" / "a.py").write_text(_function("f", "A test of a thing."))
  (library / "test" / "a.py").write_text(_function("f", "A test of another thing."))
  summaries, names = ({row["target"] for row in rows} for rows in make("train"))
  assert summaries - {row["target"] for row in found["train"]} == {"Something that is new."}
  more = names - {row["target"] for row in made["train"][1]}
  assert more == {"new one", f"get name {number} of"}
  assert make("test") == made["test"]


def test_source_code_in_words():
  source = "def __getSize(self, *, HTTPError_2=3.5):\n    if not x:\n        return 'théâtre'"
  assert docstrings.words(source) == (
    "def get size ( self , *, http error 2 = 3.5 ):\nif not x :\nreturn ' théâtre '"
  )


def test_the_command_writes_three_files(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(DATA, "translation", (numbers.make, (7, 5, 3)))
  assert main(["--task=translation", f"--out={tmp_path / 'd'}"]) == 0
  lines = {s: (tmp_path / "d" / f"{s}.jsonl").read_text().splitlines() for s in SPLITS}
  assert [len(lines[s]) for s in SPLITS] == [7, 5, 3]
  row = json.loads(lines["test"][0])
  assert numbers.words(int(row["input"])) == row["target"]
  (tmp_path / "f").write_text("")
  assert main(["--task=translation", f"--out={tmp_path / 'f'}"]) == 2
  assert "can't be written" in capsys.readouterr().err
