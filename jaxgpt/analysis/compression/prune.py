"""Pruning of single weights: magnitude, Wanda (arXiv:2306.11695), SparseGPT (arXiv:2301.00774).

I inputs, O outputs of a matrix.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import tree
from jaxgpt.analysis.compression import calibration, column_sweep, masks, matrices, methods
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.model import transformer
from jaxgpt.run.compression.matrix import Matrix
from jaxgpt.tree import PyTree


class Pruned(NamedTuple):
  """The result of `prune`.

  Attributes:
    params: All weights of the new model.
    zeros: {path: (zeros, numbers)} of the parameters that were pruned.
  """

  params: PyTree
  zeros: dict[str, tuple[int, int]]


class Settings(NamedTuple):
  """What to prune and how.

  Attributes:
    method: One of `methods.PRUNING`.
    sparsity: How much of it.
    scope: One of `methods.SCOPES` of the method, which compares weights within it. None: the first.
    match: Patterns of parameters. (): the matrices of the layers.
  """

  method: str
  sparsity: masks.Sparsity
  scope: str | None = None
  match: tuple[str, ...] = ()

  @property
  def compared(self) -> str | None:
    """The scope that takes effect, or None with a pattern and for SparseGPT."""
    if self.sparsity.group or self.method not in methods.SCOPES:
      return None
    return self.scope or methods.SCOPES[self.method][0]

  def check(self) -> None:
    """Raises a UserError if two settings contradict each other."""
    if self.scope is None:
      return
    if self.sparsity.group:
      raise UserError(
        f"--scope={self.scope} has no effect with --sparsity={self.sparsity}, which compares the "
        "weights of each group; leave it out"
      )
    known = methods.SCOPES.get(self.method, ())
    if self.scope not in known:
      way = f"choose {' or '.join(known)}" if known else "leave it out"
      raise UserError(f"--method={self.method} has no --scope={self.scope}; {way}")


def prune(run: load.Run, settings: Settings, batches: Sequence[PyTree] = ()) -> Pruned:
  """Prunes a model.

  Args:
    run: From `load.load`, without adapters.
    settings: What to prune and how.
    batches: Calibration text from `calibration.rows`, for Wanda and SparseGPT.

  Raises:
    UserError: A pattern matches no parameter, or the method cannot prune a parameter.
  """
  settings.check()
  _, axes = transformer.abstract(run.parts.model)
  of_model = matrices.of(axes, run.params)
  paths = matrices.chosen(axes, run.params, settings.match)
  if settings.method != "magnitude" or settings.sparsity.group:
    for path in paths:
      if path not in of_model:
        raise UserError(
          f"--match: {path} is no matrix of a layer, and --method={settings.method} "
          f"--sparsity={settings.sparsity} prunes the inputs of matrices; leave it out, or use "
          "--method=magnitude with a share"
        )
      masks.check_groups(path, of_model[path].inputs, settings.sparsity)
  if settings.method == "magnitude":
    params = _by_magnitude(run.params, settings, paths, of_model)
  else:
    params = _by_calibration(run, settings, paths, of_model, batches)
  named = calibration.flat(params)
  zeros = {path: (int((named[path] == 0).sum()), named[path].size) for path in paths}
  return Pruned(params, zeros)


def _by_magnitude(
  params: PyTree,
  settings: Settings,
  paths: Sequence[str],
  of_model: Mapping[str, Matrix],
) -> PyTree:
  named = tree.flatten(params)
  new = {path: np.asarray(named[path]) for path in paths}
  sparsity = settings.sparsity
  if settings.compared == "global":
    whole = np.concatenate([np.abs(w).ravel() for w in new.values()])
    kept = masks.largest(whole, sparsity.share)
    start = 0
    for path, w in new.items():
      new[path] = np.where(kept[start : start + w.size].reshape(w.shape), w, 0)
      start += w.size
  else:
    rule = lambda w_IO: np.where(masks.by_scores(np.abs(w_IO), sparsity, False), w_IO, 0)
    for path, w in new.items():
      if path in of_model:
        new[path] = _each(of_model[path], w, rule)
      else:
        new[path] = np.where(masks.largest(np.abs(w), sparsity.share), w, 0)
  placed = {
    path: jax.device_put(w.astype("float32"), named[path].sharding) for path, w in new.items()
  }
  return tree.unflatten(named | placed)


def _each(
  matrix: Matrix, weight: np.ndarray, rule: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
  """Applies a rule to each matrix of a parameter."""
  return matrix.restored(np.stack([rule(w_IO) for w_IO in matrix.view(weight)]))


def _by_calibration(
  run: load.Run,
  settings: Settings,
  paths: Sequence[str],
  of_model: Mapping[str, Matrix],
  batches: Sequence[PyTree],
) -> PyTree:
  uses_products = settings.method == "sparsegpt"

  def visit(seen: calibration.Seen) -> PyTree:
    params = calibration.flat(seen.params)
    for path, w in params.items():
      if f"{seen.stack}/{path}" not in paths:
        continue
      read = calibration.require(seen, path, settings.method, "magnitude")
      matrix = of_model[f"{seen.stack}/{path}"]._replace(shape=(1, *w.shape))
      rule: Any = _sparsegpt if uses_products else _wanda
      prune_one = functools.partial(rule, read=read, settings=settings)
      params[path] = _each(matrix, w[None], prune_one)[0]
    return tree.unflatten(params)

  return calibration.walk(run, batches, visit, products=uses_products)


def _wanda(weight_IO: np.ndarray, read: np.ndarray, settings: Settings) -> np.ndarray:
  scores_IO = masks.wanda_scores(weight_IO, read)
  per_output = settings.compared == "output"
  return np.where(masks.by_scores(scores_IO, settings.sparsity, per_output), weight_IO, 0)


def _sparsegpt(weight_IO: np.ndarray, read: np.ndarray, settings: Settings) -> np.ndarray:
  return np.asarray(sparsegpt(jnp.asarray(weight_IO), jnp.asarray(read), settings.sparsity))


def sparsegpt(weight_IO: jax.Array, products_II: jax.Array, sparsity: masks.Sparsity) -> jax.Array:
  """Prunes a matrix by SparseGPT: the weights that stay make up for those that are removed.

  The mask of each group of inputs is chosen when the sweep reaches it, by w^2 / U_ii^2, the error
  that removing w makes. A group is M inputs of an output (N:M), or a block of inputs, whose weights
  are compared over all outputs.

  Args:
    weight_IO: float32 weights.
    products_II: Products of pairs of inputs, summed over calibration tokens.
    sparsity: How many weights are removed.
  """
  inputs = len(weight_IO)
  group = sparsity.group or column_sweep.block_of(inputs, 1)
  block = column_sweep.block_of(inputs, group)
  return column_sweep.sweep(
    weight_IO, products_II, group=group, block=block, prepare=_mask_of(sparsity), replace=_masked
  ).weight_IO


@functools.lru_cache(maxsize=16)
def _mask_of(sparsity: masks.Sparsity) -> column_sweep.Prepare:
  """Chooses the mask of a group. Cached, so that equal settings share a compiled sweep."""

  def prepare(group_GO: jax.Array, diagonal_G: jax.Array) -> jax.Array:
    scores_GO = jnp.square(group_GO / diagonal_G[:, None])
    if sparsity.group:
      removed = sparsity.group - sparsity.kept
      return jnp.argsort(jnp.argsort(scores_GO, axis=0), axis=0) >= removed
    rank = jnp.argsort(jnp.argsort(scores_GO, axis=None))
    return (rank >= round(sparsity.share * scores_GO.size)).reshape(scores_GO.shape)

  return prepare


def _masked(weight_O: jax.Array, mask_GO: jax.Array, index: jax.Array) -> jax.Array:
  return jnp.where(mask_GO[index], weight_O, 0.0)
