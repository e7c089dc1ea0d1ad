"""Losses agree with those of TRL, where it is installed (`pip install trl`)."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.training.objectives import distillation, preference

pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
LOG_P = -RNG.uniform(1, 20, (4, 6)).astype(np.float32)  # chosen, rejected, and of the reference
LENGTHS = RNG.integers(3, 9, (2, 6)).astype(np.float32)


def ours(loss, **keys):
  c = config.base()
  c.objective.update(keys)
  sides = [preference.Answers(LOG_P[i], LOG_P[2 + i], LENGTHS[i]) for i in range(2)]
  return preference.LOSSES[loss](*sides, c.objective).loss_B


def test_orpo():
  trainer = pytest.importorskip(
    "trl.experimental.orpo.orpo_trainer", exc_type=ImportError
  ).ORPOTrainer
  self = types.SimpleNamespace(beta=0.3, accelerator=types.SimpleNamespace(device="cpu"))
  mean = torch.tensor(LOG_P[:2] / LENGTHS)
  theirs = -trainer.odds_ratio_loss(self, mean[0], mean[1])[0] - mean[0]
  np.testing.assert_allclose(ours("orpo", beta=0.3), theirs, rtol=1e-5)


def test_simpo():
  trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer", exc_type=ImportError).CPOTrainer
  self = types.SimpleNamespace(
    beta=2.0,
    loss_type="simpo",
    simpo_gamma=0.7,
    alpha=0.0,
    label_smoothing=0,
    accelerator=types.SimpleNamespace(device="cpu"),
  )
  mean = torch.tensor(LOG_P[:2] / LENGTHS)
  theirs = trainer.cpo_loss(self, mean[0], mean[1])[0]
  np.testing.assert_allclose(ours("simpo", beta=2.0, gamma=0.7), theirs, rtol=1e-5)


@pytest.mark.parametrize("divergence, beta", [("forward", 0.0), ("reverse", 1.0)])
def test_divergences(divergence, beta):
  trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer", exc_type=ImportError).GKDTrainer
  student, teacher = RNG.normal(size=(2, 3, 5, 11)).astype(np.float32)
  c = config.base()
  c.objective.update(dict(divergence=divergence, temperature=2.0))
  got = distillation.divergence(jnp.array(student), jnp.array(teacher), c.objective)
  theirs = trainer.generalized_jsd_loss(
    torch.tensor(student), torch.tensor(teacher), beta=beta, temperature=2.0, reduction="sum"
  )
  np.testing.assert_allclose(got.sum(), theirs, rtol=1e-5)
