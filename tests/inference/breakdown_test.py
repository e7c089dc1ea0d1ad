"""Tables of an evaluation against sums over single predictions."""

import collections
import math

import numpy as np
import pytest

from jaxgpt.data import pipeline
from jaxgpt.data.batch_source import Batching
from jaxgpt.inference import breakdown
from jaxgpt.inference.scoring import Scores


@pytest.fixture(scope="module")
def scored(corpus):
  """(data, Breakdown, {(document, position): (weight, nll, correct)}) of random scores."""
  data = pipeline.make(corpus, "train", Batching(seq_len=40, batch_size=4))
  found, single, draws = breakdown.Breakdown(data), [], np.random.default_rng(0)
  for step in range(data.steps_per_epoch):
    rows = data.epoch_rows(step)
    shape = (4, 40)
    scores = Scores(
      draws.integers(0, 2, shape).astype(np.float32),
      draws.exponential(size=shape).astype(np.float32),
      draws.integers(0, 2, shape).astype(bool),
      draws.random(shape, np.float32),
    )
    found.add(rows, scores)
    for i, (_, row) in enumerate(rows):
      at = 0
      for doc, _, length in zip(*(x.tolist() for x in data.sources[0].pack.spans(row))):
        for p in range(length):
          w, nll, correct = (float(x[i, at + p]) for x in scores[:3])
          single.append((doc, p, w, nll, correct))
        at += length
  return data, found, single


def test_weights_that_give_nan_are_a_loss_that_is_not_finite(corpus):
  data = pipeline.make(corpus, "train", Batching(seq_len=40, batch_size=4))
  found, nan = breakdown.Breakdown(data), np.full((4, 40), np.nan, np.float32)
  found.add(data.epoch_rows(0), Scores(np.ones((4, 40), np.float32), nan, nan > 0, nan))
  assert math.isnan(found.result(None)["loss"])


def sums(single, key):
  out = collections.defaultdict(lambda: np.zeros(3))
  for doc, p, w, nll, correct in single:
    out[key(doc, p)] += w, w * nll, w * correct
  return out


def check(rows, want):
  assert len(rows) == len(want)
  for row in rows:
    weight, nll, correct = want[row["name"]]
    assert row["predictions"] == weight
    assert row["loss"] == pytest.approx(nll / weight)
    assert row["perplexity"] == pytest.approx(math.exp(nll / weight))
    assert row["accuracy"] == pytest.approx(correct / weight)


def test_tables_are_sums_over_single_predictions(scored):
  data, found, single = scored
  split, tables = data.sources[0].split, found.tables()
  check(
    tables["position"],
    sums(single, lambda _, p: "0-15" if p < 16 else "16-31" if p < 32 else "32-63"),
  )

  def length(doc, _):
    n = int(split.lengths[doc])
    low = 0 if n < 64 else 1 << (n.bit_length() - 1)
    return f"{low}-{63 if n < 64 else 2 * low - 1}"

  check(tables["length"], sums(single, length))
  whole = sums(single, lambda doc, p: "all")["all"]
  result = found.result(2.0)
  assert result["tokens"] == whole[0]
  assert result["loss"] == pytest.approx(whole[1] / whole[0])
  assert result["bits_per_byte"] == pytest.approx(whole[1] / whole[0] / math.log(2) / 2)


def test_sources_are_files_and_few(scored):
  _, found, single = scored
  rows = found.tables()["source"]
  assert len(rows) == breakdown.MOST_SOURCES
  assert rows[-1]["name"].endswith("other files")
  assert sum(row["predictions"] for row in rows) == sum(w for _, _, w, _, _ in single)
  assert sum(row["documents"] for row in rows) == len({doc for doc, _, w, _, _ in single if w})


def test_calibration_error_by_its_definition():
  # 8 predictions at confidence 0.75, 4 of them right: 0.25 off. 2 at 0.5, 1 right: none.
  bins = np.array([[8, 2, 0], [6.0, 1.0, 0], [4, 1, 0]])
  assert breakdown.calibration_error(bins) == pytest.approx((8 * 0.25 + 2 * 0) / 10)


def test_tables_align_as_text(scored):
  lines = breakdown.text(scored[1].tables())
  table = lines[: lines.index("")]
  assert len({len(line) for line in table}) == 1 and table[0].split()[:3] == [
    "by",
    "source",
    "documents",
  ]
