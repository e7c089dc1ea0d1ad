"""Rows of labelled data: what is in them, what is learned, and what is refused."""

import numpy as np
import pytest

from jaxgpt.data import pipeline
from jaxgpt.data.batch_source import Batching
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import shards
from jaxgpt.text.readers import documents
from jaxgpt.text.tokenizers import examples, tokenizer

T = tokenizer.ByteTokenizer()


class Document:
  source, text = "file:1", ""

  def __init__(self, fields):
    self.fields = fields


def write(folder, kind, fields, label_names=(), template=None):
  """A prepared folder of one train split; returns its name."""
  folder.mkdir()
  writer = shards.SplitWriter(folder, "train", T, 1 << 20, kind)
  for encoded in examples.encode_batch(
    [Document(f) for f in fields], kind, T, template, label_names
  ):
    for e in encoded:
      writer.add(e, 1, "file")
  shards.write_manifest(
    folder,
    shards.make_manifest(T, {"train": writer.finish()}, documents.Dropped(), kind, label_names),
  )
  return str(folder)


def text(ids):
  return "".join(
    {0: ".", T.bos_id: "<", T.eos_id: ">"}.get(i) or T.decode([i]) for i in np.asarray(ids).tolist()
  )


def make(folder, objective, seq_len=8, batch_size=1, packing="best_fit", **over):
  return pipeline.make(
    folder,
    "train",
    Batching(seq_len=seq_len, batch_size=batch_size, packing=packing, shuffle=False),
    layout=objective,
    **over,
  )


@pytest.mark.parametrize("packing", ["best_fit", "concat", "one_per_row"])
@pytest.mark.parametrize("seq_len", [3, 8, 40])
def test_only_targets_are_learned_wherever_rows_are_cut(tmp_path, packing, seq_len):
  rng = np.random.default_rng(0)
  fields = [{"input": "i" * a, "target": "o" * b} for a, b in rng.integers(0, 20, (30, 2))]
  b = make(write(tmp_path / "a", "seq2seq", fields), "causal_lm", seq_len, packing=packing)
  assert not b.predicts_all
  learned = ""
  for step in range(b.len_rows):
    batch = b.batch(step)
    weights, tokens, targets = (batch[k][0] for k in ("loss_weights", "tokens", "targets"))
    assert set(weights.tolist()) <= {0, 1}
    learned += text(targets[weights > 0])
    assert "i" not in text(targets[weights > 0])
    assert "o" not in text(targets[weights == 0]) and ">" not in text(targets[weights == 0])
    assert (text(tokens) + text(targets[-1:])).strip(".")
  assert sorted(learned) == sorted("".join(f["target"] + ">" for f in fields))


def test_a_conversation_learns_what_the_assistant_says(tmp_path):
  template = lambda messages: [
    piece
    for m in messages
    for piece in (
      examples.Piece(f"<|{m['role']}|>", special=True),
      examples.Piece(m["content"], m["role"] == "assistant"),
      examples.Piece("<|end|>", m["role"] == "assistant", special=True),
    )
  ]
  messages = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "<|end|>"},
    {"role": "assistant", "content": "de"},
  ]
  b = make(
    write(tmp_path / "a", "chat", [{"messages": messages}], template=template),
    "causal_lm",
    seq_len=40,
  )
  batch = b.batch(0)
  learned = batch["targets"][0][batch["loss_weights"][0] > 0].tolist()
  end = T.special_ids["<|end|>"]
  assert learned == [*T.encode("c"), end, *T.encode("de"), end]
  assert (batch["targets"][0] == end).sum() == 4, "what a user writes is text"


def test_one_example_a_row(tmp_path):
  fields = [
    {"text": "abc", "label": "x"},
    {"text": "a", "text_pair": "bc", "label": "y"},
    {"text": "abcdefghi", "label": "y"},
    {"text": "a", "text_pair": "bcdefghi", "label": "x"},
    {"text": "abcdefghi", "text_pair": "j", "label": "x"},
    {"text": "abcdefghi", "text_pair": "abcdefghi", "label": "x"},
  ]
  b = make(
    write(tmp_path / "a", "classification", fields, ("x", "y")), "classification", batch_size=6
  )
  assert b.num_cut == 4
  batch = b.batch(0)
  assert [text(row) for row in batch["tokens"]] == [
    "<abc>...",
    "<a>bc>..",
    "<abcdef>",
    "<a>bcde>",
    "<abcd>j>",
    "<ab>abc>",
  ]
  assert batch["labels"].tolist() == [0, 1, 1, 0, 0, 0] and batch["labels"].dtype == np.int32
  assert ["".join(map(str, row)) for row in batch["token_types"]] == [
    "00000000",
    "00011100",
    "00000000",
    "00011111",
    "00000011",
    "00001111",
  ]
  np.testing.assert_array_equal(batch["segment_ids"], batch["tokens"] > 0)
  np.testing.assert_array_equal(batch["positions"], np.arange(8) * (batch["tokens"] > 0))
  assert (batch["loss_weights"] == 1).all() and batch["loss_weights"].shape == (6,)


def test_rows_of_padding_have_no_weight(tmp_path):
  path = write(tmp_path / "a", "classification", [{"text": "a", "label": 0.5}] * 5)
  b = make(path, "classification", batch_size=4)
  last = list(b.epoch_batches())[-1]
  assert last["loss_weights"].tolist() == [1, 0, 0, 0]
  assert last["labels"].dtype == np.float32 and last["labels"][0] == 0.5
  for host in range(4):
    part = list(b.epoch_batches(host_index=host, host_count=4))[-1]
    assert {k: v.dtype for k, v in part.items()} == {k: v.dtype for k, v in last.items()}


def test_the_answers_of_a_pair_are_in_one_row(tmp_path):
  fields = [
    {"prompt": "q", "chosen": "yes", "rejected": "no"},
    {"prompt": "abcdef", "chosen": "yes", "rejected": "n"},
  ]
  b = make(write(tmp_path / "a", "preference", fields), "preference", batch_size=2)
  assert (b.len_rows, b.num_cut) == (2, 1)
  batch = b.batch(0)
  assert [text(row) for row in batch["chosen"]["tokens"]] == ["<qyes...", "<abcdefy"]
  assert [text(row) for row in batch["rejected"]["tokens"]] == ["<qno....", "<abcdefn"]
  learned = {
    side: [text(t[w > 0]) for t, w in zip(x["targets"], x["loss_weights"], strict=True)]
    for side, x in batch.items()
  }
  assert learned == {"chosen": ["yes>", "ye"], "rejected": ["no>", "n>"]}
  [padded] = b.epoch_batches(host_index=1, host_count=2)
  assert padded["rejected"]["tokens"].shape == (1, 8)


def test_pairs_whose_prompt_fills_the_row_are_left_out_and_counted(tmp_path):
  prompts = ("q", "abcdefg", "abcdefgh", "abcdefghi", "r")  # a row of 8 has room for <abcdefg and a
  fields = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in prompts]
  b = make(write(tmp_path / "a", "preference", fields), "preference", batch_size=3)
  found = [text(row) for row in b.batch(0)["chosen"]["tokens"]]
  assert sorted(found) == ["<abcdefg", "<qyes...", "<ryes..."]
  assert (b.batch(0)["chosen"]["loss_weights"].sum(1) > 0).all()
  assert b.describe() == [
    "2 of 10 documents are longer than data.seq_len=8 and lose an end",
    "4 of 10 documents are left out: what is learned of them, or of the other answer, begins after "
    "data.seq_len=8 tokens",
  ]
  long = write(tmp_path / "b", "preference", [{**f, "prompt": "abcdefghi"} for f in fields])
  with pytest.raises(UserError, match="data.seq_len=8 is too short for the train split"):
    make(long, "preference")


@pytest.mark.parametrize(
  "kind, objective, message",
  [
    ("classification", "causal_lm", "kind classification: set objective.name to classification"),
    ("seq2seq", "classification", "set objective.name to causal_lm, or .*--kind=classification"),
    ("seq2seq", "masked_lm", "takes data of kind text"),
    ("preference", "causal_lm", "set objective.name to preference"),
  ],
)
def test_data_of_another_kind_says_what_to_do(tmp_path, kind, objective, message):
  fields = {
    "input": "a",
    "target": "b",
    "text": "a",
    "label": "x",
    "prompt": "",
    "chosen": "",
    "rejected": "",
  }
  with pytest.raises(UserError, match=message):
    make(write(tmp_path / "a", kind, [fields], ("x",)), objective)


def test_sources_of_other_classes_are_refused(tmp_path):
  paths = [
    write(tmp_path / name, "classification", [{"text": "a", "label": name}], (name,))
    for name in "ab"
  ]
  with pytest.raises(UserError, match="'b' and 'a' have different classes: b and a"):
    make(",".join(paths), "classification")


@pytest.mark.parametrize(
  "labels, names, num_labels, message",
  [
    (["a", "b", "c"], ("a", "b", "c"), 2, r"3 classes \(a, b, c\): set model.num_labels=3"),
    (["a"], ("a",), 1, "set model.num_labels=2"),
    ([0.5], (), 2, "set model.num_labels=1"),
  ],
)
def test_a_model_needs_an_output_for_each_class(tmp_path, labels, names, num_labels, message):
  fields = [{"text": "a", "label": label} for label in labels]
  b = make(write(tmp_path / "a", "classification", fields, names), "classification")
  with pytest.raises(UserError, match=message):
    b.check_labels(num_labels)
  b.check_labels(int(message[-1]))
