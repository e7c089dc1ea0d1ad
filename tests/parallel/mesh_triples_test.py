"""Parallel equals serial, gradient by gradient: every triple of mesh axes, and drawn models.

`mesh_pairs_test` compares losses and norms over five steps. Here one step's loss and the gradient
of every single parameter are compared, each to a share of its own largest entry: a small parameter
cannot hide behind a large one. Batches are packed rows that may end in padding.
"""

import functools
import itertools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxgpt import config, tree
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from jaxgpt.model.experts import dropless
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import train_step
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


@pytest.mark.slow
@pytest.mark.parametrize("model, one, two, three", CASES)
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


@st.composite
def drawn(draw):
  """(fields of `model`, of `mesh`, accumulate, loss_chunk) of a small config."""
  one_of = lambda *values: draw(st.sampled_from(values))
  sizes = dict.fromkeys(config.MESH_AXES, 1)
  for axis in draw(st.permutations(config.MESH_AXES))[:3]:
    sizes[axis] = one_of(1, 2, 2)
  mlp = one_of("dense", "moe", "some", "capacity")
  experts = dict(
    experts=one_of(4, 8),
    width=16,
    per_token=one_of(1, 2, 3),
    shared=one_of(0, 1),
    router=one_of("softmax", "sigmoid"),
    normalize=one_of(True, False),
    capacity=1.0 if mlp == "capacity" else 0.0,
  )
  model = dict(
    norm=one_of("rmsnorm", "layernorm"),
    norm_placement=one_of("pre", "both", "branch"),
    gated=one_of(True, False),
    bias=one_of(True, False),
    tie_embeddings=one_of(True, False),
    num_kv_heads=one_of(2, 4),
    attn_softcap=one_of(None, 5.0),
    logit_softcap=one_of(None, 3.0),
    qk_norm=one_of("none", "head"),
    remat=one_of("none", "full", "dots", "save:q,k,v,attention", "save:up"),
  )
  if one_of(False, True):
    model |= dict(attention_pattern=("local", "global"), window=5)
  if one_of(False, False, True):
    model |= LATENT | dict(num_kv_heads=4, attention_pattern=("global",), qk_norm="none")
  if mlp != "dense":
    model |= dict(mlp_pattern=("dense", "moe") if mlp == "some" else ("moe",), moe=experts)
  return model, sizes, one_of(1, 2), one_of(0, 32)


@pytest.mark.slow
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True, database=None)
@hypothesis.given(drawn())
def test_drawn_models_on_drawn_meshes_have_the_gradients_of_one_device(case):
  model, sizes, accumulate, loss_chunk = case

  def made(mesh):
    c = resolved_of(model, **mesh)
    c = c.copy_and_resolve_references().unlock()
    c.optim.accumulate, c.objective.loss_chunk = accumulate, loss_chunk
    return c.lock()

  devices = int(np.prod(list(sizes.values())))
  try:
    build_lib.build(made(sizes), mesh_lib.make(made(sizes).mesh, jax.devices()[:devices]))
  except UserError as e:
    print(f"refused: {e}")
    hypothesis.reject()
  print(case)
  # Microbatches and layers without a norm before them add rounding.
  assert_equal(gradients(made(sizes), devices), gradients(made({}), 1), 5e-5)
