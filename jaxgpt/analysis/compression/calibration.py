"""Calibration: the inputs of a model's layers on some rows of text.

The rows go through the layers one layer at a time. After the inputs of a layer's matrices have been
seen, the caller may replace its weights, and the next layer reads the output of the new ones. So
errors of earlier layers are known to later ones (as in arXiv:2210.17323 and arXiv:2301.00774).

B batch, T position, D model, I inputs of a matrix.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxgpt import tree
from jaxgpt.analysis import token_rows
from jaxgpt.analysis.compression.methods import UnsuitableError
from jaxgpt.inference import load
from jaxgpt.model import stacks, transformer
from jaxgpt.model.block import BlockInputs, Period
from jaxgpt.model.layer_inputs import LayerInputs
from jaxgpt.training import evaluation, objectives
from jaxgpt.training.objectives import forward
from jaxgpt.tree import PyTree


class Seen(NamedTuple):
  """One period of the layers (a single layer, unless the model has a pattern) and its inputs.

  Attributes:
    stack: Name of its stack.
    repeat: Its index in the stack.
    params: Its parameters.
    inputs: {path within the period: sums over the tokens of the squares [I] or products [I, I] of
      the inputs of a matrix}.
    magnitudes: {path: mean magnitude of each input [I] over the tokens}.
    similarity: Mean cosine between the residual stream before and after the period.
    tokens: Number of tokens, without padding.
  """

  stack: str
  repeat: int
  params: PyTree
  inputs: dict[str, np.ndarray]
  magnitudes: dict[str, np.ndarray]
  similarity: float
  tokens: int


Visit = Callable[[Seen], PyTree]


class _Rows(NamedTuple):
  """A batch on its way through the layers."""

  x_BTD: jax.Array
  inputs: LayerInputs


def rows(
  run: load.Run, data: str | None, split: str, count: int, batch_size: int | None = None
) -> tuple[list[PyTree], str]:
  """Batches of calibration text on the devices.

  Args:
    run: From `load.load`.
    data: A prepared folder. None: the run's own data.
    split: Split of the data.
    count: Number of rows, rounded up to whole batches. A smaller split is read once.
    batch_size: Rows of a batch. None: those of an evaluation.

  Returns:
    (batches, digest of the data).

  Raises:
    UserError: See `token_rows.open_split`.
  """
  c, batches = token_rows.open_split(run, split, batch_size, data)
  limit = -(-count // batches.batch_size)
  return list(evaluation.held_out_batches(batches, run.mesh, c.data, limit)), batches.digest


def walk(run: load.Run, batches: Sequence[PyTree], visit: Visit, products: bool = False) -> PyTree:
  """Sends batches through the layers and lets the caller replace the weights of each.

  Args:
    run: From `load.load`, without adapters.
    batches: From `rows`.
    visit: Called with each period in order. Returns its new parameters, or the same ones.
    products: Whether to sum the products of pairs of inputs, and not only their squares.

  Returns:
    All parameters, with the new ones.
  """
  model = _plain(run.parts.model)
  cfg = model.cfg
  params = dict(run.params)
  with jax.set_mesh(run.mesh):
    moving = _before_layers(model, params, batches)
    done = 0
    for stack in stacks.of(cfg):
      step = _period_step(model, stack.kinds, products)
      made = []
      for i in range(stack.repeats):
        own = _own(cfg, done, len(stack.kinds))
        period = stacks.repeat_of(params[stack.name], i)
        total = _totals(step, period, moving, own)
        count = int(total["tokens"])
        similarity = float(total["similarity"]) / max(count, 1)
        mean = {path: x / max(count, 1) for path, x in total["magnitudes"].items()}
        new = visit(Seen(stack.name, i, period, total["inputs"], mean, similarity, count))
        moving = [
          rows._replace(x_BTD=step(new, rows.x_BTD, rows.inputs, own)[0]) for rows in moving
        ]
        made.append(new)
        done += len(stack.kinds)
      like = params[stack.name]
      stacked = jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *made)
      params[stack.name] = jax.tree.map(
        lambda x, old: jax.device_put(x, old.sharding), stacked, like
      )
  return params


def _plain(model: transformer.Transformer) -> transformer.Transformer:
  """The model without rematerialization, which would hide values inside of it."""
  fields = model.cfg.to_dict() | dict(remat="none", materialize="none", dropout=0.0)
  return model.clone(cfg=ml_collections.FrozenConfigDict(fields), pipeline=None)


def _own(cfg: ml_collections.FrozenConfigDict, start: int, count: int) -> tuple[BlockInputs, ...]:
  first = lambda i: None if cfg.first_norm else jnp.asarray(start + i == 0)
  return tuple(BlockInputs(cache=None, is_first=first(i), key=None) for i in range(count))


def _before_layers(
  model: transformer.Transformer, params: PyTree, batches: Iterable[PyTree]
) -> list[_Rows]:
  """What the first layer reads: the arguments of `Transformer._layers`."""

  @jax.jit
  def embedded(params: PyTree, batch: PyTree) -> list[_Rows]:
    found = []

    def spy(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
      if context.method_name != "_layers":
        return call(*args, **kwargs)
      found.append(_Rows(*args[:2]))
      return args[0], None, None, None

    with nn.intercept_methods(spy):
      ordered = forward.balanced(batch) if model.cfg.causal else batch
      objectives.apply(model, params, None, ordered, None)
    return found

  return [rows for batch in batches for rows in embedded(params, batch)]


def _period_step(
  model: transformer.Transformer, kinds: tuple[stacks.Kind, ...], products: bool
) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
  """The compiled function (params, x, inputs, own) -> (x after the period, sums over tokens).

  Sums of inputs are named after all matrices that read them: 'attn/k,attn/q,attn/v'.
  """
  period: Any = Period(model.cfg, model.rules, kinds, False, parent=None)

  @jax.jit
  def step(
    params: PyTree, x_BTD: jax.Array, inputs: LayerInputs, own: tuple[BlockInputs, ...]
  ) -> tuple[jax.Array, dict[str, Any]]:
    reads: list[tuple[jax.Array, int, list[str]]] = []  # array, inputs, matrices that read it
    real = inputs.real.astype(jnp.float32)

    def spy(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
      if context.method_name == "linear":
        name, read = args[:2]
        path = "/".join((*context.module.path, name))
        for known, _, paths in reads:  # queries, keys and values read the same array
          if known is read:
            paths.append(path)
            break
        else:
          size = math.prod(read.shape[read.ndim - kwargs.get("num_in", 1) :])
          reads.append((read, size, [path]))
      return call(*args, **kwargs)

    with nn.intercept_methods(spy):
      y_BTD, _ = period.apply({"params": params}, x_BTD, inputs, own)
    sums, magnitudes = {}, {}
    for read, size, paths in reads:
      x = read.astype(jnp.float32).reshape(*real.shape, size) * real[..., None]
      name = ",".join(paths)
      sums[name] = jnp.einsum("bti,btj->ij" if products else "bti,bti->i", x, x)
      magnitudes[name] = jnp.abs(x).sum((0, 1))
    cosine = _cosine(x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32))
    return y_BTD, {
      "inputs": sums,
      "magnitudes": magnitudes,
      "similarity": (cosine * real).sum(),
      "tokens": real.sum(),
    }

  return step


# In the memory of the first, since products of a wide matrix's inputs are large.
_added = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)


def _totals(
  step: Callable[..., tuple[jax.Array, dict[str, Any]]],
  params: PyTree,
  moving: Sequence[_Rows],
  own: tuple[BlockInputs, ...],
) -> dict[str, Any]:
  """The sums of a period over all batches, on the host, by the paths of the matrices."""
  of_batch = lambda rows: step(params, rows.x_BTD, rows.inputs, own)[1]
  add = lambda total, rows: _added(total, of_batch(rows))
  host: dict[str, Any] = jax.device_get(functools.reduce(add, moving[1:], of_batch(moving[0])))
  for name in ("inputs", "magnitudes"):
    host[name] = {path: x for paths, x in host[name].items() for path in paths.split(",")}
  return host


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / jnp.maximum(norms, 1e-12)


def require(seen: Seen, path: str, method: str, other: str) -> np.ndarray:
  """What a matrix read.

  Args:
    seen: From `walk`.
    path: Path of the matrix within the period.
    method: Name of the method, for the message.
    other: Name of a method that does not need the inputs.

  Raises:
    UnsuitableError: Its inputs cannot be seen, as those of routed experts.
  """
  if path not in seen.inputs:
    there = ", ".join(f"{seen.stack}/{name}" for name in sorted(seen.inputs))
    raise UnsuitableError(
      f"--method={method}",
      f"the inputs of {seen.stack}/{path} can't be measured (routed experts read tokens of their "
      "own)",
      f"there are {there}: choose among them with --match, or use --method={other}",
    )
  return seen.inputs[path]


def flat(params: PyTree) -> dict[str, np.ndarray]:
  """{path: array on the host} of a tree of parameters."""
  return {path: np.asarray(x) for path, x in tree.flatten(params).items()}
