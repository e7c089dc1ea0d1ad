"""A model's weights as decoding reads them: in the compute dtype, merged, and layer by layer."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from jaxgpt import tree
from jaxgpt.model import lora, stacks, transformer
from jaxgpt.parallel import sharding
from jaxgpt.tree import PyTree

_FLOAT32 = ("router",)  # weights that the model multiplies in float32


def prepare(
  model: transformer.Transformer,
) -> tuple[transformer.Transformer, Callable[[PyTree], PyTree]]:
  """Prepares a model for decoding.

  Adapters are merged. Weights are cast to the compute dtype once, where training casts them in each
  step. The layers are taken apart, because on CPUs a scan copies each layer's weights before it
  reads them.

  Args:
    model: The model.

  Returns:
    (model, compiled function from all parameters of the given model to weights for it).
  """
  cfg = model.cfg
  fields = cfg.to_dict() | dict(
    remat="none", materialize="none", grad_dtype="compute", attention="reference", dropout=0.0
  )
  if cfg.lora.rank:
    fields["lora"] = fields["lora"] | dict(rank=0)
  # On CPUs a product with a transposed matrix is slow, so a tied head gets a matrix of its own.
  untie = cfg.tie_embeddings and jax.default_backend() == "cpu"
  if untie:
    fields["tie_embeddings"] = False
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
    params = tree.map_named(cast, axes, params, is_leaf=sharding.is_axes)
    return stacks.apart(plain.cfg, params)

  return plain, prepared
