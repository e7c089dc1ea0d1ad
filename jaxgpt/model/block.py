"""The Transformer block, and the period of blocks that a scan over the layers repeats.

B batch, T position, D model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.config.remat import INPUT
from jaxgpt.model import layers, ops, remat, self_attention
from jaxgpt.model.experts import moe
from jaxgpt.model.experts import router as router_lib
from jaxgpt.model.kv_cache import LayerCache
from jaxgpt.model.layer_inputs import LayerInputs
from jaxgpt.model.stacks import Kind
from jaxgpt.parallel.sharding import Rules


class BlockInputs(NamedTuple):
  """The inputs that differ from block to block.

  Attributes:
    cache: The block's KV cache, or None.
    is_first: Scalar bool, True for the first block of the model, None if `model.first_norm`.
    key: PRNG key of dropout, or None.
  """

  cache: LayerCache | None
  is_first: jax.Array | None
  key: jax.Array | None


class PeriodOutput(NamedTuple):
  """One entry per block of the period.

  Attributes:
    caches: KV caches, or None.
    routers: `router_lib.Statistics`, or None for dense blocks.
    outputs: Outputs [B, T, D], or None if they were not asked for.
  """

  caches: tuple[LayerCache | None, ...]
  routers: tuple[router_lib.Statistics | None, ...]
  outputs: tuple[jax.Array | None, ...]


class Block(layers.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), with norms as `model.norm_placement` says.

    'pre'     x + f(norm(x))               GPT-2, Llama
    'post'    norm(x + f(x))               BERT
    'branch'  x + norm(f(x))               OLMo 2
    'both'    x + norm'(f(norm(x)))        Gemma 2

  Attributes:
    rules: Logical axis rules.
    kind: (attention, mlp), such as ('local', 'dense'). With the MLP 'none' the second branch is
      left out.
  """

  rules: Rules
  kind: Kind

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, inputs: LayerInputs, own: BlockInputs
  ) -> tuple[jax.Array, tuple[LayerCache | None, router_lib.Statistics | None]]:
    """Applies the block. Returns (x_BTD, (cache, router statistics))."""
    cfg = self.cfg
    kind, mlp = self.kind
    key = own.key
    # One dropout key per residual branch. Adapters fold their own keys out of the block's.
    keys = (None, None) if key is None else jax.random.split(key)
    lora_key = key if key is not None and cfg.lora.dropout else None

    def attend(y):
      layer = self_attention.Attention(cfg, self.rules, kind, name="attn")
      return layer(y, inputs, own.cache, lora_key)

    def feed(y):
      if mlp == "moe":
        return moe.MoE(cfg, self.rules, name="mlp")(y, inputs.real, lora_key)
      return layers.MLP(cfg, self.rules, cfg.mlp_width, name="mlp")(y, lora_key), None

    # Named in here so that the block can be computed again from an input that was offloaded.
    x_BTD = checkpoint_name(self.tap("resid_pre", x_BTD), INPUT)
    x_BTD, cache = self._branch("attn", x_BTD, attend, keys[0], own.is_first)
    x_BTD = self.tap("resid_mid", x_BTD)
    router = None
    if mlp != "none":
      x_BTD, router = self._branch("mlp", x_BTD, feed, keys[1])
    return self.tap("resid_post", x_BTD), (cache, router)

  def _branch(
    self,
    name: str,
    x_BTD: jax.Array,
    f: Callable[[jax.Array], tuple[jax.Array, Any]],
    key: jax.Array | None,
    skip_norm: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """A residual branch. If the traced bool `skip_norm` is True, f reads x without a norm."""
    cfg = self.cfg
    norm = lambda suffix: layers.Norm(cfg, cfg.norm, cfg.width, name=f"{name}{suffix}")
    y = x_BTD
    if cfg.norm_placement in ("pre", "both"):
      y = ops.materialized(norm("_norm")(y), cfg.materialize)
      if skip_norm is not None:
        y = jnp.where(skip_norm, x_BTD, y)
    y, extra = f(y)
    if cfg.norm_placement in ("branch", "both"):
      y = norm("_post_norm")(y)
    if cfg.residual_scale != 1:
      y *= jnp.asarray(cfg.residual_scale, y.dtype)
    x_BTD += ops.dropout(self.tap(f"{name}_out", y), cfg.dropout, key)
    if cfg.norm_placement == "post":
      x_BTD = norm("_norm")(x_BTD)
    return self.rules.constrain(x_BTD, "batch", "residual_length", "act_embed"), extra


class Period(layers.Module):
  """The blocks of one repetition of the layers' pattern.

  Attributes:
    rules: Logical axis rules.
    kinds: The kind of each block.
    layer_outputs: Whether to return the output of each block.
  """

  rules: Rules
  kinds: tuple[Kind, ...]
  layer_outputs: bool

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, inputs: LayerInputs, own: tuple[BlockInputs, ...]
  ) -> tuple[jax.Array, PeriodOutput]:
    """Applies the blocks. `own` has the inputs of each."""
    make: Any = Block
    if self.cfg.remat != "none":
      # Inside a scan XLA cannot merge the recomputed layer with the original one. Only an unrolled
      # loop needs the barriers of `prevent_cse`.
      make = nn.remat(Block, policy=remat.policy(self.cfg.remat), prevent_cse=self._is_unrolled())
    out = []
    for i, (kind, of_block) in enumerate(zip(self.kinds, own, strict=True)):
      block = make(self.cfg, self.rules, kind, name=str(i))
      if len(self.kinds) == 1:  # parameters are 'layers/attn/q' instead of 'layers/0/attn/q'
        nn.share_scope(self, block)
      x_BTD = checkpoint_name(x_BTD, INPUT)  # that a pipeline's tick saves
      x_BTD, (cache, router) = block(x_BTD, inputs, of_block)
      out.append((cache, router, x_BTD if self.layer_outputs else None))
    return x_BTD, PeriodOutput(*zip(*out, strict=True))

  def _is_unrolled(self) -> bool:
    """Whether all layers are in one loop body, where XLA's CSE could undo rematerialization."""
    return self.cfg.scan_unroll * len(self.kinds) >= self.cfg.num_layers
