"""The one Transformer. Families are values of the config's `model` section; no code asks a name.

B batch, T query position, S cache slot, D model, F feed-forward, N heads, K key/value heads,
H head size, V vocabulary, L layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model import attention, ops
from jaxgpt.sharding import constrain

_SAVEABLE = jax.checkpoint_policies
_QKV = ("q", "k", "v")
REMAT = {  # what the backward pass finds saved; everything else is computed again
    "full": _SAVEABLE.nothing_saveable,
    "dots": _SAVEABLE.dots_with_no_batch_dims_saveable,
    "save_qkv": _SAVEABLE.save_only_these_names(*_QKV),
    "save_attention": _SAVEABLE.save_only_these_names(*_QKV, "attention"),
}


class _Module(nn.Module):
  """A Linen module that declares parameters together with their logical axes."""
  cfg: ml_collections.FrozenConfigDict

  def weight(self, name, shape, axes, std):
    """A float32 parameter of normal values; `axes` names the logical axis of each dimension."""
    return self._declare(name, shape, axes, nn.initializers.normal(std))

  def vector(self, name, shape, axes, value=0.0):
    """A float32 parameter that starts as one value everywhere; `axes` as in `weight`."""
    return self._declare(name, shape, axes, nn.initializers.constant(value))

  def _declare(self, name, shape, axes, init):
    return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

  @property
  def dtype(self):
    return jnp.dtype(self.cfg.dtype)

  @property
  def residual_std(self):
    return self.cfg.init_std / (2 * self.cfg.num_layers) ** 0.5  # GPT-2, section 2.3


class Norm(_Module):
  """LayerNorm or RMSNorm (`kind`) over the last axis, of `size`."""
  kind: str
  size: int

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    scale = self.vector("scale", (self.size,), ("norm",), 1.0)
    if self.kind == "rmsnorm":
      return ops.rms_norm(x, scale, cfg.norm_eps)
    bias = self.vector("bias", (self.size,), ("norm",)) if cfg.bias else None
    return ops.layer_norm(x, scale, bias, cfg.norm_eps)


class Attention(_Module):
  """Self-attention with a cache that goes in as an argument and comes out as a result."""

  @nn.compact
  def __call__(self, x_BTD, shared, cache):
    cfg, dtype = self.cfg, self.dtype
    D, N, K, H = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def project(name, heads, axis):
      w = self.weight(name, (D, heads, H), ("embed", axis, "head_dim"), cfg.init_std)
      y = jnp.einsum("BTD,DNH->BTNH", x_BTD, w.astype(dtype))
      if cfg.bias:
        y += self.vector(f"{name}_bias", (heads, H), (axis, "head_dim")).astype(dtype)
      return y

    q, k, v = project("q", N, "heads"), project("k", K, "kv_heads"), project("v", K, "kv_heads")
    if cfg.qk_norm:
      q, k = (Norm(cfg, "rmsnorm", H, name=f"{name}_norm")(x) for name, x in (("q", q), ("k", k)))
    if cfg.position == "rotary":
      q, k = ops.rotate(q, *shared["rotary"]), ops.rotate(k, *shared["rotary"])
    q, k, v = (checkpoint_name(constrain(a, "batch", "length", "act_heads", None), name)
               for a, name in zip((q, k, v), _QKV))
    causal = cfg.causal and cache is None
    if cache is not None:
      first = shared["positions"][:, 0]
      write = jax.vmap(lambda old, new, i: jax.lax.dynamic_update_slice(old, new, (i, 0, 0)))
      cache = {"k": write(cache["k"], k, first), "v": write(cache["v"], v, first)}
      k, v = cache["k"], cache["v"]
    out = attention.attend(cfg.attention, q, k, v, shared["mask"], scale=H**-0.5,
                           causal=causal)
    out = checkpoint_name(out, "attention")
    w = self.weight("o", (N, H, D), ("heads", "head_dim", "embed"), self.residual_std)
    y = jnp.einsum("BTNH,NHD->BTD", out, w.astype(dtype))
    if cfg.bias:
      y += self.vector("o_bias", (D,), ("norm",)).astype(dtype)
    return y, cache


class MLP(_Module):
  """activation(x up) down, or (activation(x gate) * x up) down where `gated` (arXiv:2002.05202)."""

  @nn.compact
  def __call__(self, x_BTD):
    cfg, dtype = self.cfg, self.dtype
    D, F = cfg.width, cfg.mlp_width

    def project(name, x, shape, axes, std, bias_axis):
      y = x @ self.weight(name, shape, axes, std).astype(dtype)
      if cfg.bias:
        y += self.vector(f"{name}_bias", shape[1:], (bias_axis,)).astype(dtype)
      return y

    act = ops.ACTIVATIONS[cfg.activation]
    inwards = lambda name: project(name, x_BTD, (D, F), ("embed", "mlp"), cfg.init_std, "mlp")
    if cfg.gated:
      h = act(checkpoint_name(inwards("gate"), "gate")) * checkpoint_name(inwards("up"), "up")
    else:
      h = act(checkpoint_name(inwards("up"), "up"))
    h = constrain(h, "batch", "length", "act_mlp")
    return project("down", h, (F, D), ("mlp", "embed"), self.residual_std, "norm")


class Block(_Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  @nn.compact
  def __call__(self, x_BTD, shared, layer):
    cfg = self.cfg
    keys = (None, None) if layer["key"] is None else jax.random.split(layer["key"])
    y = Norm(cfg, cfg.norm, cfg.width, name="attn_norm")(x_BTD)
    y, cache = Attention(cfg, name="attn")(y, shared, layer["cache"])
    x_BTD += ops.dropout(y, cfg.dropout, keys[0])
    y = MLP(cfg, name="mlp")(Norm(cfg, cfg.norm, cfg.width, name="mlp_norm")(x_BTD))
    x_BTD += ops.dropout(y, cfg.dropout, keys[1])
    return constrain(x_BTD, "batch", "length", "act_embed"), cache


class Transformer(_Module):
  """Tokens to logits.

  Attributes:
    cfg: the config's `model` section, resolved and frozen.
  """

  @nn.compact
  def __call__(self, tokens_BT, positions_BT, segment_ids_BT=None, *, cache=None,
               dropout_key=None, logits_at_B=None):
    """Applies the model to a batch.

    Args:
      tokens_BT: token ids.
      positions_BT: positions within each document, below `max_len`. With a cache also the slots
        that this call fills; those of a row must then be consecutive.
      segment_ids_BT: 1, 2, … for the documents of a packed row, 0 for padding; None: one document
        a row. Not used with a cache.
      cache: from `init_cache` or an earlier call, or None.
      dropout_key: PRNG key while training, None otherwise.
      logits_at_B: for each row the one index into T whose logits are wanted; None: all.

    Returns:
      (logits, cache): float32 logits [B, T, V], or [B, V] with `logits_at_B`; the filled cache.
    """
    cfg, dtype = self.cfg, self.dtype
    keys = None
    if dropout_key is not None and cfg.dropout:
      dropout_key, layers_key = jax.random.split(dropout_key)
      keys = jax.random.split(layers_key, cfg.num_layers)
    table = self.weight("embed", (cfg.vocab_size, cfg.width), ("vocab", "embed"), cfg.init_std)
    # Gathered once, for the lookup and for a tied head; a lookup in shards would move activations.
    table = constrain(table.astype(dtype), "act_vocab", "act_embed")
    x = jnp.take(table, tokens_BT, axis=0)
    if cfg.position == "learned":
      places = self.weight("pos_embed", (cfg.max_len, cfg.width), ("positions", "embed"),
                           cfg.init_std)
      x += jnp.take(places, positions_BT, axis=0).astype(dtype)
    if keys is not None:
      x = ops.dropout(x, cfg.dropout, dropout_key)
    x = constrain(x, "batch", "length", "act_embed")
    shared = self._shared(tokens_BT, positions_BT, segment_ids_BT, cache)
    x, cache = self._layers()(cfg, name="layers")(x, shared, {"key": keys, "cache": cache})
    if logits_at_B is not None:
      x = jnp.take_along_axis(x, logits_at_B[:, None, None], axis=1)[:, 0]
    x = Norm(cfg, cfg.norm, cfg.width, name="final_norm")(x)
    head = table.T if cfg.tie_embeddings else self.weight(
        "head", (cfg.width, cfg.vocab_size), ("embed", "vocab"), cfg.init_std)
    logits = jnp.einsum("...D,DV->...V", x, head.astype(dtype),
                        preferred_element_type=jnp.float32)
    return ops.softcap(logits, cfg.logit_softcap), cache

  def _shared(self, tokens_BT, positions_BT, segment_ids_BT, cache):
    """What all layers read: the mask, the rotary angles, the positions."""
    cfg = self.cfg
    if cache is not None:  # slot s holds position s, so only earlier slots are filled
      slots = jnp.arange(cache["k"].shape[2])
      mask = slots[None, None, :] <= positions_BT[:, :, None]
    else:
      segments = jnp.ones_like(tokens_BT) if segment_ids_BT is None else segment_ids_BT
      mask = ops.causal_mask(segments) if cfg.causal else ops.segment_mask(segments)
    shared = {"mask": mask, "positions": positions_BT}
    if cfg.position == "rotary":
      shared["rotary"] = ops.rotary_angles(positions_BT, cfg.head_dim, cfg.rope_theta)
    return shared

  def _layers(self):
    cfg = self.cfg
    unroll = min(cfg.scan_unroll, cfg.num_layers)
    block = Block
    if cfg.remat != "none":
      block = nn.remat(Block, policy=REMAT[cfg.remat], prevent_cse=unroll == cfg.num_layers)
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                   in_axes=(nn.broadcast, 0), length=cfg.num_layers, unroll=unroll,
                   metadata_params={nn.PARTITION_NAME: "layers"})


def _is_box(x):
  return isinstance(x, nn.LogicallyPartitioned)


def _init_boxed(model, key):
  tokens = jnp.zeros((1, 1), jnp.int32)
  return model.init(key, tokens, tokens)["params"]


def init(model, key):
  """Initial parameters: a plain nested dict of arrays."""
  return jax.tree.map(lambda box: box.value, _init_boxed(model, key), is_leaf=_is_box)


def abstract(model):
  """Shapes and logical axes of the parameters, without computing any.

  Returns:
    (shapes, axes): nested dicts of `ShapeDtypeStruct`s and of tuples of logical axes, such as
    ('layers', 'embed', 'heads', 'head_dim') for 'layers/attn/q'.
  """
  boxed = jax.eval_shape(lambda: _init_boxed(model, jax.random.key(0)))
  return (jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box),
          jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=_is_box))


def init_cache(cfg, batch_size, num_slots):
  """An empty key/value cache: {'k', 'v'}, each [L, B, S, K, H] in the compute dtype."""
  shape = (cfg.num_layers, batch_size, num_slots, cfg.num_kv_heads, cfg.head_dim)
  return {name: jnp.zeros(shape, jnp.dtype(cfg.dtype)) for name in ("k", "v")}
