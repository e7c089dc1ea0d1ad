"""The self-attention layer: projections, rotary embedding, KV cache, latent attention.

B batch, T query position, D model, N heads, K key/value heads, H head size, R rotated part of a
head, C compressed size (latent attention).
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.config.remat import QKV, O
from jaxgpt.model import lora, rope
from jaxgpt.model.attention import attention, paged, qk_clip
from jaxgpt.model.attention.spec import Spec
from jaxgpt.model.kv_cache import LayerCache
from jaxgpt.model.layer_inputs import KindInputs, LayerInputs
from jaxgpt.model.layers import Module, Norm
from jaxgpt.parallel.sharding import Axes, Rules

Heads = tuple[jax.Array, jax.Array, jax.Array]  # queries, keys, values


class Attention(Module):
  """Self-attention. Its cache is an argument and a result.

  Attributes:
    rules: Logical axis rules.
    kind: 'global', 'local' (within `model.window`) or 'nope' (global, without positions).
  """

  rules: Rules
  kind: str

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    inputs: LayerInputs,
    cache: LayerCache | None,
    lora_key: jax.Array | None = None,
  ) -> tuple[jax.Array, LayerCache | None]:
    """Applies the layer.

    Args:
      x_BTD: Normalized residual stream.
      inputs: Masks, rotary angles and positions.
      cache: The cache of this layer, or None.
      lora_key: PRNG key of adapter dropout, or None.

    Returns:
      (y_BTD, the cache with this call's tokens or None).
    """
    cfg = self.cfg
    here = inputs.kinds[self.kind]
    spec = Spec(
      scale=cfg.attn_scale,
      softcap=cfg.attn_softcap,
      causal=cfg.causal,
      window=cfg.window if self.kind == "local" else None,
      rules=self.rules,
    )
    if inputs.call is not None:
      assert cache is not None
      attend = self._paged_latent if cfg.latent.kv_rank else self._paged
      out, cache = attend(x_BTD, inputs, cache, spec)
    else:
      make = self._latent_qkv if cfg.latent.kv_rank else self._qkv
      q, k, v = make(x_BTD, here, lora_key)
      size = v.shape[-1]
      (q, k, v), spec = attention.prepared(self.form, (q, k, v), spec)
      named = QKV if cfg.qk_norm == "none" else QKV[2:]
      q, k, v = mark((q, k, v), self.rules, named, heads_first=self.form == "splash")
      if self.is_mutable_collection(qk_clip.LARGEST) and not self.is_initializing():
        q_now, k_now = jax.lax.stop_gradient((q, k))
        logits_N = qk_clip.largest_logits(q_now, k_now, inputs.segments, spec)
        self.sow(qk_clip.LARGEST, qk_clip.LARGEST, logits_N)
      out = self.mix(q, k, v, here.mask, inputs.segments, spec)[..., :size]
    out = self.tap("heads", out)
    _, _, N, H = out.shape
    shape, axes = (N, H, cfg.width), ("heads", "head_dim", "embed")
    y = self.linear("o", out, shape, axes, self.residual_std, num_in=2, key=lora_key)
    if cfg.bias:
      y += self.vector("o_bias", (cfg.width,), ("norm",)).astype(self.dtype)
    return checkpoint_name(y, O), cache

  def mix(
    self,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array | None,
    segments_BT: jax.Array,
    spec: Spec,
  ) -> jax.Array:
    """Attention of a whole row, [B, T, N, H], by `attention.attend`.

    A method of its own, so that `interpret.taps` can put the definition in its place: kernels form
    no attention pattern that could be read.
    """
    return attention.attend(self.form, q_BTNH, k_BSKH, v_BSKH, mask_BTS, segments_BT, spec)

  def _heads(
    self,
    name: str,
    x: jax.Array,
    heads: tuple[str, int, int],
    key: jax.Array | None,
    in_axis: str = "embed",
  ) -> jax.Array:
    """Projects x [B, T, in] to [B, T, heads, size]. `heads` is (logical axis, heads, size)."""
    head_axis, *shape = heads
    axes = (in_axis, head_axis, "head_dim")
    y = self.linear(name, x, (x.shape[-1], *shape), axes, self.cfg.init_std, key=key)
    if self.cfg.qkv_bias:
      y += self.vector(f"{name}_bias", tuple(shape), (head_axis, "head_dim")).astype(self.dtype)
    return y

  def _qkv(
    self,
    x_BTD: jax.Array,
    here: KindInputs,
    key: jax.Array | None,
  ) -> Heads:
    """Queries, keys and values. Keys are rotated: their positions do not change."""
    cfg = self.cfg
    of_q, of_kv = (
      ("heads", cfg.num_heads, cfg.head_dim),
      ("kv_heads", cfg.num_kv_heads, cfg.head_dim),
    )
    q, k, v = (
      self._heads(name, x_BTD, heads, key)
      for name, heads in zip(QKV, (of_q, of_kv, of_kv), strict=True)
    )
    if cfg.qk_norm != "none":
      q, k = (checkpoint_name(x, name) for x, name in zip((q, k), QKV[:2], strict=True))
      q, k = self._normed("q_norm", q), self._normed("k_norm", k)
    if here.rotary is not None:
      rotate = functools.partial(rope.rotate, by_matmul=self.form == "splash")
      q, k = (rotate(x, *here.rotary) for x in (q, k))
    return q, k, v

  def _paged(
    self, x_BTD: jax.Array, inputs: LayerInputs, cache: LayerCache, spec: Spec
  ) -> tuple[jax.Array, LayerCache]:
    """Attention over a paged cache: (out [B, T, N, H], the cache)."""
    assert inputs.call is not None
    q, k, v = mark(self._qkv(x_BTD, inputs.kinds[self.kind], None), self.rules)
    cache = {name: paged.write(cache[name], x, inputs.call) for name, x in (("k", k), ("v", v))}
    cache = jax.tree.map(self._pinned, cache)
    out = paged.attend(
      q,
      cache["k"],
      cache["v"],
      inputs.call,
      self.kind,
      inputs.positions,
      spec,
      with_kernel=self.form == "splash",
    )
    return out, cache

  def _pinned(self, x: jax.Array) -> jax.Array:
    """An array of a pool, sharded by heads as keys and values are."""
    return self.rules.constrain(x, "act_heads", *[None] * (x.ndim - 1))

  def _normed(self, name: str, x_BTNH: jax.Array) -> jax.Array:
    """RMSNorm over each head, or over all heads together (OLMo 2)."""
    norm = functools.partial(Norm, self.cfg, "rmsnorm", name=name)
    if self.cfg.qk_norm == "head":
      return norm(size=x_BTNH.shape[-1])(x_BTNH)
    flat = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
    return norm(size=flat.shape[-1])(flat).reshape(x_BTNH.shape)

  def _latent_qkv(
    self,
    x_BTD: jax.Array,
    here: KindInputs,
    key: jax.Array | None,
  ) -> Heads:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values are computed from one compressed vector per token. A cache holds only that
    vector and one rotated key that all heads share:

      x -> kv_down -> [ latent C | shared key R ]
                         |            |
                 k, v <- norm      rotate        key of a head = [ k | shared key ]
                                                 query of a head = [ plain | rotated R ]
    """
    q, latent_BTC, shared_key = self._compressed(x_BTD, here, key)
    cfg, lat, N = self.cfg, self.cfg.latent, self.cfg.num_heads
    R, plain = lat.rope_dim, cfg.head_dim - lat.rope_dim
    k = self._heads("k", latent_BTC, ("heads", N, plain), key, "latent")
    v = self._heads("v", latent_BTC, ("heads", N, lat.v_dim), key, "latent")
    k = jnp.concatenate([k, jnp.broadcast_to(shared_key, (*k.shape[:3], R))], -1)
    return q, k, v

  def _compressed(
    self, x_BTD: jax.Array, here: KindInputs, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latent attention's (queries [B, T, N, H], latents [B, T, C], shared keys [B, T, 1, R])."""
    cfg = self.cfg
    assert here.rotary is not None
    lat, N, D = cfg.latent, cfg.num_heads, cfg.width
    R, plain = lat.rope_dim, cfg.head_dim - lat.rope_dim
    down = functools.partial(self.linear, axes=("embed", "rank"), std=cfg.init_std, key=key)
    x_BTC = x_BTD
    if lat.q_rank:
      x_BTC = down("q_down", x_BTD, (D, lat.q_rank))
      x_BTC = Norm(cfg, "rmsnorm", lat.q_rank, lat.norm_eps, name="q_down_norm")(x_BTC)
    q_axis = "latent" if lat.q_rank else "embed"
    q = self._heads("q", x_BTC, ("heads", N, cfg.head_dim), key, q_axis)
    compressed = down("kv_down", x_BTD, (D, lat.kv_rank + R))
    norm = Norm(cfg, "rmsnorm", lat.kv_rank, lat.norm_eps, name="kv_down_norm")
    latent_BTC = norm(compressed[..., : lat.kv_rank])
    shared_key = rope.rotate(compressed[..., None, lat.kv_rank :], *here.rotary)
    q = jnp.concatenate([q[..., :plain], rope.rotate(q[..., plain:], *here.rotary)], -1)
    return q, latent_BTC, shared_key

  def _paged_latent(
    self, x_BTD: jax.Array, inputs: LayerInputs, cache: LayerCache, spec: Spec
  ) -> tuple[jax.Array, LayerCache]:
    """Latent attention over a paged cache, without keys and values of earlier tokens.

    The projections of keys and values move to the other side of their products (DeepSeek-V2,
    section 2.1.2), so that all heads attend to the latents themselves:

      q · (W_k c + b_k) = (W_k' q) · c + q · b_k
      sum of w (W_v c + b_v) = W_v (sum of w c) + b_v

    Adapters must have been merged into the weights. `model.quantize` does not apply to the two
    moved products.
    """
    cfg, lat, N = self.cfg, self.cfg.latent, self.cfg.num_heads
    assert inputs.call is not None and not lora.adapts(cfg.lora, "k")
    C, plain = lat.kv_rank, cfg.head_dim - lat.rope_dim
    q, latent_BTC, shared_key = self._compressed(x_BTD, inputs.kinds[self.kind], None)
    axes = ("latent", "heads", "head_dim")
    w_k = self.weight("k", (C, N, plain), axes, cfg.init_std).astype(self.dtype)
    w_v = self.weight("v", (C, N, lat.v_dim), axes, cfg.init_std).astype(self.dtype)
    queries = [jnp.einsum("BTNH,CNH->BTNC", q[..., :plain], w_k), q[..., plain:]]
    keys = [latent_BTC[:, :, None], shared_key]
    if cfg.qkv_bias:
      b_k = self.vector("k_bias", (N, plain), axes[1:]).astype(self.dtype)
      queries.append(jnp.einsum("BTNH,NH->BTN", q[..., :plain], b_k)[..., None])
      keys.append(jnp.ones_like(shared_key[..., :1]))
    pool = paged.write(cache["latent"], jnp.concatenate(keys, -1), inputs.call)
    q = jnp.concatenate(queries, -1)
    at = (inputs.call, self.kind, inputs.positions, spec)
    mean_BTNC = paged.attend(q, pool, None, *at, v_size=C)
    out = jnp.einsum("BTNC,CNH->BTNH", mean_BTNC, w_v)
    if cfg.qkv_bias:
      out += self.vector("v_bias", (N, lat.v_dim), axes[1:]).astype(self.dtype)
    return out, {"latent": pool}


def mark(
  qkv: Heads, rules: Rules, named: Sequence[str] = QKV, *, heads_first: bool = False
) -> Heads:
  """Pins queries, keys and values to the mesh, and names them for remat policies.

  Args:
    qkv: Each [B, T, heads, H].
    rules: Logical axis rules.
    named: Names to give here.
    heads_first: Whether to do so as [B, heads, T, H], which TPU kernels read. What a policy saves
      goes into the kernel of the backward pass as it is, and would be transposed otherwise.
  """
  axes: Axes = ("batch", "length", "act_heads", None)
  turned = lambda x: x
  if heads_first:
    axes, turned = ("batch", "act_heads", "length", None), lambda x: x.swapaxes(1, 2)

  def one(x: jax.Array, name: str) -> jax.Array:
    x = rules.constrain(turned(x), *axes)
    return turned(checkpoint_name(x, name) if name in named else x)

  q, k, v = map(one, qkv, QKV)
  return q, k, v
