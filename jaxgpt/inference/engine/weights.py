"""A model's weights as decoding reads them: in the compute dtype, merged, and layer by layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt import tree
from jaxgpt.model import lora, stacks, transformer
from jaxgpt.parallel import sharding
from jaxgpt.tree import PyTree

_FLOAT32 = ("router",)  # weights that the model multiplies in float32
_STRIDE, _MORE = 1024, 64  # columns; see `_columns`


def prepare(
  model: transformer.Transformer, platform: str | None = None
) -> tuple[transformer.Transformer, Callable[[PyTree], PyTree]]:
  """Prepares a model for decoding.

  Adapters are merged. Experts drop no token (`transformer.dropless`). Weights are cast to the
  compute dtype once, where training casts them in each step. The layers are taken apart, because on
  CPUs a scan copies each layer's weights before it reads them.

  Args:
    model: The model.
    platform: The platform that decodes, such as 'tpu'. None: JAX's default backend.

  Returns:
    (model, compiled function from all parameters of the given model to weights for it).
  """
  model = transformer.dropless(model)
  cfg, on_cpu = model.cfg, (platform or jax.default_backend()) == "cpu"
  # Where training has the kernel for TPUs, decoding has the one for a paged cache.
  form = "splash" if cfg.attention == "splash" else "reference"
  fields = cfg.to_dict() | dict(
    remat="none", materialize="none", grad_dtype="compute", attention=form, dropout=0.0
  )
  if cfg.lora.rank:
    fields["lora"] = fields["lora"] | dict(rank=0)
  # On CPUs a product with a transposed matrix is slow, so a tied head gets a matrix of its own.
  untie = cfg.tie_embeddings and on_cpu
  if untie:
    fields["tie_embeddings"] = False
  more = _columns(cfg.vocab_size) - cfg.vocab_size if on_cpu else 0
  fields["vocab_size"] += more
  plain = model.clone(cfg=ml_collections.FrozenConfigDict(fields), pipeline=None)
  _, axes = transformer.abstract(plain)

  def cast(name: str, names: Any, leaf: jax.Array) -> jax.Array:
    narrow = sharding.is_weight(names) and not name.endswith(_FLOAT32)
    return leaf.astype(cfg.dtype) if narrow else leaf

  @jax.jit
  def prepared(params):
    if cfg.lora.rank:
      params = lora.merge(params, cfg.lora)
    if untie:
      params = {**params, "head": params["embed"].T}
    params = _widened(params, more)
    params = tree.map_named(cast, axes, params, is_leaf=sharding.is_axes)
    return stacks.apart(plain.cfg, params)

  return plain, prepared


def _columns(vocab_size: int) -> int:
  """Columns of the head's weight.

  On CPUs a product with few rows is three times slower where the rows of the weight are a multiple
  of a page apart, so that they share few places of the caches.
  """
  return vocab_size + _MORE if vocab_size % _STRIDE == 0 else vocab_size


def _widened(params: PyTree, more: int) -> PyTree:
  """The parameters with that many more ids, which are never drawn."""
  ends = {"embed": ((0, more), (0, 0)), "head": ((0, 0), (0, more)), "head_bias": ((0, more),)}
  return {
    name: jnp.pad(part, ends[name]) if more and name in ends else part
    for name, part in params.items()
  }
