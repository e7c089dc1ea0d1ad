"""Mixtures: which source each row comes from, exactly, and what that costs."""

import collections
import json
import math
import os

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxgpt.data import mixture, pipeline
from jaxgpt.data import source as source_lib
from jaxgpt.data.batch_source import Batching
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import prepare

WEIGHTS = st.lists(st.one_of(st.just(0), st.floats(0.001, 10)), min_size=1, max_size=6).filter(any)


@hypothesis.settings(deadline=None)  # a busy machine is no failure
@hypothesis.given(
  st.integers(0, 60), st.integers(1, 50), st.integers(0, 10**20), st.integers(0, 10**20)
)
def test_floor_sum_is_the_sum(n, m, a, b):
  assert mixture.floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@hypothesis.settings(deadline=None)  # a busy machine is no failure
@hypothesis.given(st.data(), WEIGHTS, st.integers(0, 2**31), st.integers(0, 300))
def test_each_source_is_counted_up_from_zero(data, weights, seed, first):
  """From any position on, the mixture says what going through all positions says."""
  others = WEIGHTS.map(lambda w: (w * len(weights))[: len(weights)]).filter(any)
  steps = sorted(data.draw(st.sets(st.integers(1, 200), max_size=3)))
  changes = [(step, data.draw(others)) for step in steps]
  mix = mixture.Mixture(len(weights), weights, changes, seed)
  seen = collections.Counter()
  expected = []
  for p in range(first + 20):
    if p == first:
      assert mix.counts(p) == [seen[i] for i in range(len(weights))]
    source = mix.locate(p, 1)[0].item()
    now = ([weights] + [w for at, w in changes if at <= p])[-1]
    assert now[source] > 0
    expected.append((source, seen[source]))
    seen[source] += 1
  sources, numbers = mix.locate(first, 20)
  assert list(zip(sources.tolist(), numbers.tolist(), strict=True)) == expected[first:]


def test_proportions_hold_in_every_stretch():
  weights = np.array([0.6, 0.25, 0.1, 0.05])
  mix = mixture.Mixture(4, weights, seed=3)
  for first in (0, 12_345, 10**15):
    before = np.array(mix.counts(first))
    for n in (10, 100, 10_000, 10**9):
      counts = np.array(mix.counts(first + n)) - before
      assert np.abs(counts - n * weights).max() <= 1 + math.log2(n), (first, n, counts)


def test_a_position_far_out_is_placed_at_once(monkeypatch):
  calls, real = [], mixture.floor_sum
  monkeypatch.setattr(mixture, "floor_sum", lambda *a: calls.append(a) or real(*a))
  mixture.Mixture(200, [1.0] * 200).locate(10**16, 8)
  assert len(calls) <= 4 * 8, "two sums for each end of an interval that was drawn"


def test_seeds_draw_in_another_order():
  orders = {tuple(mixture.Mixture(3, [1, 2, 3], seed=s).locate(0, 30)[0]) for s in range(5)}
  assert len(orders) == 5


@pytest.mark.parametrize(
  "weights, changes, message",
  [
    ([0.5, -1], (), "at least 0"),
    ([0, 0], (), "one above 0"),
    ([1, float("nan")], (), "at least"),
    ([1, 1], [(5, [1])], "1 weights .* for 2 sources"),
  ],
)
def test_weights_that_are_none(weights, changes, message):
  with pytest.raises(UserError, match=message):
    mixture.Mixture(2, weights, changes)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
  """data.path of three folders with 100, 50 and 25 documents, 10 tokens each with eos."""
  path = tmp_path_factory.mktemp("three")
  for name, count in (("a", 100), ("b", 50), ("c", 25)):
    lines = (json.dumps({"text": f"{name}{i:07d}{name}"}) + "\n" for i in range(count))
    (path / f"{name}.jsonl").write_text("".join(lines))
    prepare.prepare(
      path / f"{name}.jsonl",
      path / f"data_{name}",
      tokenizer="bytes",
      validation=0.2 if name != "c" else 0,
      test=0,
    )
  return ",".join(str(path / f"data_{name}") for name in "abc")


def make(path, split="train", batch_size=8, **weights):
  return pipeline.make(path, split, Batching(seq_len=10, batch_size=batch_size), **weights)


def texts(batch):
  return ["".join(chr(t - 3) for t in row if t > 2) for row in batch["tokens"]]


def test_sources_share_the_rows_by_weight_and_have_their_own_epochs(three):
  b = make(three, weights=(1, 1, 2))
  seen = collections.Counter()
  for step in range(50):
    for row, text in zip(b.rows(step), texts(b.batch(step)), strict=True):
      assert text[0] == "abc"[row.source]
      seen[row.source, row.epoch, text] += 1
  assert set(seen.values()) == {1}, "within an epoch of its source, no document comes twice"
  epochs = b.epochs(50)
  assert list(epochs) == ["data_a", "data_b", "data_c"]
  assert epochs["data_c"] == pytest.approx(200 / 25, abs=0.1)
  for number, n in enumerate(epochs.values()):
    rows = b.sources[number].pack.num_rows
    assert sum(count for (s, _, _), count in seen.items() if s == number) == round(n * rows)


def test_without_weights_all_sources_end_their_epochs_together(three):
  epochs = make(three).epochs(1000).values()
  assert max(epochs) - min(epochs) < 0.2


def test_a_curriculum_changes_the_weights_at_its_steps(three):
  b = make(three, weights=(1, 0, 0), weight_changes=((3, (0, 1, 0)), (5, (0, 0, 1))))
  assert [{r.source for r in b.rows(step)} for step in range(7)] == [
    {0},
    {0},
    {0},
    {1},
    {1},
    {2},
    {2},
  ]
  assert [r.epoch * 25 for r in b.rows(5)] == [0] * 8, "a source that was not drawn is at its start"


def test_a_source_has_its_own_order(three):
  path = three.split(",")[0]
  same = make(f"{path},{path}", weights=(1, 1))
  order = {0: [], 1: []}
  for step in range(10):
    for row in same.rows(step):
      order[row.source].append(row.row)
  assert order[0][:30] != order[1][:30]
  alone = make(path)
  assert order[0][:8] == [r.row for r in alone.rows(0)]


def test_held_out_rows_of_all_sources_come_once(three):
  b = make(three, split="validation", weights=(1, 0, 0))
  seen = [t for batch in b.epoch_batches() for t in texts(batch) if t]
  assert len(seen) == len(set(seen)) == sum(s.split.num_documents for s in b.sources)
  assert {t[0] for t in seen} == {"a", "b"}, "c has no validation split"
  assert b.bytes == 9 * len(seen) and b.predictions == 10 * len(seen)


def test_the_digest_names_all_sources_in_their_order(three):
  a, b, c = three.split(",")
  digests = [make(p).digest for p in (a, three, f"{b},{a},{c}", f"{a},{b}")]
  assert len(set(digests)) == 4
  assert digests[0] == make(a).sources[0].split.digest


def test_sources_of_two_tokenizers_are_refused(three, tmp_path):
  (tmp_path / "x.txt").write_text("some words " * 100)
  prepare.prepare(
    tmp_path / "x.txt", tmp_path / "x", tokenizer="sentencepiece:290", validation=0, test=0
  )
  with pytest.raises(UserError, match=r"mixes tokenizers.*sentencepiece.*--tokenizer="):
    make(f"{three},{tmp_path / 'x'}")


def test_weights_for_other_sources_than_there_are(three):
  with pytest.raises(UserError, match="2 weights .* for 3 sources"):
    make(three, weights=(1, 1))


def threads_of_the_system():
  with open("/proc/self/status") as f:
    return next(int(line.split()[1]) for line in f if line.startswith("Threads:"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts in /proc")
def test_two_hundred_sources_need_neither_threads_nor_files(three, monkeypatch):
  monkeypatch.setattr(source_lib, "_readers", source_lib._Readers(16))
  folder = three.split(",")[0]
  copies = []
  for i in range(200):
    copies.append(f"{folder}{i}")
    os.symlink(folder, copies[-1])

  def threads_and_files(path):
    """The most that were there, and the sources that were drawn."""
    b = make(path, batch_size=50)
    batches = b.iterate(threads=4, prefetch=4)
    seen, threads, files = set(), 0, 0
    for step in range(12):
      next(batches)
      seen |= {r.source for r in b.rows(step)}
      threads = max(threads, threads_of_the_system())
      files = max(files, len(os.listdir("/proc/self/fd")))
    batches.close()
    return threads, files, len(seen)

  one_threads, one_files, _ = threads_and_files(folder)
  threads, files, seen = threads_and_files(",".join(copies))
  assert seen == 200
  assert threads <= one_threads + 4, "threads that end late; ArrayRecord has one pool for all files"
  assert files <= one_files + 16 + 8, "open ones, and those of 4 threads and prefetched batches"


def test_the_digest_names_all_folders_whichever_have_the_split(tmp_path):
  for name, validation in (("a", 0.3), ("b", 0.0)):
    (tmp_path / f"{name}.jsonl").write_text(
      "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(60))
    )
    prepare.prepare(
      tmp_path / f"{name}.jsonl",
      tmp_path / name,
      tokenizer="bytes",
      validation=validation,
      test=0.0,
      cut_chars=0,
    )
  path = f"{tmp_path / 'a'},{tmp_path / 'b'}"
  train, held_out = (
    pipeline.make(path, split, Batching(seq_len=16, batch_size=2))
    for split in ("train", "validation")
  )
  assert len(held_out.sources) == 1 and held_out.digest == train.digest
