"""The batch at step N: what is in it, and that nothing else decides it."""

import collections
import itertools
import json

import numpy as np
import pytest

from jaxgpt.data import packing, pipeline
from jaxgpt.data.batch_source import Batching
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import prepare
from jaxgpt.text.tokenizers import tokenizer

TEXTS = [f"{i:03d}" + "abcdefg"[i % 7] * (i * 13 % 60) for i in range(120)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("pipeline")
  (path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
  prepare.prepare(
    path / "a.jsonl", path / "data", tokenizer="bytes", validation=0.2, shard_tokens=1000
  )
  return path / "data"


def make(folder, split="train", **over):
  return pipeline.make(
    folder,
    split,
    Batching(**{"seq_len": 32, "batch_size": 4, **over}),
  )


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def pairs(batch):
  """How often each (input, target) of weight 1 is in a batch."""
  real = batch["loss_weights"] > 0
  return collections.Counter(
    zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True)
  )


def all_pairs(split):
  total = collections.Counter()
  for doc, n in enumerate(split.lengths):
    ids = split.read(doc, 0, int(n) + 1).tolist()
    total.update(itertools.pairwise(ids))
  return total


@pytest.mark.parametrize("packing_name", packing.PACKINGS)
def test_rows_hold_what_their_spans_say(folder, packing_name):
  b = make(folder, packing=packing_name)
  batch = b.batch(3)
  assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
    key: (np.float32 if key == "loss_weights" else np.int32, (4, 32))
    for key in ("tokens", "targets", "loss_weights", "segment_ids", "positions")
  }
  for i, row in enumerate(b.rows(3)):
    at = 0
    _, split, pack, _ = b.sources[row.source]
    for segment, (doc, start, n) in enumerate(zip(*pack.spans(row.row), strict=True), 1):
      ids = split.read(doc, start, n + 1)
      here = (i, slice(at, at + n))
      np.testing.assert_array_equal(batch["tokens"][here], ids[:-1])
      np.testing.assert_array_equal(batch["targets"][here], ids[1:])
      np.testing.assert_array_equal(batch["positions"][here], np.arange(n))
      assert (batch["segment_ids"][here] == segment).all()
      assert (batch["loss_weights"][here] == 1).all()
      at += n
    for value in batch.values():
      assert not value[i, at:].any(), "padding is zero everywhere"


@pytest.mark.parametrize("packing_name", packing.PACKINGS)
def test_an_epoch_has_each_prediction_once(folder, packing_name):
  b = make(folder, packing=packing_name, batch_size=1)  # so that epochs end between batches
  for epoch in range(2):
    seen = sum(
      (pairs(b.batch(epoch * b.len_rows + i)) for i in range(b.len_rows)), collections.Counter()
    )
    assert seen == all_pairs(b.sources[0].split)


def test_epochs_and_seeds_have_their_own_order(folder):
  orders = {}
  for seed in (0, 1, 2, -1, 2**40):
    b = make(folder, batch_size=1, seed=seed)
    rows = [b.rows(i)[0].row for i in range(3 * b.len_rows)]
    for epoch in range(3):
      orders[seed, epoch] = tuple(rows[epoch * b.len_rows : (epoch + 1) * b.len_rows])
  assert len(set(orders.values())) == len(orders)
  assert all(sorted(o) == list(range(b.len_rows)) for o in orders.values())
  b = make(folder, batch_size=1, shuffle=False)
  assert [b.rows(i)[0].row for i in range(2 * b.len_rows)] == list(range(b.len_rows)) * 2


@pytest.mark.parametrize("host_count", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 1, 29, 1000])
def test_hosts_share_the_batch_in_order(folder, step, host_count):
  b, other = make(folder), make(folder)
  parts = [other.batch(step, host, host_count) for host in range(host_count)]
  assert_equal(b.batch(step), {k: np.concatenate([p[k] for p in parts]) for k in parts[0]})


@pytest.mark.parametrize(
  "start, threads, prefetch", [(0, 0, 0), (7, 1, 1), (7, 4, 2), (8, 3, 9), (500, 2, 4)]
)
def test_iterating_gives_the_batches_of_the_steps(folder, start, threads, prefetch):
  b = make(folder)
  batches = b.iterate(start, host_index=1, host_count=2, threads=threads, prefetch=prefetch)
  for step in range(start, start + 12):
    assert_equal(next(batches), b.batch(step, 1, 2))
  batches.close()
  assert len(list(b.iterate(start, stop_step=start + 5))) == 5


def test_what_is_chosen_changes_the_batch(folder):
  first = make(folder).batch(0)
  for over in ({"seed": 1}, {"shuffle": False}, {"packing": "concat"}, {"split": "validation"}):
    assert not np.array_equal(make(folder, **over).batch(0)["tokens"], first["tokens"]), over


@pytest.mark.parametrize("host_count", [1, 3])
def test_evaluation_sees_each_prediction_once_and_pads_the_end(folder, host_count):
  b = make(folder, "validation", batch_size=6)
  assert b.len_rows % 6, "the last batch is not full"
  seen = collections.Counter()
  for host in range(host_count):
    batches = list(b.epoch_batches(host_index=host, host_count=host_count))
    assert len(batches) == b.steps_per_epoch
    assert all(batch["tokens"].shape == (6 // host_count, 32) for batch in batches)
    seen += sum(map(pairs, batches), collections.Counter())
  assert seen == all_pairs(b.sources[0].split)
  assert b.bytes == sum(seen.values()) - b.sources[0].split.num_documents, "a byte a token, and eos"


def test_fewer_rows_than_a_batch_are_repeated_over_epochs(folder):
  b = make(folder, "validation", batch_size=64, seq_len=256)
  assert b.len_rows < 32 and b.steps_per_epoch == 1
  rows = [r.row for r in b.rows(0)]
  assert sorted(rows[: b.len_rows]) == list(range(b.len_rows))
  assert rows[: b.len_rows] != rows[b.len_rows : 2 * b.len_rows]
  assert b.batch(0)["tokens"].shape == (64, 256)
  assert len(list(b.epoch_batches())) == 1


def test_one_row_is_enough(tmp_path):
  (tmp_path / "a.txt").write_text("hello")
  prepare.prepare(tmp_path / "a.txt", tmp_path / "data", tokenizer="bytes", validation=0, test=0)
  batch = make(tmp_path / "data").batch(5)
  assert tokenizer.ByteTokenizer().decode(batch["tokens"][3]) == "hello"
  with pytest.raises(UserError, match=r"validation split .* is empty"):
    make(tmp_path / "data", "validation")


@pytest.mark.parametrize(
  "over, message",
  [
    ({"seq_len": 0}, "data.seq_len=0"),
    ({"batch_size": 0}, "data.batch_size=0"),
    ({"packing": "tetris"}, "data.packing='tetris'"),
  ],
)
def test_bad_values_are_named(folder, over, message):
  with pytest.raises(UserError, match=message):
    make(folder, **over)


def test_hosts_that_do_not_divide_the_batch(folder):
  for call in (
    lambda b: b.batch(0, 0, 3),
    lambda b: b.iterate(host_count=3),
    lambda b: b.epoch_batches(host_count=3),
  ):
    with pytest.raises(UserError, match=r"batch_size=4 does not split evenly over 3"):
      call(make(folder))
  with pytest.raises(IndexError):
    make(folder).batch(0, 2, 2)
  with pytest.raises(IndexError):
    make(folder).batch(-1)


def test_classes_are_numbered_by_the_names_of_the_model(tmp_path):
  """Also where two folders number them differently, each by itself."""
  rows = [(f"text {i}", ("bad", "good", "so-so")[i % 3]) for i in range(60)]
  for name, labels in (("a", "bad,good,so-so"), ("b", "so-so,good,bad")):
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    prepare.prepare(
      [tmp_path / "in.jsonl"],
      tmp_path / name,
      kind="classification",
      tokenizer="bytes",
      labels=labels,
    )
  batching = Batching(seq_len=16, batch_size=8)
  path = f"{tmp_path}/a,{tmp_path}/b"
  make = lambda **more: pipeline.make(path, "train", batching, layout="classification", **more)
  with pytest.raises(UserError, match="have different classes.*model.label_names"):
    make()
  names = ("good", "so-so", "bad", "unused")
  both = make(label_names=names)
  both.check_labels(4)
  for folder in both.sources:
    split, by_text = folder.split, dict(rows)
    for doc, label in enumerate(split.labels):
      ids = split.read(doc, 1, int(split.lengths[doc]) - 1)
      text = (ids - 3).astype(np.uint8).tobytes().decode()
      assert names[int(label)] == by_text[text]
  with pytest.raises(UserError, match="classes bad, good, so-so, but the model has good, bad"):
    make(label_names=("good", "bad"))
