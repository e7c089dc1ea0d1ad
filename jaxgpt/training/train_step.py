"""The one train step: train_step(state, batch) -> (state, metrics), pure and jitted once.

The state is a dict of arrays: 'step' (updates so far), 'params' (those that are
trained), 'frozen' (those that are not, if any), 'opt' (the optimizer's), 'ema' (where it is on) and
'nonfinite_step', -1 or the first step that was not finite, at which the state freezes: the
loop, which reads the metrics one step late, finds it as the accident left it. A loss or gradient that
is not finite is not applied at all, and the state is the one before the step. Weights
that an update from finite gradients has made infinite stay: to take them back, old and new
state would have to be held together, up to 12 bytes a parameter.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import tree
from jaxgpt.model import transformer
from jaxgpt.parallel import sharding
from jaxgpt.training import xla_options


def init_state(model, tx, key, ema, trained, given=None):
  """The state before the first update.

  Args:
    model: a `Transformer`.
    tx: an optimizer from `optim.make`.
    key: PRNG key of the initial weights.
    ema: whether a moving average of the weights is kept.
    trained: paths of the parameters that are trained.
    given: {path: array} of weights that are there already.
  """
  params = transformer.init(model, key)
  if given:
    params = tree.map_named(lambda path, x: given.get(path, x), params)
  params, frozen = tree.split(params, trained)
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


def weights(state):
  """All weights that a state is used with: the moving average where there is one, and the frozen."""
  return tree.merge(state.get("ema", state["params"]), state.get("frozen"))


def first_state(model, tx, seed, abstract, given=None):
  """The state before the first update, made on the devices in its shards.

  Args:
    model, tx: as in `init_state`.
    seed: of the initial weights.
    abstract: from `abstract_state`.
    given: {path: array} of weights that are there already; their buffers are donated.
  """
  trained = set(tree.flatten(abstract["params"]))
  init = lambda given: init_state(
    model, tx, jax.random.key(seed), "ema" in abstract, trained, given
  )
  shardings = jax.tree.map(lambda s: s.sharding, abstract)
  return jax.jit(init, out_shardings=shardings, donate_argnums=0)(given or {})


def abstract_state(model, tx, ema, trained, mesh):
  """Shapes and shardings of the state, without computing any of it.

  Args:
    model, tx, ema, trained: as in `init_state`.
    mesh: the device mesh.

  Returns:
    A tree of `ShapeDtypeStruct`s with NamedShardings on `mesh`: what a checkpoint is restored to.

  Raises:
    UserError: the mesh does not divide a parameter, or cuts it twice by one axis.
  """
  shapes = jax.eval_shape(lambda: init_state(model, tx, jax.random.key(0), ema, trained))
  params, axes = transformer.abstract(model)
  of_params = sharding.params_shardings(axes, params, mesh, model.rules)
  of_state = sharding.like_params(shapes, params, of_params, mesh)
  return jax.tree.map(
    lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, of_state
  )


def make(objective, tx, schedule, c):
  """The train step as a pure function.

  Args:
    objective: see `objectives`.
    tx: an optimizer from `optim.make`.
    schedule: step -> share of the peak learning rate.
    c: the resolved config; read are `seed` and the section `optim`.

  Returns:
    train_step(state, batch) -> (state, metrics). Losses, and the gradient, are sums over the
    whole global batch divided once by its weight, so that they depend neither on the mesh nor on
    the number of microbatches; but experts' balance loss, which is of each microbatch.
  """
  gradients = accumulated(objective, c.optim.accumulate)

  # Two branches and no select: XLA then writes the new state over the old one on every backend.
  def update(state, grads):
    updates, opt = tx.update(grads, state["opt"], state["params"])
    new = dict(
      state, params=optax.apply_updates(state["params"], updates), opt=opt, step=state["step"] + 1
    )
    if c.optim.ema:
      new["ema"] = optax.incremental_update(new["params"], state["ema"], 1 - c.optim.ema)
    return new, optax.tree.norm(new["params"])

  def left_alone(state, grads):
    del grads
    return dict(state), optax.tree.norm(state["params"])

  def train_step(state, batch):
    frozen = {"frozen": state["frozen"]} if "frozen" in state else {}
    state = {name: part for name, part in state.items() if name != "frozen"}
    step = state["step"]
    key = jax.random.fold_in(jax.random.key(c.seed), step)
    (loss, weight, aux), grads = gradients(state["params"], frozen.get("frozen"), batch, key)
    mean = 1 / jnp.maximum(weight, 1e-9)
    grads = jax.tree.map(lambda g: g * mean, grads)
    norm = optax.tree.norm(grads)
    if c.optim.clip_norm:
      shrink = jnp.minimum(1, c.optim.clip_norm / (norm + 1e-9))
      grads = jax.tree.map(lambda g: g * shrink, grads)
    first_bad = state["nonfinite_step"]
    applied = jnp.isfinite(loss) & jnp.isfinite(norm) & (first_bad < 0)
    new, param_norm = jax.lax.cond(applied, update, left_alone, state, grads)
    fine = applied & jnp.isfinite(param_norm)
    new["nonfinite_step"] = jnp.where(fine | (first_bad >= 0), first_bad, step)
    metrics = {
      "loss": loss * mean,
      **{k: v * mean for k, v in aux.items()},
      "tokens": weight,
      "grad_norm": norm,
      "param_norm": param_norm,
      "lr": c.optim.lr * schedule(step),
      "nonfinite_step": new["nonfinite_step"],
    }
    return new | frozen, metrics

  return train_step


def accumulated(objective, num_microbatches):
  """Loss sums and gradients of a batch, computed in microbatches and added up.

  Args:
    objective: see `objectives`.
    num_microbatches: divides the rows of the batch.

  Returns:
    f(params, frozen, batch, key) -> ((loss sum, weight sum, aux sums), gradient of the loss sum).
  """

  def value_and_grad(params, frozen, batch, key):
    def summed(params):
      loss, weight, aux = objective(params, frozen, batch, key)
      return loss, (loss, weight, aux)

    grads, sums = jax.grad(summed, has_aux=True)(params)
    return sums, grads

  if num_microbatches == 1:
    return value_and_grad

  def f(params, frozen, batch, key):
    # Row r goes to microbatch r % A: each data shard then has its share of every microbatch.
    split = lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
    micro = jax.tree.map(split, batch)

    def body(total, xs):
      i, rows = xs
      pin = lambda x: sharding.FIXED.constrain(x, "rows", *[None] * (x.ndim - 1))
      rows = jax.tree.map(pin, rows)
      part = value_and_grad(params, frozen, rows, jax.random.fold_in(key, i))
      return jax.tree.map(jnp.add, total, part), None

    shapes = jax.eval_shape(
      value_and_grad, params, frozen, jax.tree.map(lambda x: x[0], micro), key
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (jnp.arange(num_microbatches), micro))[0]

  return f


def lower(train_step, state, batch, mesh):
  """The step for a mesh as a program that is not compiled yet; the state's buffers are donated.

  Args:
    train_step: from `make`.
    state: from `abstract_state`.
    batch: the global batch as a tree of ShapeDtypeStructs.
    mesh: the device mesh.

  Returns:
    What JAX calls `Lowered`, of (state, batch) -> (state, metrics).
  """
  rows = sharding.batch_sharding(mesh)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
  out = (jax.tree.map(lambda s: s.sharding, state), NamedSharding(mesh, P()))
  with jax.set_mesh(mesh):
    return jax.jit(train_step, donate_argnums=0, out_shardings=out).lower(state, batch)


def compile(train_step, state, batch, mesh, options=(), instead=None):
  """Compiles the step for a mesh.

  Args:
    train_step, state, batch, mesh: as in `lower`.
    options: of XLA, each "name=value", which override those of the chip.
    instead: is asked with what `lower` gives: returns a compiled function, or None.

  Returns:
    The compiled function (state, batch) -> (state, metrics).
  """
  lowered = lower(train_step, state, batch, mesh)
  return (instead and instead(lowered)) or xla_options.compile(lowered, mesh, options)
