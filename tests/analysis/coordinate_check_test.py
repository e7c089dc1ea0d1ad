"""The coordinate check passes with muP, and fails without it and with one wrong multiplier."""

import math

import jax
import numpy as np
import pytest

from jaxgpt.analysis import coordinate_check
from jaxgpt.errors import UserError
from jaxgpt.model.scaling import mup
from jaxgpt.parallel import mesh


def test_problems_are_growth_and_changes_that_are_not_flat():
  problem = coordinate_check._problem
  assert problem(0.1, -0.1, 0.25) == "" == problem(-0.5, 0.0, 0.25)
  assert problem(0.5, 0.5, 0.25) == "grows, learns faster"
  assert problem(0.0, -0.5, 0.25) == "learns slower"
  assert problem(0.0, -0.5, 0.25, may_fall=True) == ""
  assert problem(0.0, 0.5, 0.25, may_fall=True) == "learns faster"
  row = coordinate_check.Row("logits", (1.0, 2.0), (1.0, 2.0), 1.0, 1.0, math.nan, "grows", False)
  lines = coordinate_check.lines(coordinate_check.Check("width", (8, 16), 4, 1, 0.25, [row]))
  assert lines[1].split()[1:5] == ["width", "8", "width", "16"]
  assert lines[2].split() == ["logits", "1", "2", "+1.00", "+1.00", "grows"]
  assert lines[-1].startswith("FAILS: 1 of 1 activations")


def test_problems_within_the_noise_of_seeds_are_unclear():
  def row(*slopes):
    """Of an activation with these slopes of changes, one per seed."""
    slopes = np.stack([np.zeros(len(slopes)), slopes], 1)
    return coordinate_check._row("MLP", (1.0, 1.0), (1.0, 0.8), slopes, 0.25)

  noisy, clear = row(-0.9, 0.3, -0.5, -0.1), row(-0.32, -0.28, -0.31, -0.29)
  assert noisy.change_slope == clear.change_slope == pytest.approx(-0.3)
  assert noisy.error == pytest.approx(np.std([-0.9, 0.3, -0.5, -0.1], ddof=1) / 2)
  assert (noisy.problem, noisy.unclear) == ("learns slower", True)
  assert (clear.problem, clear.unclear) == ("learns slower", False)
  assert not row(-0.3).unclear, "one seed tells nothing about noise"
  assert row(0.1, -0.1).problem == "" and not row(0.1, -0.1).unclear

  check = coordinate_check.Check("width", (8, 16), 4, 4, 0.25, [noisy])
  assert check.unclear and not check.passes
  lines = coordinate_check.lines(check)
  assert lines[2].split() == ["MLP", "1", "0.8", "-0.30", "±", "0.26", "+0.00", "learns", "slower?"]
  assert lines[-1].startswith("UNCLEAR: 1 of 1 activations") and "more seeds than 4" in lines[-1]
  both = check._replace(rows=[noisy, clear])
  assert not both.unclear and coordinate_check.lines(both)[-1].startswith("FAILS: 2 of 2")


def test_slopes_are_those_of_lines_through_the_logarithms():
  log_at, rng = np.log([64.0, 128.0, 512.0]), np.random.default_rng(0)
  logs = rng.normal(size=(3, 2, 2))
  slopes = coordinate_check._slopes(log_at, logs)
  for seed in range(2):
    for i in range(2):
      assert slopes[seed, i] == pytest.approx(np.polyfit(log_at, logs[:, seed, i], 1)[0])


@pytest.fixture
def check(tiny, monkeypatch):
  """A function (overrides, **options) -> check of a small config at three sizes."""
  real = mesh.make
  monkeypatch.setattr(mesh, "make", lambda c_mesh: real(c_mesh, jax.devices()[:1]))

  def run(overrides, at=(64, 128, 256), seeds=1, **options):
    fields = dict(model__gated=False, model__activation="relu2", model__width=64)
    fields |= dict(model__mlp_width=256, optim__lr=4e-3, data__seq_len=64)
    return coordinate_check.check(tiny(**fields | overrides), at, seeds=seeds, **options)

  return run


def failing(found):
  return {row.name.split(",")[0] for row in found.rows if row.problem}


def test_pairs_are_refused(check, pairs):
  with pytest.raises(
    UserError, match="objective.name='preference'.*chosen, rejected.* causal_lm and"
  ):
    check(dict(objective__name="preference", data__path=pairs), at=(32, 64))


@pytest.mark.slow
@pytest.mark.parametrize("grow", coordinate_check.GROWS)
def test_passes_with_mup_and_fails_without(check, grow):
  # The change of layer 0's attention differs between seeds by a factor of 3.
  found = check(dict(model__mup__base_width=64), grow=grow, seeds=12)
  assert found.passes, "\n".join(coordinate_check.lines(found))
  assert {"attention", "MLP", "residual stream", "logits"} <= failing(check({}, grow=grow))


@pytest.mark.slow
def test_fails_with_one_wrong_multiplier(check, monkeypatch):
  on = dict(model__mup__base_width=64)
  assert failing(check(on | dict(model__output_scale=1.0))) >= {"logits"}
  real = mup.factors
  for name in ("up", "down"):  # a rate that does not fall with the width
    axes = {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")}[name]
    wrong = lambda c, a, axes=axes: (
      real(c, a)._replace(rate=1.0) if tuple(a) == axes else real(c, a)
    )
    monkeypatch.setattr(mup, "factors", wrong)
    assert "MLP" in failing(check(on)), name
  wrong = lambda c, a: real(c, a)._replace(init=1.0)
  monkeypatch.setattr(mup, "factors", wrong)
  assert not check(on).passes


@pytest.mark.slow
def test_depth(check):
  on = dict(model__mup__base_depth=2, optim__lr=1e-2)
  found = check(on, at=(2, 4, 8), over="depth")
  assert found.passes, "\n".join(coordinate_check.lines(found))
  assert not check(dict(optim__lr=1e-2), at=(2, 4, 8), over="depth").passes
