"""Strided windows: each prediction is scored once, with as much context as the stride allows."""

import functools

import numpy as np
import pytest

from jaxgpt.data import pipeline, strided
from jaxgpt.data.batch_source import Batching


@functools.cache
def by_definition(n, seq_len, stride):
  """{prediction: (first, end) of the window that scores it}."""
  out = {}
  for p in range(n):
    end = seq_len
    while end <= p:
      end += stride
    end = min(end, n)
    out[p] = (max(end - seq_len, 0), end)
  return out


@pytest.mark.parametrize("seq_len, stride", [(8, 4), (8, 8), (8, 1), (5, 3), (1, 1)])
def test_windows_follow_their_definition(seq_len, stride):
  lengths = np.arange(0, 40)
  found = {n: {} for n in lengths.tolist()}
  for doc, start, length, first in zip(*strided.windows(lengths, seq_len, stride)):
    assert 0 < length <= seq_len and start <= first < start + length
    for p in range(first, start + length):
      assert p not in found[doc]
      found[doc][p] = (start, start + length)
  assert found == {n: by_definition(n, seq_len, stride) for n in lengths.tolist()}


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_rows_weigh_each_prediction_once_and_hold_its_context(corpus, stride):
  data = pipeline.make(corpus, "validation", Batching(seq_len=16, batch_size=4))
  data = data.laid_out(strided.StridedLM(stride))
  split = data.sources[0].split
  seen = {doc: [] for doc in range(split.num_documents)}
  for step, batch in enumerate(data.epoch_batches()):
    for i, (_, row) in enumerate(data.epoch_rows(step)):
      at = 0
      for doc, start, length in zip(*(x.tolist() for x in data.sources[0].pack.spans(row))):
        stored = split.read(doc, start, length + 1)
        np.testing.assert_array_equal(batch["tokens"][i, at : at + length], stored[:-1])
        np.testing.assert_array_equal(batch["targets"][i, at : at + length], stored[1:])
        scored = np.flatnonzero(batch["loss_weights"][i, at : at + length])
        want = by_definition(int(split.lengths[doc]), 16, stride)
        assert all(want[start + p] == (start, start + length) for p in scored.tolist())
        seen[doc] += (start + scored).tolist()
        at += length
      assert not batch["loss_weights"][i, at:].any()
  assert {doc: sorted(p) for doc, p in seen.items()} == {
    doc: list(range(n)) for doc, n in enumerate(split.lengths.tolist())
  }
