"""Metrics against the reference packages, and by hand."""

import csv
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from jaxgpt.tasks.metrics import answers, classes, entities, overlap, ranking


def value(measure, size):
  return measure(np.ones(size))


def test_accuracy_macro_f1_and_confusion_by_hand():
  predicted, wanted = ["a", "b", "b", "c"], ["a", "b", "a", "a"]
  assert value(classes.accuracy(predicted, wanted), 4) == 0.5
  # a: TP 1, FN 2 -> 2/4; b: TP 1, FP 1 -> 2/3; c: FP 1 -> 0
  assert value(classes.macro_f1(predicted, wanted), 4) == pytest.approx((0.5 + 2 / 3 + 0) / 3)
  found = classes.confusion(predicted, wanted)
  assert found.counts_CC.tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
  assert found.lines()[1].split() == ["a", "1", "1", "1"]


def test_macro_f1_is_that_of_scikit_learn():
  sklearn = pytest.importorskip("sklearn.metrics")
  rng = random.Random(0)
  wanted, predicted = ([rng.choice("abcde") for _ in range(300)] for _ in range(2))
  want = sklearn.f1_score(wanted, predicted, average="macro")
  assert value(classes.macro_f1(predicted, wanted), 300) == pytest.approx(want, abs=1e-12)
  weights = np.bincount(np.random.default_rng(0).integers(0, 300, 300), minlength=300)
  want = sklearn.f1_score(
    np.repeat(wanted, weights), np.repeat(predicted, weights), average="macro"
  )
  assert classes.macro_f1(predicted, wanted)(weights.astype(float)) == pytest.approx(want)


def test_correlation_and_error_are_those_of_numpy():
  a, b = np.random.default_rng(0).normal(size=(2, 50))
  assert value(classes.pearson(a, b), 50) == pytest.approx(np.corrcoef(a, b)[0, 1])
  assert value(classes.mean_squared_error(a, b), 50) == pytest.approx(((a - b) ** 2).mean())
  assert value(classes.pearson(np.ones(50), b), 50) == 0


@pytest.mark.parametrize(
  "predicted, wanted, exact, f1",
  [
    ("The Eiffel Tower,", ["eiffel tower"], 1, 1),
    ("in the tower", ["Eiffel tower", "a tower"], 0, 2 / 3),
    ("a b c d", ["x", "c d e"], 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # `a` is an article
    ("", [], 1, 1),  # can't be answered, and was not
    ("the", [""], 1, 1),
    ("Paris", [], 0, 0),
    ("", ["Paris"], 0, 0),
    ("U.S.A.", ["usa"], 1, 1),
  ],
)
def test_answers_are_compared_as_squad_does(predicted, wanted, exact, f1):
  assert value(answers.exact_match([predicted], [wanted]), 1) == exact
  assert value(answers.mean_f1([predicted], [wanted]), 1) == pytest.approx(f1)


# Articles, punctuation, other scripts, white space and characters whose case is special.
BITS = ["the", "The", "THE", "a", "An", "theatre", "a-the", "'a'", "U.S.A.", "usa", "_a_", "it's"]
BITS += ["it’s", "“the”", "—", ".", ",", "?!", "$5", "12.5", "12,5", "İ", "ß", "STRASSE", "straße"]
BITS += [
  "一的",
  "a一",
  "e\u0301",
  "the\u0301",
  "a\u200bb",
  "\ufeff",
  "\u00a0",
  "\u3000",
  "\t",
  "\n",
]


def test_answers_of_any_characters_are_compared_as_by_torchmetrics():
  squad = pytest.importorskip("torchmetrics.functional.text").squad
  rng = random.Random(0)
  text = lambda: "".join(rng.choice(BITS) + rng.choice(("", " ")) for _ in range(rng.randint(0, 5)))
  wanted = [[text() for _ in range(rng.randint(1, 3))] for _ in range(200)]
  predicted = [rng.choice(w).upper() + "." if i % 3 else text() for i, w in enumerate(wanted)]
  # Of several answers of which one is empty, the script of SQuAD 2.0 leaves it out.
  wanted = [[a for a in w if answers.normalized(a)] or w[:1] for w in wanted]
  ids = [str(i) for i in range(len(wanted))]
  want = squad(
    [{"id": i, "prediction_text": p} for i, p in zip(ids, predicted, strict=True)],
    [
      {"id": i, "answers": {"text": w, "answer_start": [0] * len(w)}}
      for i, w in zip(ids, wanted, strict=True)
    ],
  )
  for measure, name in ((answers.exact_match, "exact_match"), (answers.mean_f1, "f1")):
    got = value(measure(predicted, wanted), len(wanted))
    assert 100 * got == pytest.approx(want[name].item(), abs=1e-3) and 0.3 < got < 0.9


WORDS = [
  "the",
  "a",
  "cat",
  "dog",
  "dogs",
  "sat",
  "running",
  "runs",
  "on",
  "mat",
  "mats",
  "quickly",
  ".",
  ",",
  "The",
  "It's",
  "12",
  "12.5",
  "über",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """(predictions, references, their files, one text a line)."""
  rng = random.Random(0)
  text = lambda: " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 14)))
  wanted = [text() for _ in range(40)]
  predicted = [w if i % 9 == 0 else text() for i, w in enumerate(wanted)]
  folder = tmp_path_factory.mktemp("texts")
  files = []
  for name, lines in (("predicted.txt", predicted), ("wanted.txt", wanted)):
    (folder / name).write_text("".join(line + "\n" for line in lines))
    files.append(str(folder / name))
  return predicted, wanted, *files


def command_line(*args):
  done = subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_rouge_is_that_of_the_command_line_of_rouge_score(texts, tmp_path):
  pytest.importorskip("rouge_score")
  predicted, wanted, predicted_file, wanted_file = texts
  command_line(
    "rouge_score.rouge",
    f"--target_filepattern={wanted_file}",
    f"--prediction_filepattern={predicted_file}",
    f"--output_filename={tmp_path / 'rouge.csv'}",
    "--rouge_types=rouge1,rouge2,rougeL",
    "--use_stemmer",
    "--noaggregate",
  )
  rows = list(csv.DictReader((tmp_path / "rouge.csv").open()))
  found = overlap.rouge(predicted, wanted)
  assert len(rows) == 40 and list(found) == ["rouge1", "rouge2", "rougeL"]
  for kind, measure in found.items():
    # The command line writes six digits of each row.
    want = np.mean([float(row[f"{kind}-F"]) for row in rows])
    assert value(measure, 40) == pytest.approx(want, abs=1e-6) and want > 0.1


@pytest.mark.parametrize("name, ours", [("bleu", overlap.bleu), ("chrf", overlap.chrf)])
def test_bleu_and_chrf_are_those_of_the_command_line_of_sacrebleu(texts, name, ours):
  pytest.importorskip("sacrebleu")
  predicted, wanted, predicted_file, wanted_file = texts
  printed = command_line(
    "sacrebleu", wanted_file, "-i", predicted_file, "-m", name, "-b", "-w", "10", "--force"
  )
  assert value(ours(predicted, wanted), 40) == pytest.approx(float(printed), abs=1e-9)
  assert 5 < float(printed) < 95


def test_a_weight_of_two_counts_a_row_twice():
  pytest.importorskip("sacrebleu")
  predicted, wanted = ["a b c d e", "x y z w"], ["a b c d f", "x y w z"]
  for metric in (overlap.bleu, overlap.chrf):
    twice = metric([predicted[0], *predicted], [wanted[0], *wanted])
    assert metric(predicted, wanted)(np.array([2.0, 1])) == value(twice, 3)


@pytest.mark.parametrize(
  "tags, want",
  [
    ("B-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
    ("B-PER B-PER I-LOC I-LOC", [("PER", 0, 1), ("PER", 1, 2), ("LOC", 2, 4)]),
    ("O O", []),
    ("S-X B-X E-X I-X", [("X", 0, 1), ("X", 1, 3), ("X", 3, 4)]),
    ("I-A-B I-A-B O", [("A-B", 0, 2)]),
  ],
)
def test_entities_of_tags(tags, want):
  assert entities.entities(tags.split()) == want


def test_entities_and_their_f1_are_those_of_seqeval():
  seqeval = pytest.importorskip("seqeval.metrics")
  labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
  rng = random.Random(0)
  tags = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-LOC", "S-PER", "I-ORG"]
  wanted = [[rng.choice(tags) for _ in range(rng.randint(1, 12))] for _ in range(200)]
  predicted = [[tag if rng.random() < 0.7 else rng.choice(tags) for tag in row] for row in wanted]
  for row in wanted + predicted:
    want = [(type_, start, end + 1) for type_, start, end in labeling.get_entities(row)]
    assert entities.entities(row) == want
  assert value(entities.f1(predicted, wanted), 200) == seqeval.f1_score(wanted, predicted)


def test_ranks_by_cosine_with_ties_against_the_model():
  queries = np.array([[1.0, 0], [0, 2], [1, 1]])
  passages = np.array([[3.0, 0.1], [0, 1], [1, 0.9], [1, 0]])
  found = ranking.ranks(queries, passages, [0, 1, 2])
  assert found.tolist() == [2, 1, 1]
  assert value(ranking.recall_at(1, found), 3) == pytest.approx(2 / 3)
  assert value(ranking.mean_reciprocal_rank(found), 3) == pytest.approx((0.5 + 1 + 1) / 3)
  constant = ranking.ranks(np.ones((5, 3)), np.ones((5, 3)), range(5))
  assert constant.tolist() == [5] * 5


def test_micro_f1_of_sets():
  found = classes.micro_f1([{"a"}, {"b", "c"}, set()], [{"a", "b"}, {"b"}, set()])
  assert value(found, 3) == pytest.approx(2 * 2 / (3 + 3))
  assert json.dumps(value(classes.micro_f1([[]], [[]]), 1)) == "1.0"
