"""A pipeline computes the same as a loop over the layers. Here all stages are on one device."""

import itertools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt import config, tree
from jaxgpt.errors import UserError
from jaxgpt.model import pipeline, stacks, transformer
from tests import quick

B, T = 8, 12


def make(**fields):
  """(model, parameters, batch) of a tiny config. Rows are packed, and some have padding."""
  c = config.base()
  c.model.update(
    dict(
      num_layers=4,
      width=16,
      num_heads=2,
      mlp_width=24,
      vocab_size=20,
      max_len=T,
      norm="rmsnorm",
      position="rotary",
      bias=False,
    )
    | fields
  )
  c.data.seq_len = T
  c.objective.name = "classification" if c.model.head == "classifier" else "causal_lm"
  model = transformer.Transformer(ml_collections.FrozenConfigDict(config.resolve(c).model))
  shapes, _ = transformer.abstract(model)
  draw = np.random.default_rng(1)  # not the initial values, many of which are nearly zero
  params = jax.tree.map(
    lambda x: (
      draw.normal(1, 0.2, x.shape).astype(np.float32)
      if x.ndim < 3
      else draw.normal(0, 0.2, x.shape).astype(np.float32)
    ),
    shapes,
  )
  segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
  for row in range(B):
    for number, (a, b) in enumerate([(0, 2 + row % 3), (2 + row % 3, 7), (7, T - row % 2)], 1):
      segments[row, a:b], positions[row, a:b] = number, np.arange(b - a)
  tokens = np.random.default_rng(0).integers(0, 20, (B, T)).astype(np.int32)
  return model, params, (tokens, positions, segments)


def loss_and_gradients(model, params, batch, key=None):
  """Loss, router statistics and gradients, for a loss with a different weight per output."""

  def loss(params):
    out = model.apply({"params": params}, *batch, dropout_key=key)
    weights = jnp.cos(jnp.arange(out.logits.size, dtype=jnp.float32)).reshape(out.logits.shape)
    return (out.logits * weights).sum(), out.router

  (value, router), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return value, router or {}, grads


def assert_same(got, want):
  for (name, a), (_, b) in zip(
    tree.flatten(got[2]).items(), tree.flatten(want[2]).items(), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-6, err_msg=name)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got[1], want[1])


MOE = dict(mlp_pattern=("moe",), moe=dict(experts=4, width=8))
CASES = {
  "one repeat": (dict(remat="dots"), (2, 1, 4)),
  "two repeats": (dict(remat="save_qkv"), (2, 2, 8)),
  # Two dense layers first and one left-over layer last; both stacks are outside the pipeline.
  "more stacks": (
    MOE
    | dict(
      num_layers=7,
      mlp_pattern=("dense", "moe"),
      first_norm=False,
      moe=dict(MOE["moe"], first_dense=2),
      window=3,
      attention_pattern=("local", "global"),
    ),
    (2, 1, 2),
  ),
  "experts": (MOE | dict(num_layers=4, moe=dict(MOE["moe"], capacity=1.0)), (2, 2, 2)),
  "classifier": (
    dict(
      num_layers=3,
      head="classifier",
      pooling="mean",
      causal=False,
      norm_placement="post",
      remat="full",
    ),
    (3, 1, 3),
  ),
}


@pytest.mark.parametrize("case", quick.first(CASES, 2))
def test_a_pipeline_computes_the_same_as_a_loop_over_layers(case):
  fields, pipe = CASES[case]
  model, params, batch = make(**fields)
  batch = jax.tree.map(lambda x: x[: B // pipe[2] * pipe[2]], batch)
  piped = model.clone(pipeline=pipeline.Pipeline(*pipe))
  assert_same(loss_and_gradients(piped, params, batch), loss_and_gradients(model, params, batch))


def test_each_microbatch_and_layer_draws_its_own_dropout():
  model, params, batch = make(num_layers=2, dropout=0.5)
  batch = jax.tree.map(
    lambda x: jnp.broadcast_to(x[:1], x.shape), batch
  )  # the same row eight times
  piped = model.clone(pipeline=pipeline.Pipeline(2, 1, 8))
  apply = jax.jit(lambda key: piped.apply({"params": params}, *batch, dropout_key=key).hidden)
  one = apply(jax.random.key(0))
  assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.combinations(one, 2))
  np.testing.assert_array_equal(one, apply(jax.random.key(0)))


SIZES = dict(data=2, fsdp=1, seq=1, tensor=1, expert=1, stage=4)


def of_config(num_layers=8, **overrides):
  c = config.base()
  c.model.update(dict(num_layers=num_layers, vocab_size=20))
  c.data.batch_size = 16
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
  return stacks.pipeline_of(config.resolve(c), SIZES)


def test_the_pipeline_of_a_config():
  assert of_config() == (4, 1, 8)  # one row of each data shard per microbatch
  assert of_config(mesh__stage_repeats=2, mesh__stage_microbatches=4) == (4, 2, 4)
  assert of_config(optim__accumulate=2) == (4, 1, 4)
  assert of_config().for_rows(12) == (4, 1, 4)  # of another batch
  assert of_config().bubble == pytest.approx(3 / 11)
  assert of_config(mesh__stage_repeats=2).bubble == pytest.approx(3 / 19)
  assert str(of_config(mesh__stage_repeats=2)) == (
    "8 microbatches through 4 stages, 2 repeats, pipeline bubble 16%"
  )


@pytest.mark.parametrize(
  "overrides, words",
  [
    (
      dict(num_layers=6),
      "mesh.stage=4 x mesh.stage_repeats=1 = 4 does not divide the 6 repetitions "
      "of the layers' pattern; choose a product among 2, 3, 6, or another model.num_layers",
    ),
    (dict(num_layers=12, mesh__stage_repeats=3), "mesh.stage_repeats=3 must divide mesh.stage=4"),
    (
      dict(mesh__stage_microbatches=6),
      "stage_microbatches=6 must be a multiple of mesh.stage=4 and "
      "divide the 8 rows of a data shard; choose one of 4, 8",
    ),
    (
      dict(data__batch_size=12),
      "data.batch_size=12 is not a multiple of mesh.data=2 x mesh.stage=4 = 8",
    ),
  ],
)
def test_sizes_that_do_not_divide_are_user_errors(overrides, words):
  with pytest.raises(UserError) as e:
    of_config(**overrides)
  assert words in str(e.value)
