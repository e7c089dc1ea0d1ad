"""Rows with labels on tokens, on several classes, and of pairs: what is in them."""

import numpy as np
import pytest

from jaxgpt.data import layouts, pipeline
from jaxgpt.errors import UserError
from tests.data.layouts_test import make, text, write

TAGGED = [
  {"words": ["Jim", "ran"], "tags": ["B", "O"]},
  {"words": ["a", "b", "c"], "tags": ["O", "B", "O"]},
  {"words": ["longer", "words", "are", "here"], "tags": ["B", "O", "B", "O"]},
]


@pytest.mark.parametrize("packing", ["best_fit", "concat", "one_per_row"])
@pytest.mark.parametrize("seq_len", [5, 16, 64])
def test_each_word_is_learned_once_at_its_first_token(tmp_path, packing, seq_len):
  folder = write(tmp_path / "a", "tagging", TAGGED, ("B", "O"))
  b = make(folder, "token_classification", seq_len, packing=packing)
  learned = []
  for step in range(b.len_rows):
    batch = {key: x[0] for key, x in b.batch(step).items()}
    assert batch["targets"][batch["loss_weights"] == 0].sum() == 0
    assert (batch["segment_ids"] > 0).sum() == (batch["tokens"] > 0).sum()
    for place in np.flatnonzero(batch["loss_weights"]):
      learned.append(text(batch["tokens"][place : place + 1]) + "BO"[batch["targets"][place]])
  want = [word[0] + tag for f in TAGGED for word, tag in zip(f["words"], f["tags"])]
  assert sorted(learned) == sorted(want)


def test_texts_in_words_share_a_row(tmp_path):
  b = make(write(tmp_path / "a", "tagging", TAGGED, ("B", "O")), "token_classification", 16)
  (row,) = [r for r in range(b.len_rows) if text(b.batch(r)["tokens"][0]).startswith("<a")
            or "<a b c>" in text(b.batch(r)["tokens"][0])]  # fmt: skip
  batch = {key: x[0] for key, x in b.batch(row).items()}
  assert text(batch["tokens"]) == "<Jim ran><a b c>"
  assert batch["segment_ids"].tolist() == [1] * 9 + [2] * 7
  assert batch["positions"].tolist() == [*range(9), *range(7)]
  assert batch["loss_weights"].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0]
  assert batch["targets"].tolist() == [0] * 5 + [1] + [0] * 4 + [1, 0, 0, 0, 1, 0]


def asked(context, answer, question="who"):
  start = context.index(answer) if answer else 0
  return {
    "question": question,
    "context": context,
    "answers": [{"text": answer, "answer_start": start}] if answer else [],
  }


def test_a_question_is_asked_of_each_window_of_its_passage(tmp_path):
  fields = [asked("Jim ran", "Jim"), asked("one two three", "two"), asked("nobody", "")]
  folder = write(tmp_path / "a", "question_answering", fields)
  b = make(folder, "question_answering", 14, batch_size=6, overlap=3)
  batch = b.batch(0)
  # The windows of the second passage: room for 8 tokens after '<who>', and 5 more in each.
  assert [text(row) for row in batch["tokens"]] == [
    "<who>Jim ran>.",
    "<who>one two >",
    "<who>wo three>",
    "<who>nobody>..",
    "<who>Jim ran>.",  # the next epoch
    "<who>one two >",
  ]
  assert b.len_rows == 4 and b.num_documents == 3 and b.num_cut == 0
  ends = lambda key: [np.flatnonzero(row).tolist() for row in batch[key]]
  assert ends("starts")[:4] == [[5], [9], [0], [0]]
  assert ends("ends")[:4] == [[7], [11], [0], [0]]
  types = ["".join(map(str, row)) for row in batch["token_types"]]
  assert types[0] == "00000" + "1" * 8 + "0" and types[1] == "00000" + "1" * 9
  assert batch["loss_weights"].tolist() == [1] * 6
  last = list(make(folder, "question_answering", 14, batch_size=3).epoch_batches())[-1]
  assert last["loss_weights"].tolist()[-1] == 0 and last["starts"][-1].sum() == 0


def test_a_long_question_loses_its_end_and_not_the_passage(tmp_path):
  folder = write(tmp_path / "a", "question_answering", [asked("abcdef", "f", question="q" * 20)])
  b = make(folder, "question_answering", 10, batch_size=2, overlap=2)
  assert b.num_cut == 1 and b.len_rows == 2
  batch = b.batch(0)
  assert [text(row) for row in batch["tokens"]] == ["<qqq>abcd>", "<qqq>cdef>"]
  assert batch["starts"].argmax(1).tolist() == [0, 8]


def test_any_number_of_classes_and_those_of_the_model(tmp_path):
  fields = [{"text": "a", "labels": ["x", "z"]}, {"text": "b", "text_pair": "c", "labels": []}]
  folder = write(tmp_path / "a", "multi_label", fields, ("x", "z"))
  assert make(folder, "multi_label", batch_size=2).batch(0)["labels"].tolist() == [[1, 1], [0, 0]]
  b = make(folder, "multi_label", batch_size=2, label_names=("z", "y", "x"), num_labels=4)
  batch = b.batch(0)
  assert batch["labels"].tolist() == [[1, 0, 1, 0], [0] * 4]
  assert batch["labels"].dtype == np.float32
  assert ["".join(map(str, row)) for row in batch["token_types"]] == ["0" * 8, "00011000"]
  with pytest.raises(UserError, match="has the classes x, z, but the model has x, y"):
    make(folder, "multi_label", label_names=("x", "y"))


def test_tags_are_numbered_as_the_model_does(tmp_path):
  folder = write(tmp_path / "a", "tagging", TAGGED[:1], ("B", "O"))
  batch = make(folder, "token_classification", 16, label_names=("O", "B")).batch(0)
  assert batch["targets"][batch["loss_weights"] > 0].tolist() == [1, 0]


def test_both_texts_of_a_pair_have_arrays_of_their_own(tmp_path):
  fields = [{"query": "ab", "positive": "cdefghijk"}, {"query": "l" * 7, "positive": "m"}]
  b = make(write(tmp_path / "a", "retrieval", fields), "retrieval", batch_size=2)
  batch = b.batch(0)
  assert [text(row) for row in batch["query"]["tokens"]] == ["<ab>....", "<llllll>"]
  assert [text(row) for row in batch["positive"]["tokens"]] == ["<cdefgh>", "<m>....."]
  assert b.num_cut == 2 and b.len_rows == 2 and batch["query"]["loss_weights"].tolist() == [1, 1]
  np.testing.assert_array_equal(batch["positive"]["segment_ids"], batch["positive"]["tokens"] > 0)


@pytest.mark.parametrize("kind", ["multi_label", "tagging", "question_answering", "retrieval"])
def test_a_blank_batch_has_the_shapes_of_one_with_data(tmp_path, kind):
  fields = {
    "multi_label": {"text": "a", "labels": ["x"]},
    "tagging": {"words": ["a"], "tags": ["x"]},
    "question_answering": asked("a", "a"),
    "retrieval": {"query": "a", "positive": "b"},
  }[kind]
  names = ("x", "y", "z") if kind in ("multi_label", "tagging") else ()
  name = layouts.of_kind(kind)[0]
  batch = make(write(tmp_path / "a", kind, [fields], names), name, batch_size=2).batch(0)
  blank = layouts.blank(name, 2, 8, 3)
  shapes = lambda x: {
    k: shapes(v) if isinstance(v, dict) else (v.shape, v.dtype) for k, v in x.items()
  }
  assert shapes(blank) == shapes(batch)


def test_each_host_reads_its_rows(tmp_path):
  fields = [asked("Jim ran off to York", "York"), asked("one", "one"), asked("b", "")]
  folder = write(tmp_path / "a", "question_answering", fields)
  b = make(folder, "question_answering", 12, batch_size=4, overlap=1)
  whole = b.batch(1)
  parts = [b.batch(1, host, 2) for host in range(2)]
  for key, x in whole.items():
    np.testing.assert_array_equal(x, np.concatenate([part[key] for part in parts]))
  assert isinstance(b, pipeline.Batches)
