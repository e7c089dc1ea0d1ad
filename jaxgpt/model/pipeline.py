"""Pipeline parallelism: layers are split into stages, and microbatches flow through the stages.

All stages run in one program. Activations have a leading axis of stages, sharded over the mesh axis
`stage`. In each *tick* every stage applies its layers to a microbatch (a `vmap` over that axis),
and the results move on by one stage, the last stage's to the first (a collective permute).

The schedule is circular, or interleaved (arXiv:2104.04473, section 2.2): layers go round-robin to
the stages, and a microbatch passes the ring of stages R times. A tick is then R times shorter, and
so is the pipeline bubble (the ticks in which stages idle at the start and the end). With S = 2
stages, R = 2 repeats and M = 4 microbatches, 4 layers take R M + S - 1 = 9 ticks (2.r1 stands for
microbatch 2, repeat 1):

  tick                         0     1     2     3     4     5     6     7     8
  stage 0, layers 0 and 2    0.r0  1.r0  0.r1  1.r1  2.r0  3.r0  2.r1  3.r1    -
  stage 1, layers 1 and 3      -   0.r0  1.r0  0.r1  1.r1  2.r0  3.r0  2.r1  3.r1

Microbatches advance in groups of S: a group makes all its repeats before the next one starts. So
the result that the last stage produces is exactly what the first stage needs at the next tick. In
formulas, stage s at tick t does the work with the number n = t - s:

  group        n // (S R)
  repeat       n % (S R) // S
  microbatch   n % S of the group

and layer (r S + s) K + k is the k-th layer of stage s in repeat r.

Parameters are stored in the order of the layers, so that checkpoints do not depend on the schedule.
With R > 1 they move to their stages once a step (an all-to-all in the compute dtype), and their
gradients move back.

S stages, R repeats, K layers (periods of their pattern) of a stage and repeat, M microbatches in
G = M / S groups, B rows of the batch, b rows of a microbatch, T position, D model.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import PartitionSpec as P

from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from jaxgpt.tree import PyTree

AXIS = "stage"

# f(layers, x_bTD, sides, microbatch) -> (x_bTD, sums): applies K layers to one microbatch. `sides`
# are the side inputs of its rows, `microbatch` is its number, `sums` are summed over everything.
ApplyLayers = Callable[[PyTree, jax.Array, PyTree, jax.Array], tuple[jax.Array, PyTree]]


class Pipeline(NamedTuple):
  """A pipeline schedule.

  Attributes:
    stages: S, the size of the mesh axis `stage`.
    repeats: R, how often a microbatch passes the ring of stages.
    microbatches: M, microbatches of a batch, a multiple of the stages.
  """

  stages: int
  repeats: int
  microbatches: int

  def __str__(self) -> str:
    repeats = f", {self.repeats} repeats" if self.repeats > 1 else ""
    return (
      f"{self.microbatches} microbatches through {self.stages} stages{repeats}, "
      f"pipeline bubble {self.bubble:.0%}"
    )

  @property
  def ticks(self) -> int:
    """Ticks of a forward pass."""
    return self.repeats * self.microbatches + self.stages - 1

  @property
  def bubble(self) -> float:
    """The pipeline bubble: share of the ticks in which a stage idles."""
    return (self.stages - 1) / self.ticks

  def for_rows(self, rows: int) -> "Pipeline":
    """This pipeline, with at most as many microbatches as divide the `rows` of a data shard."""
    S = self.stages
    return self._replace(
      microbatches=max(n for n in range(S, max(self.microbatches, S) + 1, S) if rows % n == 0)
    )


def make(c: ml_collections.ConfigDict, sizes: Mapping[str, int], periods: int) -> Pipeline | None:
  """The pipeline of a config on a mesh, or None if the mesh has one stage.

  Args:
    c: The resolved config.
    sizes: Size of each mesh axis.
    periods: Repetitions of the layers' pattern that the stages share.

  Raises:
    UserError: The stages do not divide the layers, or the microbatches do not divide the rows.
  """
  S, R, A = sizes[AXIS], c.mesh.stage_repeats, c.optim.accumulate
  if S == 1:
    return None
  if not periods or periods % (S * R):
    can = [n for n in range(2, periods + 1) if periods % n == 0]
    raise UserError(
      f"mesh.stage={S} x mesh.stage_repeats={R} = {S * R} does not divide the "
      f"{periods} repetitions of the layers' pattern; choose a product among "
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


def run(
  apply_layers: ApplyLayers,
  layers: PyTree,
  x_BTD: jax.Array,
  sides: PyTree,
  pipe: Pipeline,
  policy: Callable | None,
  rules: sharding.Rules,
) -> tuple[jax.Array, PyTree]:
  """Applies all layers to a batch.

  Args:
    apply_layers: Applies the layers of one stage and repeat to a microbatch.
    layers: Tree of arrays [R S K, ...]: parameters and other inputs that each layer has of its own.
    x_BTD: Input of the first layer.
    sides: Tree of arrays [B, ...]: side inputs of the rows, such as positions.
    pipe: The schedule.
    policy: Policy of `jax.checkpoint` for one tick, None to save everything.
    rules: Logical axis rules.

  Returns:
    (x_BTD, sums over all layers and microbatches).
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else sharding.FIXED.num_shards(mesh, "batch")
  pipe = pipe.for_rows(x_BTD.shape[0] // shards)
  S, R, M = pipe
  pinned = lambda x: rules.constrain(x, "stages", "batch", "residual_length", "act_embed")
  layers = jax.tree.map(lambda w: _by_repeat(w, S, R), layers)
  sides = jax.tree.map(lambda a: _on_all_stages(_split(a, shards, S, M // S)), sides)

  def work(layers, x_SbTD, sides, tick):
    number = tick - jnp.arange(S)  # n of each stage, see the top of this file
    is_busy = (number >= 0) & (number < R * M)
    number = jnp.clip(number, 0, R * M - 1)  # an idle stage computes something that is not used
    microbatch = number // (S * R) * S + number % S
    here = jax.tree.map(
      lambda a: sharding.FIXED.constrain(
        jnp.take(a, microbatch, axis=0), "stages", "batch", *[None] * (a.ndim - 2)
      ),
      sides,
    )
    own = jax.tree.map(lambda w: _select_repeat(w, number % (S * R) // S), layers)
    x_SbTD, sums = jax.vmap(apply_layers, spmd_axis_name=AXIS)(own, x_SbTD, here, microbatch)
    of_busy = lambda v: jnp.where(is_busy.reshape(S, *[1] * (v.ndim - 1)), v, 0).sum(0)
    return pinned(x_SbTD), jax.tree.map(of_busy, sums)

  if policy is not None:
    work = jax.checkpoint(work, policy=policy, prevent_cse=False)

  def body(carry, tick):
    x, buffer, batch, sums = carry
    x, buffer, batch = _exchange((x, buffer, batch), tick, pipe, pinned)
    x, new = work(layers, pinned(x), sides, tick)
    return (pinned(jnp.roll(x, 1, 0)), buffer, batch, jax.tree.map(jnp.add, sums, new)), None

  batch = _split(x_BTD, shards, S, M // S)
  batch = rules.constrain(batch, None, "stages", "batch", "residual_length", "act_embed")
  x = jnp.zeros_like(batch[0])
  shapes = jax.eval_shape(work, layers, x, sides, jnp.int32(0))[1]
  sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (x, buffer, batch, sums), _ = jax.lax.scan(body, (x, x, batch, sums), jnp.arange(pipe.ticks))
  _, _, batch = _exchange((x, buffer, batch), pipe.ticks, pipe, pinned)
  return _join(batch, shards), sums


def _exchange(
  state: tuple[jax.Array, jax.Array, jax.Array],
  tick: jax.Array | int,
  pipe: Pipeline,
  pinned: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Feeds new microbatches to the first stage, in exchange for those that passed all layers.

  Microbatches are stored spread over the stages, one of each group on every stage. So they reach
  the first stage, and leave the last one, through a buffer with one slot per stage, which shifts by
  one stage per tick. When a new group begins it is loaded into the buffer. For the next S ticks the
  first stage takes a microbatch out of the slot in front of it and puts a finished one of the
  previous group in its place (x is already shifted, so the last stage's result lies at stage 0).
  After S ticks the buffer holds the finished group in its original order, and is stored. S = 3,
  group 0 = a b c finishing while group 1 = d e f starts:

    buffer before     stage 0 takes / gives    buffer after the shift
    [d  e  f]              d / a                  [e  f  a]
    [e  f  a]              e / b                  [f  a  b]
    [f  a  b]              f / c                  [a  b  c]   stored as group 0

  Args:
    state: (x_SbTD, the results of the last tick, each already at the next stage; buffer_SbTD;
      batch_GSbTD, all groups, before or after the layers).
    tick: The tick to come.
    pipe: The schedule.
    pinned: Pins an array of all stages to the mesh.

  Returns:
    The state after the exchange. x_SbTD is now the input of the tick.
  """
  x_SbTD, buffer_SbTD, batch_GSbTD = state
  S, R, M = pipe
  group, turn = tick // (S * R), tick % (S * R)
  at = lambda i: jax.lax.dynamic_index_in_dim(batch_GSbTD, i, keepdims=False)
  buffer = jnp.where(turn == 0, at(jnp.minimum(group, M // S - 1)), buffer_SbTD)
  swaps = (turn < S) & (jnp.arange(S) == 0)[:, None, None, None]
  x, buffer = jnp.where(swaps, buffer, x_SbTD), jnp.where(swaps, x_SbTD, buffer)
  buffer = pinned(jnp.roll(buffer, -1, 0))
  # While group 0 starts, no group has finished yet. What is then stored over group 0 does no harm:
  # all of it has been fed to the first stage, and its results replace it later.
  previous = jnp.maximum(group - 1, 0)
  done = jnp.where(turn == S - 1, buffer, at(previous))
  return x, buffer, jax.lax.dynamic_update_index_in_dim(batch_GSbTD, done, previous, 0)


def spread(
  apply_layers: ApplyLayers,
  layers: PyTree,
  x_BTD: jax.Array,
  sides: PyTree,
  stages: int,
  rules: sharding.Rules,
) -> tuple[jax.Array, PyTree]:
  """Applies layers that are not part of a pipeline: stages share the rows instead.

  Args:
    apply_layers: As in `run`, for any number of layers.
    layers: As in `run`. Each stage uses all of them.
    x_BTD: As in `run`.
    sides: As in `run`.
    stages: Number of stages.
    rules: Logical axis rules.

  Returns:
    As `run`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else sharding.FIXED.num_shards(mesh, "batch")
  cut = lambda a, *axes: rules.constrain(_split(a, shards, stages, 1)[0], "stages", "batch", *axes)
  sides = jax.tree.map(lambda a: cut(a, *[None] * (a.ndim - 1)), sides)
  x, sums = jax.vmap(apply_layers, in_axes=(None, 0, 0, 0), spmd_axis_name=AXIS)(
    layers, cut(x_BTD, "residual_length", "act_embed"), sides, jnp.arange(stages)
  )
  return _join(x[None], shards), jax.tree.map(lambda v: v.sum(0), sums)


def _split(x: jax.Array, shards: int, S: int, G: int) -> jax.Array:
  """[B, ...] -> [G, S, b, ...]. Each data shard splits its own rows, so none moves."""
  x = x.reshape(shards, S, G, -1, *x.shape[1:])
  return x.transpose(2, 1, 0, *range(3, x.ndim)).reshape(G, S, -1, *x.shape[4:])


def _join(x: jax.Array, shards: int) -> jax.Array:
  """Inverts `_split`."""
  G, S, _, *rest = x.shape
  x = x.reshape(G, S, shards, -1, *rest)
  return x.transpose(2, 1, 0, *range(3, x.ndim)).reshape(-1, *rest)


def _on_all_stages(x: jax.Array) -> jax.Array:
  """[G, S, b, ...] -> [G S, b, ...], replicated over the stages."""
  x = x.reshape(-1, *x.shape[2:])
  return sharding.FIXED.constrain(x, None, "batch", *[None] * (x.ndim - 2))


def _by_repeat(w: jax.Array, S: int, R: int) -> jax.Array:
  """[R S K, ...] -> [R, S, K, ...], sharded over the stages. Other axes keep their sharding."""
  w = w.reshape(R, S, -1, *w.shape[1:])
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or jnp.issubdtype(w.dtype, jax.dtypes.prng_key):
    return w
  free = [P.UNCONSTRAINED] * (w.ndim - 3)
  return jax.lax.with_sharding_constraint(w, P(None, AXIS, None, *free))


def _select_repeat(w_RSK: jax.Array, repeat_S: jax.Array) -> Any:
  """[R, S, K, ...] -> [S, K, ...]: for each stage, the layers of its current repeat."""
  if w_RSK.shape[0] == 1:
    return w_RSK[0]
  one = lambda w, r: jax.lax.dynamic_index_in_dim(w, r, keepdims=False)
  return jax.vmap(one, in_axes=(1, 0))(w_RSK, repeat_S)
