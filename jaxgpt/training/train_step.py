"""The train step: train_step(state, batch) -> (state, metrics), pure and jitted once.

The state is a dict of arrays:

  step            int32, updates so far
  params          the trained parameters
  frozen          the other parameters, if there are any, and those of fixed models
  opt             the optimizer's state
  ema             moving average of the trained parameters, with optim.ema > 0
  nonfinite_step  int32, -1, the step that was not finite, or -1 - n after n skipped steps in a row

If a loss or gradient is not finite, the update is not applied: the state stays that before the
step, except `nonfinite_step`. From then on the state is frozen. The loop reads metrics one step
late, so it has already dispatched the next step by then, and still finds the state as it was.
Weights that an update from finite gradients made infinite stay: to take them back, the old and the
new state would have to be in memory together, up to 12 bytes per parameter.

With optim.skip_nonfinite = n, up to n such steps in a row are skipped instead: only `step` and the
schedule of the learning rate count on, so that the next step takes its own batch and its own
learning rate. The optimizer's own count, that of Adam's bias correction, does not.
"""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import tree
from jaxgpt.model import fixed_models, transformer
from jaxgpt.model.attention import qk_clip
from jaxgpt.model.attention.masks import MASKED
from jaxgpt.parallel import sharding
from jaxgpt.training import objectives, xla_options
from jaxgpt.training.objectives import Aux, Batch, LossFn, microbatches
from jaxgpt.tree import PyTree

State: TypeAlias = dict[str, Any]
Metrics: TypeAlias = dict[str, jax.Array]
TrainStep: TypeAlias = Callable[[State, Batch], tuple[State, Metrics]]
Given: TypeAlias = dict[str, jax.Array]  # {path: array} of weights that initialization must keep


class Fixed(NamedTuple):
  """The fixed models of a run, see `model.fixed_models`.

  Attributes:
    reference: Paths of the parameters of which the state keeps a copy from before the first step.
    teacher: The teacher's `Transformer`, or None.
  """

  reference: Collection[str] = ()
  teacher: transformer.Transformer | None = None


# f(params, frozen, batch, key) -> ((loss sum, weight sum, aux sums), gradient of the loss sum)
GradientFn: TypeAlias = Callable[
  [PyTree, PyTree | None, Batch, jax.Array], tuple[tuple[jax.Array, jax.Array, Aux], PyTree]
]


class Placed(NamedTuple):
  """A model on a mesh.

  Attributes:
    model: The `Transformer`.
    params: Its weights, as ShapeDtypeStructs with shardings.
  """

  model: transformer.Transformer
  params: PyTree


def abstract_params(model: transformer.Transformer, mesh: Mesh) -> PyTree:
  """Shapes and shardings of a model's weights: a tree of ShapeDtypeStructs.

  Raises:
    UserError: The mesh does not divide one, or shards two of its dimensions by one axis.
  """
  params, axes = transformer.abstract(model)
  shardings = sharding.params_shardings(axes, params, mesh, model.rules)
  placed = lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh)
  return jax.tree.map(placed, params, shardings)


def init_state(
  model: transformer.Transformer,
  tx: optax.GradientTransformation,
  key: jax.Array,
  ema: bool,
  trained: Collection[str],
  given: Given | None = None,
  reference: Collection[str] = (),
) -> State:
  """The state before the first update, without the weights of a teacher.

  Args:
    model: A `Transformer`.
    tx: An optimizer from `optimizers.make`.
    key: PRNG key of the initial weights.
    ema: Whether to keep a moving average of the weights.
    trained: Paths of the trained parameters.
    given: {path: array} of weights that replace the random ones.
    reference: Paths of the parameters to keep a copy of.
  """
  params = transformer.init(model, key)
  if given:
    params = tree.map_named(lambda path, x: given.get(path, x), params)
  return _state_of(params, tx, ema, trained, reference)


def _state_of(
  params: PyTree,
  tx: optax.GradientTransformation,
  ema: bool,
  trained: Collection[str],
  reference: Collection[str],
) -> State:
  """The state before the first update, of given weights."""
  copied = jax.tree.map(jnp.copy, tree.split(params, reference)[0])
  params, frozen = tree.split(params, trained)
  if copied:
    frozen[fixed_models.REFERENCE] = copied
  state = {
    "step": jnp.zeros((), jnp.int32),
    "params": params,
    "opt": tx.init(params),
    "nonfinite_step": jnp.full((), -1, jnp.int32),
  }
  if ema:
    state["ema"] = jax.tree.map(jnp.copy, params)
  if frozen:
    state["frozen"] = frozen
  return state


def weights(state: State) -> PyTree:
  """All weights for evaluation: the moving average if there is one, and the frozen parameters.

  Those of fixed models are among them, see `model.fixed_models`.
  """
  return tree.merge(state.get("ema", state["params"]), state.get("frozen"))


def own_weights(state: State) -> PyTree:
  """`weights` without those of fixed models: all that the model itself needs."""
  return fixed_models.split(weights(state))[0]


def first_state(
  model: transformer.Transformer,
  tx: optax.GradientTransformation,
  seed: int,
  abstract: State,
  given: Given | None = None,
  teacher: PyTree | None = None,
) -> State:
  """The state before the first update, computed on the devices in its shards.

  Args:
    model: A `Transformer`.
    tx: An optimizer from `optimizers.make`.
    seed: Seed of the initial weights.
    abstract: From `abstract_state`.
    given: {path: array} of weights that replace the random ones. Their buffers are donated.
    teacher: The teacher's weights, if `abstract` has one. None: zeros.
  """
  trained = set(tree.flatten(abstract["params"]))
  frozen, fixed = fixed_models.split(abstract.get("frozen"))
  wanted = fixed.pop(fixed_models.TEACHER, None)
  reference = set(tree.flatten(fixed.get(fixed_models.REFERENCE, {})))
  init = lambda given: init_state(
    model, tx, jax.random.key(seed), "ema" in abstract, trained, given, reference
  )
  made = {**abstract, "frozen": frozen | fixed}
  if not made["frozen"]:
    del made["frozen"]
  shardings = jax.tree.map(lambda s: s.sharding, made)
  state = jax.jit(init, out_shardings=shardings, donate_argnums=0)(given or {})
  if wanted is not None:
    if teacher is None:
      teacher = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), wanted)
    state["frozen"] = {**state.get("frozen", {}), fixed_models.TEACHER: teacher}
  return state


def abstract_state(
  model: transformer.Transformer,
  tx: optax.GradientTransformation,
  ema: bool,
  trained: Collection[str],
  mesh: Mesh,
  fixed: Fixed | None = None,
) -> State:
  """Shapes and shardings of the state, without computing any of it.

  Args:
    model: A `Transformer`.
    tx: An optimizer from `optimizers.make`.
    ema: Whether to keep a moving average of the weights.
    trained: Paths of the trained parameters.
    mesh: The device mesh.
    fixed: The fixed models, or None.

  Returns:
    A tree of `ShapeDtypeStruct`s with NamedShardings on `mesh`, to restore checkpoints into.

  Raises:
    UserError: The mesh does not divide a parameter, or shards two of its dimensions by one axis.
  """
  fixed = fixed or Fixed()
  params, axes = transformer.abstract(model)
  shapes = jax.eval_shape(
    lambda params: _state_of(params, tx, ema, trained, fixed.reference), params
  )
  of_params = sharding.params_shardings(axes, params, mesh, model.rules)
  of_state = sharding.like_params(shapes, params, of_params, mesh)
  placed = lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh)
  state = jax.tree.map(placed, shapes, of_state)
  if fixed.teacher is not None:
    teacher = abstract_params(fixed.teacher, mesh)
    state["frozen"] = {**state.get("frozen", {}), fixed_models.TEACHER: teacher}
  return state


def make(
  objective: LossFn,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  c: ml_collections.ConfigDict,
) -> TrainStep:
  """The train step as a pure function.

  Args:
    objective: A loss function, see `objectives`.
    tx: An optimizer from `optimizers.make`.
    schedule: Step -> fraction of the peak learning rate.
    c: A resolved config, of which `seed`, `optim`, the name of the objective and, for QK-clip,
      `model` are read.

  Returns:
    train_step(state, batch) -> (state, metrics). The loss and the gradient are sums over the global
    batch, divided once by its weight. They depend neither on the mesh nor on the number of
    microbatches, except for the balance loss of experts, which is computed per microbatch.
  """
  whole = objectives.find(c).whole_batch
  gradients = accumulated(objective, 1 if whole else c.optim.accumulate)

  # lax.cond of two branches rather than a select of two states: XLA then writes the new state over
  # the old one on every backend.
  def update(state: State, grads: PyTree, largest: qk_clip.Largest) -> tuple[State, jax.Array]:
    updates, opt = tx.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    if largest:
      params = qk_clip.clip(params, largest, c.model, c.optim.qk_clip)
    new = dict(state, params=params, opt=opt, step=state["step"] + 1)
    if c.optim.ema:
      share = ema_share(c.optim, state["step"])
      new["ema"] = optax.incremental_update(new["params"], state["ema"], share)
    return new, optax.tree.norm(new["params"])

  def left_alone(state: State, grads: PyTree, largest: qk_clip.Largest) -> tuple[State, jax.Array]:
    del grads, largest
    return dict(state), optax.tree.norm(state["params"])

  def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
    # Frozen parameters do not go through the cond: nothing changes them.
    frozen = {"frozen": state["frozen"]} if "frozen" in state else {}
    state = {name: value for name, value in state.items() if name != "frozen"}
    step = state["step"]
    # The key is a function of (seed, step), so that a resumed run draws the same dropout masks.
    key = jax.random.fold_in(jax.random.key(c.seed), step)
    (loss, weight, aux), grads = gradients(state["params"], frozen.get("frozen"), batch, key)
    sums, largest = qk_clip.split(aux)
    mean = 1 / jnp.maximum(weight, 1e-9)
    grads = jax.tree.map(lambda g: g * mean, grads)
    norm = optax.tree.norm(grads)
    if c.optim.clip_norm:
      shrink = jnp.minimum(1, c.optim.clip_norm / (norm + 1e-9))
      grads = jax.tree.map(lambda g: g * shrink, grads)
    first_bad = state["nonfinite_step"]
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    applied = finite & (first_bad < 0)
    new, param_norm = jax.lax.cond(applied, update, left_alone, state, grads, largest)
    fine = applied & jnp.isfinite(param_norm)
    first_bad = jnp.where(fine, -1, first_bad)  # perhaps an earlier start skipped its last step
    if c.optim.skip_nonfinite:
      skipped = ~finite & (first_bad < 0) & (first_bad >= -c.optim.skip_nonfinite)
      new = passed_over(new, skipped)
      first_bad = jnp.where(skipped, first_bad - 1, first_bad)
      fine = fine | skipped
    new["nonfinite_step"] = jnp.where(fine | (first_bad >= 0), first_bad, step)
    metrics = {
      "loss": loss * mean,
      **{k: v * mean for k, v in sums.items()},
      "tokens": weight,
      "tokens_read": real_tokens(batch, weight),
      "grad_norm": norm,
      "param_norm": param_norm,
      "lr": c.optim.lr * schedule(step),
      "nonfinite_step": new["nonfinite_step"],
    }
    return new | frozen, metrics | qk_clip.metrics(largest, c.optim.qk_clip)

  return train_step


def passed_over(state: State, skipped: jax.Array | bool = True) -> State:
  """The state after a step that changes nothing: the next one has its own batch and learning rate.

  Schedules of the learning rate count steps in the optimizer's state, so they count on too.

  Args:
    state: The state before the step.
    skipped: A scalar. False: the state as it is.
  """
  is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)
  on = lambda count: count + jnp.asarray(skipped, count.dtype)
  counted = lambda node: node._replace(count=on(node.count)) if is_schedule(node) else node
  opt = jax.tree.map(counted, state["opt"], is_leaf=is_schedule)
  return {**state, "step": on(state["step"]), "opt": opt}


def ema_share(c_optim: ml_collections.ConfigDict, step: jax.Array) -> jax.Array | float:
  """The share of the new weights in their moving average.

  It is 1 - d for a decay d. With `ema_debias` it is (1 - d) / (1 - d^(step + 1)), which is 1 at the
  first step: the average is then that of Adam's bias correction (arXiv:1412.6980, section 3),
    sum over t of d^(step - t) params_t / sum over t of d^(step - t),
  without the initial weights, and needs no other state than the step.

  Args:
    c_optim: The config's `optim` section.
    step: Updates before this one.
  """
  decay = c_optim.ema
  if not c_optim.ema_debias:
    return 1 - decay
  whole = -jnp.expm1((step + 1).astype(jnp.float32) * math.log(decay))  # 1 - d^(step + 1)
  return jnp.where(step == 0, 1.0, (1 - decay) / whole)


def initial_share(c_optim: ml_collections.ConfigDict, step: int) -> float:
  """The share of the initial weights in the moving average after some steps.

  Args:
    c_optim: The config's `optim` section.
    step: Number of steps.
  """
  return 0.0 if c_optim.ema_debias or not c_optim.ema else c_optim.ema**step


def ema_note(c_optim: ml_collections.ConfigDict, step: int) -> str:
  """A sentence for the user if the average still has over 1 % of the initial weights, or ''."""
  share = initial_share(c_optim, step)
  if share < 0.01:
    return ""
  return (
    f"note: {share:.0%} of the average that is evaluated (optim.ema={c_optim.ema}) are still the "
    f"weights of step 0; train longer, or with optim.ema_debias=True, which leaves them out"
  )


def real_tokens(batch: Batch, weight: jax.Array) -> jax.Array:
  """The tokens of a batch without padding, whether the loss counts them or not: a float32 scalar.

  Args:
    batch: A batch, whose `segment_ids` are 0 in padding.
    weight: The batch's weight, which counts predictions, or rows in a classification. It is the
      result for batches of your own without `segment_ids`.
  """
  found = [
    leaf for path, leaf in tree.flatten(batch).items() if path.split("/")[-1] == "segment_ids"
  ]
  if not found:
    return weight
  return jnp.sum(jnp.stack([(leaf > 0).sum(dtype=jnp.float32) for leaf in found]))


def accumulated(objective: LossFn, num_microbatches: int) -> GradientFn:
  """Loss sums and gradients of a batch, computed in microbatches and summed.

  Args:
    objective: A loss function, see `objectives`.
    num_microbatches: A divisor of the batch's rows.

  Returns:
    f(params, frozen, batch, key) -> ((loss sum, weight sum, aux sums), gradient of the loss sum).
  """

  def value_and_grad(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array, Aux], PyTree]:
    def summed(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Aux]]:
      loss, weight, aux = objective(params, frozen, batch, key)
      return loss, (loss, weight, aux)

    grads, sums = jax.grad(summed, has_aux=True)(params)
    return sums, grads

  if num_microbatches == 1:
    return value_and_grad

  def f(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array, Aux], PyTree]:
    micro = microbatches.split(batch, num_microbatches)

    is_largest = lambda path: qk_clip.LARGEST in path.split("/")
    combined = lambda path, x, y: jnp.maximum(x, y) if is_largest(path) else x + y
    least = lambda path, s: jnp.full(s.shape, MASKED if is_largest(path) else 0, s.dtype)

    def body(total, xs):
      i, rows = xs
      rows = microbatches.pinned(rows)
      more = value_and_grad(params, frozen, rows, jax.random.fold_in(key, i))
      return tree.map_named(combined, total, more), None

    shapes = jax.eval_shape(
      value_and_grad, params, frozen, jax.tree.map(lambda x: x[0], micro), key
    )
    begin = tree.map_named(least, shapes)
    return jax.lax.scan(body, begin, (jnp.arange(num_microbatches), micro))[0]

  return f


def lower(train_step: TrainStep, state: State, batch: Batch, mesh: Mesh) -> jax.stages.Lowered:
  """Lowers the step for a mesh. The state's buffers are donated.

  Args:
    train_step: From `make`.
    state: From `abstract_state`.
    batch: The global batch as a tree of ShapeDtypeStructs.
    mesh: The device mesh.

  Returns:
    The uncompiled program (state, batch) -> (state, metrics).
  """
  rows = sharding.batch_sharding(mesh)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
  out = (jax.tree.map(lambda s: s.sharding, state), NamedSharding(mesh, P()))
  with jax.set_mesh(mesh):
    return jax.jit(train_step, donate_argnums=0, out_shardings=out).lower(state, batch)


def compile(
  train_step: TrainStep,
  state: State,
  batch: Batch,
  mesh: Mesh,
  options: Iterable[str] = (),
  instead: Callable[[jax.stages.Lowered], Any] | None = None,
) -> TrainStep:
  """Compiles the step for a mesh.

  Args:
    train_step: From `make`.
    state: From `abstract_state`.
    batch: The global batch as a tree of ShapeDtypeStructs.
    mesh: The device mesh.
    options: XLA options "name=value". They override those of the chip.
    instead: Called with the lowered program. Returns a compiled function to use instead of
      compiling, or None.

  Returns:
    The compiled function (state, batch) -> (state, metrics).
  """
  lowered = lower(train_step, state, batch, mesh)
  return (instead and instead(lowered)) or xla_options.compile(lowered, mesh, options)
