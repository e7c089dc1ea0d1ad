"""Parallel equals serial: every mesh axis, and every pair of axes, gives the results of one device.

The first five losses and gradient norms of a tiny model, in float32, on packed batches: rows of
three documents, of which some end in padding.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxgpt import config
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import train_step
from tests import quick
from tests.parallel.mesh_test import Chip

STEPS, ROWS, LENGTH, VOCABULARY = 5, 8, 16, 32
TOLERANCE = 5e-6  # relative: what the order of sums in float32 may make over five steps

MODELS = {
  "dense": {},
  "moe": dict(mlp_pattern=("moe",), moe=dict(experts=4, width=16)),
  "moe with capacity": dict(mlp_pattern=("moe",), moe=dict(experts=4, width=16, capacity=1.0)),
}


def resolved(model, **mesh):
  """A config of four small layers, on the axes given and no others."""
  return resolved_of(MODELS[model], **mesh)


def resolved_of(fields, **mesh):
  """As `resolved`, of fields of the config's `model` section."""
  c = config.base()
  c.model.update(
    dict(
      num_layers=4,
      width=16,
      num_heads=4,
      mlp_width=32,
      vocab_size=VOCABULARY,
      norm="rmsnorm",
      position="rotary",
      activation="silu",
      gated=True,
      bias=False,
      init_std=0.1,
    )
    | fields
  )
  c.data.update(dict(seq_len=LENGTH, batch_size=ROWS))
  c.optim.lr = 1e-2
  c.schedule.warmup_steps = 1
  c.train.steps = STEPS
  c.mesh.update(dict(fsdp=1) | mesh)
  return config.resolve(c)


def batch(step):
  """Packed rows: three documents each, the last of them as long as fits or a little shorter."""
  draw = np.random.default_rng(step)
  lengths = draw.integers(3, LENGTH // 2 - 2, (ROWS, 2))
  ends = np.c_[lengths.cumsum(1), LENGTH - draw.integers(0, 3, ROWS)]
  place = np.arange(LENGTH)
  document = (place[None, :, None] >= ends[:, None]).sum(-1)
  starts = np.c_[np.zeros(ROWS, int), ends]
  real = document < 3
  tokens = draw.integers(0, VOCABULARY, (ROWS, LENGTH))
  return {
    "tokens": tokens.astype(np.int32),
    "targets": ((tokens * 5 + 3) % VOCABULARY).astype(np.int32),
    "loss_weights": real.astype(np.float32),
    "segment_ids": np.where(real, document + 1, 0).astype(np.int32),
    "positions": (place - np.take_along_axis(starts, document, 1)).astype(np.int32),
  }


def trajectory(c, mesh):
  """[(loss, gradient norm)] of the first steps."""
  parts = build_lib.build(c, mesh)
  step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch(0))
  compiled = train_step.compile(step, parts.state, shapes, mesh)
  with jax.set_mesh(mesh):
    state = train_step.first_state(parts.model, parts.tx, c.seed, parts.state)
  out = []
  for i in range(STEPS):
    state, metrics = compiled(state, batches_lib.to_devices(batch(i), mesh))
    # Read at once: with jaxlib 0.12.0.1 two programs in flight have blocked each other here too.
    out.append([np.float64(metrics[name]) for name in ("loss", "grad_norm")])
  return np.array(out)


@functools.cache
def serial(model):
  return trajectory(resolved(model), mesh_lib.make(config.base().mesh, jax.devices()[:1]))


def assert_equal_to_serial(model, mesh=None, **axes):
  c = resolved(model, **axes)
  sizes = [c.mesh[axis] for axis in config.MESH_AXES]
  got = trajectory(c, mesh or mesh_lib.make(c.mesh, jax.devices()[: int(np.prod(sizes))]))
  print(f"largest deviation {np.abs(got / serial(model) - 1).max():.1e}: {model}, {axes}")
  np.testing.assert_allclose(got, serial(model), rtol=TOLERANCE)


# Each pair of axes is in one of these six.
@pytest.mark.parametrize(
  "model, axes, more",
  quick.first(
    [
      ("dense", "seq tensor stage", {}),
      ("moe with capacity", "data fsdp expert", {}),
      ("dense", "data fsdp seq", {}),
      ("moe", "data fsdp tensor", {}),
      ("moe with capacity", "data expert stage", dict(stage_repeats=2)),
      ("moe", "fsdp expert stage", dict(stage_microbatches=2)),
      ("moe with capacity", "seq tensor expert", {}),
    ],
    0,
  ),
)
def test_three_axes_together_compute_what_one_device_does(model, axes, more):
  assert_equal_to_serial(model, **dict.fromkeys(axes.split(), 2), **more)


# Weights cut another way, activations too: over axes that share the batch, several, or none.
@pytest.mark.parametrize(
  "model, axes, rules",
  quick.first(
    [
      (
        "dense",
        dict(fsdp=2, tensor=4),
        dict(
          embed="none",
          mlp="fsdp,tensor",
          heads="fsdp",
          kv_heads="fsdp",
          head_dim="tensor",
          vocab="tensor,fsdp",
          residual_length="seq",
          act_embed="tensor",
          act_heads="none",
          act_vocab="none",
        ),
      ),
      (
        "moe",
        dict(fsdp=2, tensor=2, expert=2),
        dict(
          embed="tensor",
          mlp="fsdp,expert",
          experts="none",
          heads="none",
          kv_heads="none",
          vocab="expert",
        ),
      ),
      (
        "moe with capacity",
        dict(fsdp=2, expert=2, stage=2),
        dict(embed="none", mlp="none", experts="expert,fsdp", expert_batch="data", vocab="stage"),
      ),
    ]
  ),
)
def test_other_rules_compute_what_one_device_does(model, axes, rules):
  assert_equal_to_serial(model, **axes, rules=rules)


def over_two_slices(c):
  """Eight devices as a mesh over two slices of four would have them."""
  devices = jax.devices()
  chips = mesh_lib.make(c.mesh, [Chip(i) for i in range(8)]).devices
  types = (AxisType.Auto,) * len(config.MESH_AXES)
  return Mesh(
    np.vectorize(lambda chip: devices[chip.id])(chips), config.MESH_AXES, axis_types=types
  )


@pytest.mark.parametrize(
  "model, axes",
  [
    pytest.param("dense", dict(stage=2, fsdp=4), marks=pytest.mark.slow),
    pytest.param("moe with capacity", dict(data=2, expert=4), marks=pytest.mark.slow),
    pytest.param("moe", dict(data=2, fsdp=2, stage=2), marks=pytest.mark.slow),
    pytest.param("dense", dict(fsdp=4, tensor=2), marks=pytest.mark.slow),
  ],
)
def test_two_slices_compute_what_one_device_does(model, axes):
  mesh = over_two_slices(resolved(model, **axes))
  assert_equal_to_serial(model, mesh, **axes)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("axis", config.MESH_AXES)
def test_each_axis_alone_computes_what_one_device_does(model, axis):
  assert_equal_to_serial(model, **{axis: 4})


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
  "two, four",
  [
    pair if number % 2 else pair[::-1]
    for number, pair in enumerate(itertools.combinations(config.MESH_AXES, 2))
  ],
)
def test_each_pair_of_axes_computes_what_one_device_does(model, two, four):
  assert_equal_to_serial(model, **{two: 2, four: 4})
