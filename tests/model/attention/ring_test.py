"""Training with rows sharded over the mesh axis `seq` equals training on one device."""

import functools

import jax
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import evaluation, train_step
from tests.training.train_step_test import TOLERANCE, start, trajectory

MODELS = {
  "dense": {},
  "windows": dict(
    model__attention_pattern=("local", "global"),
    model__window=7,
    model__attn_softcap=5.0,
    model__rope__scaling="yarn",
    model__rope__factor=4.0,
    model__rope__original_len=16,
    model__max_len=32,
  ),
  "masked": dict(
    objective__name="masked_lm",
    model__causal=False,
    model__attention_pattern=("global", "local"),
    model__window=7,
  ),
  "experts": dict(model__mlp_pattern=("moe",), model__moe__experts=4, model__moe__width=32),
  "capacity": dict(
    model__mlp_pattern=("dense", "moe"),
    model__moe__experts=4,
    model__moe__width=32,
    model__moe__capacity=1.0,
  ),
  "recomputed": dict(model__remat="save_attention", optim__accumulate=2),
}


@functools.cache
def _whole(tiny, name):
  return trajectory(tiny(mesh__data=1, **MODELS[name]), 5)[0]


# In the fast suite `tests/parallel/mesh_pairs_test.py` shards rows.
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seq", [2, 4, 8])
def test_sharded_rows_train_as_whole_ones(tiny, name, seq):
  got, _ = trajectory(tiny(mesh__data=1, mesh__seq=seq, **MODELS[name]), 5)
  np.testing.assert_allclose(got, _whole(tiny, name), rtol=TOLERANCE)


@pytest.mark.slow
def test_evaluation_and_model_calls_restore_the_order(tiny):
  """Evaluation calls the objective. A direct model call balances and restores rows itself."""
  found = []
  for seq in (1, 4):
    c = batches_lib.load_tokenizer_and_config(tiny(mesh__data=1, mesh__seq=seq))[1]
    made = mesh.make(c.mesh, jax.devices()[:seq])
    parts = build_lib.build(c, made)
    batch = batches_lib.split_batches(c, "train").batch(0)
    with jax.set_mesh(made):
      state = train_step.first_state(parts.model, parts.tx, c.seed, parts.state)
      sums = evaluation.make_step(parts.objective, made)(
        state["params"], batches_lib.to_devices(batch, made)
      )
      apply = jax.jit(
        lambda p, b, m=parts.model: (
          m.apply({"params": p}, b["tokens"], b["positions"], b["segment_ids"]).logits
        )
      )
      logits = apply(state["params"], batches_lib.to_devices(batch, made))
    found.append((float(sums["nll"]), np.asarray(logits)[batch["segment_ids"] > 0]))
  np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
  np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-5)


def test_a_length_that_cannot_be_sharded_is_a_user_error(tiny):
  with pytest.raises(
    UserError,
    match=r"data.seq_len=36 is not a multiple of 8, which mesh.seq=4 .*"
    r"set data.seq_len=32, or mesh.seq=1",
  ):
    start(tiny(mesh__data=1, mesh__seq=4, data__seq_len=36))
  sizes = {"seq": 8}
  with pytest.raises(
    UserError, match=r"data.seq_len=9000 is not a multiple of 2048.*set data.seq_len=8192"
  ):
    mesh.check_length(sizes, 9000, "splash")
  mesh.check_length(sizes, 8192, "splash")
