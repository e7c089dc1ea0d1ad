"""Layers as stages of a pipeline, which microbatches go through one after the other.

All stages work at once: one computation over a leading axis that the mesh axis `stage` shards, in
which a tick is a turn of every stage. After a tick each stage hands its result to the next, and the
last one to the first, which is a collective permute. Where `repeats` is above 1 the layers go
round-robin to the stages (circular or interleaved schedule, arXiv:2104.04473, section 2.2): a
microbatch passes all of them `repeats` times, and as a turn is shorter, so is the time in which
stages wait for the first microbatch and after the last.

S stages, R repeats, K layers (repetitions of their pattern) of a turn, M microbatches in G = M / S
groups, B rows of the batch, b of a microbatch, T position, D model.

Layer (r S + s) K + k is the k-th of stage s in repeat r; parameters lie in the order of the layers,
a stage's part of them after the other, as on any mesh, and with R > 1 go to their stages once a
step (an all-to-all of what a device holds, in the compute dtype; their gradients come back). The turn of stage s at tick t is turn
n = t - s: of group n // (S R), in its repeat n % (S R) // S, with its microbatch n % S. So S
microbatches make all their repeats before the next S begin, and a result of the last stage is just
what the first one needs a tick later.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding

AXIS = "stage"


class Pipeline(NamedTuple):
  """How a batch goes through the layers.

  Attributes:
    stages: devices, or groups of them, that share the layers.
    repeats: times that a microbatch goes round the stages.
    microbatches: parts that the rows are cut into, a multiple of the stages.
  """

  stages: int
  repeats: int
  microbatches: int

  def __str__(self):
    rounds = f" in {self.repeats} rounds" if self.repeats > 1 else ""
    return (
      f"{self.microbatches} microbatches through {self.stages} stages{rounds}, which wait "
      f"{self.bubble:.0%} of their time"
    )

  @property
  def ticks(self):
    return self.repeats * self.microbatches + self.stages - 1

  @property
  def bubble(self):
    """Share of the ticks in which a stage has nothing to do."""
    return (self.stages - 1) / self.ticks

  def of_rows(self, rows):
    """The same with no more microbatches than some rows of a data shard can be cut into."""
    S = self.stages
    return self._replace(
      microbatches=max(n for n in range(S, max(self.microbatches, S) + 1, S) if rows % n == 0)
    )


def make(c, sizes, num_layers):
  """The pipeline of a config on a mesh, or None where it has one stage.

  Args:
    c: the resolved config.
    sizes: of the mesh, {axis: size}.
    num_layers: repetitions of the layers' pattern.

  Raises:
    UserError: the layers or the rows cannot be cut so.
  """
  S, R, A = sizes[AXIS], c.mesh.stage_repeats, c.optim.accumulate
  if S == 1:
    return None
  if not num_layers or num_layers % (S * R):
    can = [n for n in range(2, num_layers + 1) if num_layers % n == 0]
    raise UserError(
      f"mesh.stage={S} x mesh.stage_repeats={R} = {S * R} does not divide the "
      f"{num_layers} repetitions of the layers' pattern; choose a product among "
      f"{', '.join(map(str, can)) or 'none'}, or another model.num_layers"
    )
  if S % R and R % S:
    raise UserError(
      f"mesh.stage_repeats={R} must divide mesh.stage={S}, or be a multiple of it: "
      "otherwise each step gathers all layers on each stage"
    )
  mesh_lib.check_batch(sizes, c.data.batch_size, A)
  rows = c.data.batch_size // (mesh_lib.num_batch_shards(sizes) // S * A)
  M = c.mesh.stage_microbatches or rows
  if M % S or rows % M:
    can = [n for n in range(S, rows + 1, S) if rows % n == 0]
    raise UserError(
      f"mesh.stage_microbatches={M} must be a multiple of mesh.stage={S} and divide "
      f"the {rows} rows of a data shard; choose one of {', '.join(map(str, can))}, "
      "or another data.batch_size"
    )
  return Pipeline(S, R, M)


def run(stage, layers, x_BTD, rows, pipe, policy, rules):
  """Applies all layers to a batch.

  Args:
    stage: f(layers, x_bTD, rows, number) -> (x_bTD, sums), a turn: K layers applied to a microbatch
      and what goes with it; `number` is the microbatch's.
    layers: tree of arrays [R S K, …], of the parameters and whatever else layers have of their own.
    x_BTD: the first layer's input.
    rows: tree of arrays [B, …] that go with it.
    pipe: a `Pipeline`.
    policy: what of a tick is saved for the backward pass, see `jax.checkpoint`; None: all.
    rules: a `sharding.Rules`.

  Returns:
    (x_BTD, `sums` over all layers and microbatches).
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else sharding.FIXED.num_shards(mesh, "batch")
  pipe = pipe.of_rows(x_BTD.shape[0] // shards)
  S, R, M = pipe
  pinned = lambda x: rules.constrain(x, "stages", "batch", "residual_length", "act_embed")
  layers = jax.tree.map(lambda w: _by_repeat(w, S, R), layers)
  rows = jax.tree.map(lambda a: _everywhere(_split(a, shards, S, M // S)), rows)

  def work(layers, x_SbTD, rows, tick):
    turn = tick - jnp.arange(S)
    real = (turn >= 0) & (turn < R * M)  # the others are the bubble
    turn = jnp.clip(turn, 0, R * M - 1)
    number = turn // (S * R) * S + turn % S
    here = jax.tree.map(
      lambda a: sharding.FIXED.constrain(
        jnp.take(a, number, axis=0), "stages", "batch", *[None] * (a.ndim - 2)
      ),
      rows,
    )
    mine = jax.tree.map(lambda w: _of_repeat(w, turn % (S * R) // S), layers)
    x_SbTD, sums = jax.vmap(stage, spmd_axis_name=AXIS)(mine, x_SbTD, here, number)
    of_real = lambda v: jnp.where(real.reshape(S, *[1] * (v.ndim - 1)), v, 0).sum(0)
    return pinned(x_SbTD), jax.tree.map(of_real, sums)

  if policy is not None:
    work = jax.checkpoint(work, policy=policy, prevent_cse=False)

  def body(carry, tick):
    x, belt, batch, sums = carry
    x, belt, batch = _exchange(x, belt, batch, tick, pipe, pinned)
    x, new = work(layers, pinned(x), rows, tick)
    return (pinned(jnp.roll(x, 1, 0)), belt, batch, jax.tree.map(jnp.add, sums, new)), None

  batch = _split(x_BTD, shards, S, M // S)
  batch = rules.constrain(batch, None, "stages", "batch", "residual_length", "act_embed")
  x = jnp.zeros_like(batch[0])
  shapes = jax.eval_shape(work, layers, x, rows, jnp.int32(0))[1]
  sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (x, belt, batch, sums), _ = jax.lax.scan(body, (x, x, batch, sums), jnp.arange(pipe.ticks))
  _, _, batch = _exchange(x, belt, batch, pipe.ticks, pipe, pinned)
  return _merge(batch, shards), sums


def _exchange(x_SbTD, belt_SbTD, batch_GSbTD, tick, pipe, pinned):
  """New microbatches for the first stage, in exchange for those that have passed all layers.

  A group lies on the belt with one microbatch a stage. In the S ticks in which the first stage
  begins with them the belt moves by a place each, and takes what the last stage has done of the
  group before, which then lies on it in the same order.

  Args:
    x_SbTD: results of the last tick, each at the next stage.
    belt_SbTD: the belt.
    batch_GSbTD: all groups, before or after the layers.
    tick: the tick to come.
    pipe: the `Pipeline`.
    pinned: pins an array of all stages to the mesh.

  Returns:
    The three after the exchange; x_SbTD is now the input of the tick.
  """
  S, R, M = pipe
  group, turn = tick // (S * R), tick % (S * R)
  at = lambda i: jax.lax.dynamic_index_in_dim(batch_GSbTD, i, keepdims=False)
  belt = jnp.where(turn == 0, at(jnp.minimum(group, M // S - 1)), belt_SbTD)
  swaps = (turn < S) & (jnp.arange(S) == 0)[:, None, None, None]
  x, belt = jnp.where(swaps, belt, x_SbTD), jnp.where(swaps, x_SbTD, belt)
  belt = pinned(jnp.roll(belt, -1, 0))
  before = jnp.maximum(group - 1, 0)  # in the first group's time there is none; it is on the belt
  done = jnp.where(turn == S - 1, belt, at(before))
  return x, belt, jax.lax.dynamic_update_index_in_dim(batch_GSbTD, done, before, 0)


def spread(stage, layers, x_BTD, rows, stages, rules):
  """Applies layers that are no part of a pipeline, the stages sharing the rows.

  Args:
    stage, layers, x_BTD, rows: as in `run`, with any number of layers.
    stages: parts that the rows are cut into.
    rules: a `sharding.Rules`.

  Returns:
    As `run`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else sharding.FIXED.num_shards(mesh, "batch")
  cut = lambda a, *axes: rules.constrain(_split(a, shards, stages, 1)[0], "stages", "batch", *axes)
  rows = jax.tree.map(lambda a: cut(a, *[None] * (a.ndim - 1)), rows)
  x, sums = jax.vmap(stage, in_axes=(None, 0, 0, 0), spmd_axis_name=AXIS)(
    layers, cut(x_BTD, "residual_length", "act_embed"), rows, jnp.arange(stages)
  )
  return _merge(x[None], shards), jax.tree.map(lambda v: v.sum(0), sums)


def _split(x, shards, S, G):
  """[B, …] -> [G, S, b, …]; no row leaves the devices that hold it."""
  x = x.reshape(shards, S, G, -1, *x.shape[1:])
  return x.transpose(2, 1, 0, *range(3, x.ndim)).reshape(G, S, -1, *x.shape[4:])


def _merge(x, shards):
  """The inverse of `_split`."""
  G, S, _, *rest = x.shape
  x = x.reshape(G, S, shards, -1, *rest)
  return x.transpose(2, 1, 0, *range(3, x.ndim)).reshape(-1, *rest)


def _everywhere(x):
  """[G, S, b, …] -> [G S, b, …], the same on each stage."""
  x = x.reshape(-1, *x.shape[2:])
  return sharding.FIXED.constrain(x, None, "batch", *[None] * (x.ndim - 2))


def _by_repeat(w, S, R):
  """[R S K, …] -> [R, S, K, …], each stage with its own; the other axes stay as they are."""
  w = w.reshape(R, S, -1, *w.shape[1:])
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or jnp.issubdtype(w.dtype, jax.dtypes.prng_key):
    return w
  free = [P.UNCONSTRAINED] * (w.ndim - 3)
  return jax.lax.with_sharding_constraint(w, P(None, AXIS, None, *free))


def _of_repeat(w_RSK, repeat_S):
  """[R, S, K, …] -> [S, K, …]: of each stage the layers of its repeat."""
  if w_RSK.shape[0] == 1:
    return w_RSK[0]
  one = lambda w, r: jax.lax.dynamic_index_in_dim(w, r, keepdims=False)
  return jax.vmap(one, in_axes=(1, 0))(w_RSK, repeat_S)
