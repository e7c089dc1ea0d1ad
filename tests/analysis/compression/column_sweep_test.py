"""The sweep over inputs, against optimal brain surgery with an inverse for each step."""

import numpy as np
import pytest

from jaxgpt.analysis.compression import column_sweep, masks, prune

INPUTS, OUTPUTS = 24, 5


@pytest.fixture(scope="module")
def problem():
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(INPUTS, INPUTS))
  x_TI = rng.normal(size=(200, INPUTS)) @ mix
  x_TI[:, 7] = 0  # an input that is never used
  return (
    rng.normal(size=(INPUTS, OUTPUTS)).astype("float32"),
    (x_TI.T @ x_TI).astype("float32"),
    x_TI,
  )


def by_definition(weight_IO, products_II, group, choose):
  """Removes inputs in order, with the inverse of H over the inputs that are left at each step."""
  w, h = weight_IO.astype("float64"), products_II.astype("float64")
  dead = np.diag(h) == 0
  damp = column_sweep.DAMP * np.diag(h).mean()
  h = h + np.diag(np.where(dead, 1.0, 0.0) + damp)
  w[dead] = 0
  for j in range(len(w)):
    if j % group == 0:
      errors = []
      for k in range(
        j, j + group
      ):  # of removing the weights of input k, once those before are fixed
        errors.append(w[k] ** 2 / np.linalg.inv(h[k:, k:])[0, 0])
      kept = choose(np.array(errors))
    inverse = np.linalg.inv(h[j:, j:])
    for o in range(w.shape[1]):
      if not kept[j - j // group * group, o]:
        w[j:, o] -= w[j, o] / inverse[0, 0] * inverse[0]
        w[j, o] = 0
  return w


@pytest.mark.parametrize("text", ["0.5", "2:4", "4:8"])
def test_sparsegpt_equals_its_definition(problem, text):
  weight_IO, products_II, _ = problem
  sparsity = masks.parse(text)
  choose = lambda scores: masks.by_scores(scores, sparsity, per_output=False)
  expected = by_definition(weight_IO, products_II, sparsity.group or INPUTS, choose)
  found = np.asarray(prune.sparsegpt(weight_IO, products_II, sparsity))
  assert ((found == 0) == (expected == 0)).all()
  np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)
  if sparsity.group:
    zeros = (found == 0).reshape(-1, sparsity.group, OUTPUTS).sum(1)
    assert (zeros >= sparsity.group - sparsity.kept).all()


def test_weights_that_stay_make_up_for_those_that_are_removed(problem):
  weight_IO, products_II, x_TI = problem
  error = lambda w: np.square(x_TI @ (w - weight_IO)).sum()
  half = masks.parse("0.5")
  smallest = np.where(masks.largest(abs(weight_IO), 0.5), weight_IO, 0)
  assert error(np.asarray(prune.sparsegpt(weight_IO, products_II, half))) < 0.7 * error(smallest)


def test_blocks_do_not_change_the_result(problem, monkeypatch):
  weight_IO, products_II, _ = problem
  whole = prune.sparsegpt(weight_IO, products_II, masks.parse("2:4"))
  monkeypatch.setattr(column_sweep, "_BLOCK", 8)
  in_blocks = prune.sparsegpt(weight_IO, products_II, masks.parse("2:4"))
  np.testing.assert_allclose(in_blocks, whole, atol=1e-4)
