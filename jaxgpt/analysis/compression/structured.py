"""Removal of whole layers, heads and MLP columns: a smaller dense model, whose config says so.

  layers   by block influence, 1 - mean cosine between the input and the output of a layer
           (arXiv:2403.03853, equation 1)
  heads    key/value heads with their query heads, by the size of their output in the residual
           stream: the norm of a head's outputs over the text times that of their weights in `o`
  columns  MLP columns, by the norm of a column's activation times that of its weights in `down`
           (activations as in arXiv:2408.11796, section 2.2)

Each layer loses as many heads or columns as every other, so that layers stay of one shape.

L layers, K key/value heads, F feed-forward, D model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from jaxgpt import tree
from jaxgpt.analysis.compression import calibration
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.model import stacks, transformer
from jaxgpt.parallel import sharding
from jaxgpt.tree import PyTree


class Removed(NamedTuple):
  """The result of `remove`.

  Attributes:
    params: The weights of the smaller model, on the host.
    changes: {key of the `model` section: new value}.
    scores: {layer, or 'layer.unit': its score} of all that could be removed.
    removed: Names of the removed parts, as in `scores`.
  """

  params: PyTree
  changes: dict[str, int]
  scores: dict[str, float]
  removed: list[str]


def remove(run: load.Run, method: str, count: int, batches: Sequence[PyTree]) -> Removed:
  """Removes the least important parts of a model.

  Args:
    run: From `compressed_run.opened`.
    method: One of `methods.STRUCTURED`.
    count: Layers to remove, or heads or columns to remove in each layer.
    batches: Calibration text from `calibration.rows`.

  Raises:
    UserError: Too few would be left, or the model's layers are of several kinds.
  """
  cfg = run.c.model
  _check(cfg, method, count)
  seen: list[calibration.Seen] = []

  def visit(one: calibration.Seen) -> PyTree:
    seen.append(one)
    return one.params

  calibration.walk(run, batches, visit)
  if method == "layers":
    influence = {str(i): 1 - one.similarity for i, one in enumerate(seen)}
    worst = sorted(influence, key=lambda i: influence[i])[:count]
    keep = np.array([i for i in range(len(seen)) if str(i) not in worst])
    params = _taken(run, {"layers": keep})
    return Removed(params, {"num_layers": len(keep)}, influence, sorted(worst, key=int))
  scores_LU = np.stack([_head_scores(cfg, s) if method == "heads" else _columns(s) for s in seen])
  order_LU = np.argsort(scores_LU, axis=1, kind="stable")
  keep_LU = np.sort(order_LU[:, count:], axis=1)
  left = keep_LU.shape[1]
  names = {f"{i}.{u}": float(s) for i, row in enumerate(scores_LU) for u, s in enumerate(row)}
  worst = [f"{i}.{u}" for i, row in enumerate(order_LU) for u in sorted(row[:count].tolist())]
  if method == "columns":
    return Removed(_taken(run, {"mlp": keep_LU}), {"mlp_width": left}, names, worst)
  group = cfg.num_heads // cfg.num_kv_heads
  queries = (keep_LU[:, :, None] * group + np.arange(group)).reshape(len(seen), -1)
  params = _taken(run, {"kv_heads": keep_LU, "heads": queries})
  return Removed(params, {"num_heads": left * group, "num_kv_heads": left}, names, worst)


def _check(cfg: ml_collections.ConfigDict, method: str, count: int) -> None:
  """Raises a UserError if a model's parts cannot be removed."""
  flag = f"--method={method} --remove={count}"
  found = stacks.of(ml_collections.FrozenConfigDict(cfg))
  if len(found) > 1 or len(found[0].kinds) > 1:
    raise UserError(
      f"{flag}: the layers of this model are of several kinds (model.attention_pattern, "
      "model.mlp_pattern, model.moe.first_dense), and only equal ones can be removed"
    )
  if method == "columns" and "moe" in cfg.mlp_pattern:
    raise UserError(f"{flag}: the columns of experts can't be removed; choose another method")
  if method == "columns" and "none" in cfg.mlp_pattern:
    raise UserError(
      f"{flag}: the layers have no MLPs (model.mlp_pattern={cfg.mlp_pattern!r}); choose another "
      "method"
    )
  if method == "heads" and (cfg.latent.kv_rank or cfg.qk_norm == "all"):
    why = "latent attention" if cfg.latent.kv_rank else "one norm over all heads"
    raise UserError(f"{flag}: a model with {why} can't lose heads; choose another method")
  if method == "layers" and not cfg.first_norm:
    raise UserError(
      f"{flag}: the first layer of this model has no norm (model.first_norm=False), so no other "
      "can take its place"
    )
  units = {"layers": cfg.num_layers, "heads": cfg.num_kv_heads, "columns": cfg.mlp_width}[method]
  if count >= units:
    what = {"heads": "key/value heads", "columns": "MLP columns"}.get(method, method)
    raise UserError(f"{flag}: the model has {units} {what}; leave at least one")


def _head_scores(cfg: ml_collections.ConfigDict, seen: calibration.Seen) -> np.ndarray:
  """[K]: size of the output of each key/value head's query heads in the residual stream."""
  out_NHD = np.asarray(seen.params["attn"]["o"])
  squares_NH = seen.inputs["attn/o"].reshape(out_NHD.shape[:2])
  of_weights_NH = np.square(out_NHD).sum(-1)
  score_N = np.sqrt((squares_NH * of_weights_NH).sum(-1))
  return score_N.reshape(cfg.num_kv_heads, -1).sum(-1)


def _columns(seen: calibration.Seen) -> np.ndarray:
  """[F]: size of the output of each MLP column in the residual stream."""
  down_FD = np.asarray(seen.params["mlp"]["down"])
  return np.sqrt(seen.inputs["mlp/down"]) * np.linalg.norm(down_FD, axis=1)


def _taken(run: load.Run, kept: Mapping[str, np.ndarray]) -> PyTree:
  """The parameters with some indices of some logical axes, read from the axes tree.

  Args:
    run: The run.
    kept: {logical axis: indices}: [kept] of the axis of layers, [L, kept] of other axes, where
      each layer has its own.
  """
  _, axes = transformer.abstract(run.parts.model)
  names = tree.flatten(axes, is_leaf=sharding.is_axes)

  def one(path: str, x: Any) -> np.ndarray:
    x, axes = np.asarray(x), names[path]
    if "layers" not in axes:
      return x
    for axis, index in kept.items():
      if axis not in axes:
        continue
      at = axes.index(axis)
      if index.ndim == 1:
        x = np.take(x, index, axis=at)
      else:
        shape = [1] * x.ndim
        shape[0], shape[at] = index.shape
        x = np.take_along_axis(x, index.reshape(shape), axis=at)
    return x

  return tree.map_named(one, jax.device_get(run.params))
