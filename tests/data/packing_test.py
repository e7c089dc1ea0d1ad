"""Properties of every packing, and what each is for."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxgpt.data import packing

LENGTHS = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 100)), max_size=60)


@pytest.mark.parametrize("name", packing.PACKINGS)
@hypothesis.given(lengths=LENGTHS, seq_len=st.integers(1, 16), window=st.integers(1, 70))
def test_each_prediction_is_in_one_span_and_no_row_is_too_long(name, lengths, seq_len, window):
  options = {"window": window} if name == "best_fit" else {}
  p = packing.PACKINGS[name](np.array(lengths, np.int64), seq_len, **options)
  used = [np.zeros(n, int) for n in lengths]
  for row in range(len(p)):
    doc, start, length = p.spans(row)
    assert 1 <= length.sum() <= seq_len
    assert (length > 0).all()
    for d, s, n in zip(doc, start, length, strict=True):
      assert s + n <= lengths[d]
      used[d][s : s + n] += 1
  assert all((u == 1).all() for u in used)
  assert p.padding_share == pytest.approx(
    1 - sum(lengths) / max(len(p) * seq_len, 1) if len(p) else 0
  )
  again = packing.PACKINGS[name](lengths, seq_len, **options)
  for a, b in zip(
    (p.row_offsets, p.doc, p.start, p.length),
    (again.row_offsets, again.doc, again.start, again.length),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def naive_best_fit(sizes, capacity):
  """Best-fit decreasing as a textbook has it: how much room each row has left."""
  left = []
  for size in sorted(sizes, reverse=True):
    fitting = [i for i, room in enumerate(left) if room >= size]
    if fitting:
      left[min(fitting, key=lambda i: left[i])] -= size
    else:
      left.append(capacity - size)
  return sorted(left)


@hypothesis.given(st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_best_fit_is_best_fit_decreasing(sizes):
  p = packing.best_fit(sizes, 20)
  left = sorted(20 - int(p.spans(r)[2].sum()) for r in range(len(p)))
  assert left == naive_best_fit(sizes, 20)


@hypothesis.given(LENGTHS, st.integers(1, 16))
def test_best_fit_cuts_a_document_no_more_than_it_must(lengths, seq_len):
  p = packing.best_fit(lengths, seq_len)
  counts = np.bincount(p.doc, minlength=len(lengths))
  np.testing.assert_array_equal(counts, -(-np.array(lengths, int) // seq_len))


def test_rows_and_their_spans_go_forward_through_the_documents():
  lengths = np.random.default_rng(0).integers(1, 60, 300)
  p = packing.best_fit(lengths, 32, window=50)
  place = np.cumsum(lengths)[p.doc] - lengths[p.doc] + p.start  # in the stream of all documents
  assert (np.diff(place[p.row_offsets[:-1]]) > 0).all()
  for row in range(len(p)):
    assert (np.diff(place[p.row_offsets[row] : p.row_offsets[row + 1]]) > 0).all()


def test_documents_further_apart_than_the_window_share_no_row():
  p = packing.best_fit(np.random.default_rng(0).integers(1, 16, 300), 32, window=50)
  rows = np.repeat(np.arange(len(p)), np.diff(p.row_offsets))
  windows_of_row = {row: set() for row in range(len(p))}
  for row, doc in zip(rows.tolist(), p.doc.tolist(), strict=True):
    windows_of_row[row].add(doc // 50)
  assert all(len(windows) == 1 for windows in windows_of_row.values())


def test_web_like_lengths_need_less_than_one_percent_padding():
  lengths = np.random.default_rng(0).lognormal(6.2, 1.1, 20_000).astype(int) + 1
  p = packing.best_fit(lengths, 2048)
  assert p.padding_share < 0.002
  assert p.doc.dtype == p.start.dtype == p.length.dtype == np.int32
  assert packing.one_per_row(lengths, 2048).padding_share > 0.5


def test_concat_pads_the_last_row_only():
  p = packing.concat([5, 0, 0, 3, 9], 4)
  rows = [list(zip(*(a.tolist() for a in p.spans(r)), strict=True)) for r in range(len(p))]
  assert rows == [[(0, 0, 4)], [(0, 4, 1), (3, 0, 3)], [(4, 0, 4)], [(4, 4, 4)], [(4, 8, 1)]]


def test_one_per_row_keeps_documents_apart():
  p = packing.one_per_row([3, 0, 9], 4)
  rows = [list(zip(*(a.tolist() for a in p.spans(r)), strict=True)) for r in range(len(p))]
  assert rows == [[(0, 0, 3)], [(2, 0, 4)], [(2, 4, 4)], [(2, 8, 1)]]


@pytest.mark.parametrize("name", packing.PACKINGS)
def test_no_document_gives_no_row(name):
  assert len(packing.PACKINGS[name]([], 8)) == len(packing.PACKINGS[name]([0], 8)) == 0
