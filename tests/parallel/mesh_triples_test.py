"""Parallel equals serial, gradient by gradient: every triple of mesh axes.

`mesh_pairs_test` compares losses and norms over five steps. Here one step's loss and the gradient
of every single parameter are compared, each to a share of its own largest entry: a small parameter
cannot hide behind a large one. Batches are packed rows that may end in padding.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from jaxgpt import config, tree
from jaxgpt.model import transformer
from jaxgpt.model.experts import dropless
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import train_step
from tests import quick
from tests.parallel.mesh_pairs_test import MODELS, batch, resolved_of

TOLERANCE = 1e-5  # of a gradient's largest entry

LATENT = dict(latent=dict(kv_rank=6, q_rank=10, rope_dim=2, v_dim=4))
TRIPLES = MODELS | {
  "latent attention": LATENT,
  "latent attention and shared experts": LATENT
  | dict(mlp_pattern=("moe",), moe=dict(experts=4, width=16, shared=1, first_dense=0)),
}


def gradients(c, devices):
  """{'loss': loss, path: gradient} of a batch, on the first devices."""
  mesh = mesh_lib.make(c.mesh, jax.devices()[:devices])
  parts = build_lib.build(c, mesh)
  with jax.set_mesh(mesh):
    shardings = jax.tree.map(lambda s: s.sharding, parts.state["params"])
    init = jax.jit(
      lambda: transformer.init(parts.model, jax.random.key(0)), out_shardings=shardings
    )
    f = jax.jit(train_step.accumulated(parts.objective, c.optim.accumulate))
    (loss, weight, _), grads = f(
      init(), None, batches_lib.to_devices(batch(0), mesh), jax.random.key(1)
    )
  out = {"loss": loss, "weight": weight} | tree.flatten(grads)
  return {name: np.asarray(value, np.float64) for name, value in out.items()}


def assert_equal(got, want, tolerance=TOLERANCE):
  assert got.keys() == want.keys() and len(got) > 10
  errors = {
    name: np.abs(got[name] - want[name]).max() / max(np.abs(want[name]).max(), 1e-6)
    for name in want
  }
  worst = max(errors, key=lambda name: errors[name])
  print(f"largest deviation {errors[worst]:.1e}: {worst}")
  assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.1e}"


@functools.cache
def serial(model):
  return gradients(resolved_of(TRIPLES[model]), 1)


CASES = [
  (model, *axes) for axes in itertools.combinations(config.MESH_AXES, 3) for model in TRIPLES
]
# First those that the default suite runs.
CASES.sort(key=lambda case: case != ("moe", "fsdp", "tensor", "expert"))


@pytest.mark.parametrize("model, one, two, three", quick.first(CASES, 1))
def test_each_gradient_on_each_triple_of_axes_is_that_of_one_device(model, one, two, three):
  c = resolved_of(TRIPLES[model], **dict.fromkeys((one, two, three), 2))
  assert_equal(gradients(c, 8), serial(model))


@pytest.mark.slow
@pytest.mark.parametrize(
  "broken, rules",
  [
    ("a sum over devices that is missing", {}),
    (
      "axes of the experts in the wrong order",
      dict(experts="expert,tensor", mlp="none", act_mlp="none"),
    ),
  ],
)
def test_a_broken_rule_or_a_missing_sum_is_seen(monkeypatch, broken, rules):
  c = resolved_of(TRIPLES["moe"], fsdp=2, tensor=2, expert=2, rules=rules)
  want = serial("moe")
  assert_equal(gradients(c, 8), want)
  if broken.startswith("a sum"):
    monkeypatch.setattr(jax.lax, "psum", lambda x, axes: x)
  else:
    monkeypatch.setattr(dropless, "reversed", list, raising=False)
  with pytest.raises(AssertionError, match="layers/"):
    assert_equal(gradients(c, 8), want)
