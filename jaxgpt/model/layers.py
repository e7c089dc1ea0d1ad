"""What a block is made of: norms, attention, MLPs.

B batch, T query position, S cache slot, D model, F feed-forward, N heads, K key/value heads,
H head size, R rotated part of a head, C compressed size (latent attention).
"""

import fnmatch
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model import ops, quantized, rope
from jaxgpt.model.attention import attention
from jaxgpt.parallel.sharding import Rules

QKV = ("q", "k", "v")


class Module(nn.Module):
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

  def linear(self, name, x, shape, axes, std, *, num_in=1, key=None):
    """x times a weight of its own, over x's last `num_in` dimensions.

    Where the config's `model.lora` names the weight, a product of two thin ones is added to it
    (LoRA, arXiv:2106.09685): `NAME_lora_a`, and `NAME_lora_b`, which starts as zero.

    Args:
      name, shape, axes, std: as for `weight`.
      key: PRNG key of LoRA's dropout; None: no dropout.
    """
    lora = self.cfg.lora
    w = self.weight(name, shape, axes, std)
    if self.cfg.quantize == "none":
      y = self.times(x, w, num_in)
    else:
      y = quantized.times(x, w, num_in, self.cfg.quantize, self.cfg.quantize_gradients)
    if not lora.rank or not any(fnmatch.fnmatchcase(name, target) for target in lora.targets):
      return y
    a = self.weight(
      f"{name}_lora_a",
      (*shape[:num_in], lora.rank),
      (*axes[:num_in], "rank"),
      math.prod(shape[:num_in]) ** -0.5,
    )
    b = self._declare(
      f"{name}_lora_b",
      (lora.rank, *shape[num_in:]),
      ("rank", *axes[num_in:]),
      nn.initializers.zeros,
    )
    if key is not None:
      x = ops.dropout(x, lora.dropout, jax.random.fold_in(key, sum(name.encode())))
    return y + self.times(self.times(x, a, num_in), b, 1) * (lora.alpha / lora.rank)

  def times(self, x, w, num_in, out_dtype=None):
    """`ops.times` of a weight, with the gradient that `model.grad_dtype` says."""
    return ops.times(x, w, num_in, wide_gradient=self.has_wide_gradients, out_dtype=out_dtype)

  @property
  def form(self):
    """The form of attention; 'auto', where nobody has chosen by the devices, goes by the backend."""
    cfg = self.cfg
    if cfg.attention != "auto":
      return cfg.attention
    return attention.choose(
      "auto",
      jax.default_backend(),
      length=cfg.max_len,
      dtype=cfg.dtype,
      softcap=cfg.attn_softcap,
      heads=(cfg.head_dim, cfg.latent.v_dim),
    )

  @property
  def has_wide_gradients(self):
    return self.cfg.grad_dtype == "float32" and self.cfg.dtype != "float32"

  @property
  def dtype(self):
    return jnp.dtype(self.cfg.dtype)

  @property
  def residual_std(self):
    return self.cfg.init_std / (2 * self.cfg.num_layers) ** 0.5  # GPT-2, section 2.3


class Norm(Module):
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


class Attention(Module):
  """Self-attention with a cache that goes in as an argument and comes out as a result.

  `kind` is 'global', 'local' (within `window`) or 'nope' (global, without positions).
  """

  rules: Rules
  kind: str

  @nn.compact
  def __call__(self, x_BTD, shared, cache, lora_key=None):
    cfg = self.cfg
    here = shared[self.kind]  # mask, window and rotary angles of layers of this kind
    make = self._latent_qkv if cfg.latent.kv_rank else self._qkv
    (q, k, v), cache = make(x_BTD, here, shared["positions"], cache, lora_key)
    form = "reference" if cache is not None else self.form
    out = attention.attend(
      form,
      q,
      k,
      v,
      here["mask"],
      shared["segments"],
      scale=cfg.attn_scale,
      softcap=cfg.attn_softcap,
      causal=cfg.causal and cache is None,
      window=cfg.window if self.kind == "local" else None,
      rules=self.rules,
    )
    _, _, N, H = out.shape
    y = self.linear(
      "o",
      out,
      (N, H, cfg.width),
      ("heads", "head_dim", "embed"),
      self.residual_std,
      num_in=2,
      key=lora_key,
    )
    if cfg.bias:
      y += self.vector("o_bias", (cfg.width,), ("norm",)).astype(self.dtype)
    return checkpoint_name(y, "o"), cache

  def _heads(self, name, x, heads, size, head_axis, key, in_axis="embed"):
    """x [B, T, in] -> [B, T, heads, size], by one weight and perhaps a bias."""
    y = self.linear(
      name,
      x,
      (x.shape[-1], heads, size),
      (in_axis, head_axis, "head_dim"),
      self.cfg.init_std,
      key=key,
    )
    if self.cfg.qkv_bias:
      y += self.vector(f"{name}_bias", (heads, size), (head_axis, "head_dim")).astype(self.dtype)
    return y

  def _qkv(self, x_BTD, here, positions_BT, cache, key):
    """Queries, keys and values; those of earlier tokens come from the cache."""
    cfg = self.cfg
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    q, k, v = (
      self._heads(name, x_BTD, heads, H, axis, key)
      for name, heads, axis in (("q", N, "heads"), ("k", K, "kv_heads"), ("v", K, "kv_heads"))
    )
    if cfg.qk_norm != "none":
      q, k = self._normed("q_norm", q), self._normed("k_norm", k)
    if here["rotary"]:
      q, k = (rope.rotate(x, *here["rotary"], by_matmul=self.form == "splash") for x in (q, k))
    q, k, v = named(self.rules, q, k, v)
    if cache is not None:
      cache = written(cache, {"k": k, "v": v}, positions_BT)
      k, v = cache["k"], cache["v"]
    return (q, k, v), cache

  def _normed(self, name, x_BTNH):
    """RMSNorm over each head, or over all of them together (OLMo 2)."""
    norm = functools.partial(Norm, self.cfg, "rmsnorm", name=name)
    if self.cfg.qk_norm == "head":
      return norm(size=x_BTNH.shape[-1])(x_BTNH)
    flat = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
    return norm(size=flat.shape[-1])(flat).reshape(x_BTNH.shape)

  def _latent_qkv(self, x_BTD, here, positions_BT, cache, key):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values are made from a compressed vector, which is all that the cache holds, and from
    one rotated key that all heads share. The last R entries of a query are its rotated part.
    """
    cfg = self.cfg
    lat, N, D = cfg.latent, cfg.num_heads, cfg.width
    R, plain = lat.rope_dim, cfg.head_dim - lat.rope_dim
    x_BTC = x_BTD
    if lat.q_rank:
      x_BTC = self.linear(
        "q_down", x_BTD, (D, lat.q_rank), ("embed", "rank"), cfg.init_std, key=key
      )
      x_BTC = Norm(cfg, "rmsnorm", lat.q_rank, name="q_down_norm")(x_BTC)
    q = self._heads("q", x_BTC, N, cfg.head_dim, "heads", key, "rank" if lat.q_rank else "embed")
    compressed = self.linear(
      "kv_down", x_BTD, (D, lat.kv_rank + R), ("embed", "rank"), cfg.init_std, key=key
    )
    latent_BTC = Norm(cfg, "rmsnorm", lat.kv_rank, name="kv_down_norm")(
      compressed[..., : lat.kv_rank]
    )
    shared_key = rope.rotate(compressed[..., None, lat.kv_rank :], *here["rotary"])
    q = jnp.concatenate([q[..., :plain], rope.rotate(q[..., plain:], *here["rotary"])], -1)
    if cache is not None:
      cache = written(cache, {"latent": latent_BTC, "shared_key": shared_key}, positions_BT)
      latent_BTC, shared_key = cache["latent"], cache["shared_key"]
    k = self._heads("k", latent_BTC, N, plain, "heads", key, "rank")
    v = self._heads("v", latent_BTC, N, lat.v_dim, "heads", key, "rank")
    k = jnp.concatenate([k, jnp.broadcast_to(shared_key, (*k.shape[:3], R))], -1)
    return named(self.rules, q, k, v), cache


def named(rules, q, k, v):
  """Pins queries, keys and values to the mesh, and names them for remat policies."""
  return tuple(
    checkpoint_name(rules.constrain(x, "batch", "length", "act_heads", None), name)
    for x, name in zip((q, k, v), QKV, strict=True)
  )


def written(cache, new, positions_BT):
  """The cache with `new` in the slots of these positions; those of a row are consecutive."""

  def write(old, part, first):
    return jax.lax.dynamic_update_slice(old, part, (first,) + (0,) * (old.ndim - 1))

  first = positions_BT[:, 0]
  return {name: jax.vmap(write)(cache[name], part, first) for name, part in new.items()}


def empty_cache(cfg, batch_size, num_slots):
  """A layer's cache: what `Attention` keeps of each token, in the compute dtype."""
  one = (cfg.num_kv_heads, cfg.head_dim)
  parts = {"k": one, "v": one}
  if cfg.latent.kv_rank:
    parts = {"latent": (cfg.latent.kv_rank,), "shared_key": (1, cfg.latent.rope_dim)}
  return {
    name: jnp.zeros((batch_size, num_slots, *shape), jnp.dtype(cfg.dtype))
    for name, shape in parts.items()
  }


class MLP(Module):
  """activation(x up) down, or (activation(x gate) * x up) down where `gated` (arXiv:2002.05202)."""

  rules: Rules
  size: int

  @nn.compact
  def __call__(self, x_BTD, lora_key=None):
    cfg = self.cfg
    D, F = cfg.width, self.size

    def project(name, x, shape, axes, std, bias_axis):
      y = self.linear(name, x, shape, axes, std, key=lora_key)
      if cfg.bias:
        y += self.vector(f"{name}_bias", shape[1:], (bias_axis,)).astype(self.dtype)
      return y

    act = ops.ACTIVATIONS[cfg.activation]
    inwards = lambda name: project(name, x_BTD, (D, F), ("embed", "mlp"), cfg.init_std, "mlp")
    if cfg.gated:
      h = act(checkpoint_name(inwards("gate"), "gate")) * checkpoint_name(inwards("up"), "up")
    else:
      h = act(checkpoint_name(inwards("up"), "up"))
    h = self.rules.constrain(h, "batch", "length", "act_mlp")
    h = ops.materialized(h, cfg.materialize)
    return checkpoint_name(
      project("down", h, (F, D), ("mlp", "embed"), self.residual_std, "norm"), "down"
    )
