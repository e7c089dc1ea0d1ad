"""Layers that blocks are built from: the base module, norms and MLPs.

B batch, T position, D model, F feed-forward.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.config.remat import DOWN, GATE, UP
from jaxgpt.model import lora, ops
from jaxgpt.model.attention import choose
from jaxgpt.model.quantization import quantized, quantized_base
from jaxgpt.model.scaling import mup
from jaxgpt.parallel.sharding import Axes, Rules

Shape = tuple[int, ...]


class Module(nn.Module):
  """A Linen module that declares parameters together with their logical axes.

  Attributes:
    cfg: The config's `model` section, resolved and frozen.
  """

  cfg: ml_collections.FrozenConfigDict

  def weight(self, name: str, shape: Shape, axes: Axes, std: float) -> jax.Array:
    """A float32 parameter with normal initial values. `axes` has a logical axis per dimension.

    Their standard deviation is `std` times the factor of `scaling.mup`.
    """
    std *= mup.factors(self.cfg, axes).init
    return self._declare(name, shape, axes, nn.initializers.normal(std))

  def vector(self, name: str, shape: Shape, axes: Axes, value: float = 0.0) -> jax.Array:
    """A float32 parameter that is initialized to one value. `axes` as in `weight`."""
    return self._declare(name, shape, axes, nn.initializers.constant(value))

  def _declare(self, name: str, shape: Shape, axes: Axes, init: Any) -> jax.Array:
    # Flax unboxes the parameter, which its type does not say.
    value: Any = self.param(
      name, nn.with_logical_partitioning(init, tuple(axes)), shape, jnp.float32
    )
    return value

  def tap(self, name: str, x: jax.Array) -> jax.Array:
    """Gives an activation a name under which `analysis.interpret` reads and replaces it.

    Here it returns x. `interpret.taps` intercepts the calls of this method.
    """
    del name
    return x

  def linear(
    self,
    name: str,
    x: jax.Array,
    shape: Shape,
    axes: Axes,
    std: float,
    *,
    num_in: int = 1,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Declares a weight and multiplies x by it, over the last `num_in` dimensions of x.

    If `model.lora` targets the weight, its low-rank adapter is added (see `lora`). Matrix B of the
    adapter is initialized to zero.

    Args:
      name: Name of the weight.
      x: Activations.
      shape: Shape of the weight: input dimensions, then output dimensions.
      axes: Logical axes of the weight.
      std: Standard deviation of its initial values.
      num_in: Number of input dimensions.
      key: PRNG key for the adapter's dropout, None for no dropout.
    """
    c_lora = self.cfg.lora
    # Parameters are always declared in the same order: it decides the PRNG key of each.
    if quantized_base.bits_of(c_lora):
      y = self._times_codes(name, x, shape, axes, std, num_in)
    elif self.cfg.quantize == "none":
      y = self.times(x, self.weight(name, shape, axes, std), num_in)
    else:
      w = self.weight(name, shape, axes, std)
      y = quantized.times(x, w, num_in, self.cfg.quantize, self.cfg.quantize_gradients)
    if not lora.adapts(c_lora, name):
      return y
    shape_a, axes_a = (*shape[:num_in], c_lora.rank), (*axes[:num_in], "rank")
    a = self.weight(name + lora.A, shape_a, axes_a, math.prod(shape[:num_in]) ** -0.5)
    b = self._declare(
      name + lora.B,
      (c_lora.rank, *shape[num_in:]),
      ("rank", *axes[num_in:]),
      nn.initializers.zeros,
    )
    if key is not None:
      # The sum of the name's bytes gives each adapter of a layer its own key.
      x = ops.dropout(x, c_lora.dropout, jax.random.fold_in(key, sum(name.encode())))
    return y + self.times(self.times(x, a, num_in), b, 1) * (c_lora.alpha / c_lora.rank)

  def _times_codes(
    self, name: str, x: jax.Array, shape: Shape, axes: Axes, std: float, num_in: int
  ) -> jax.Array:
    """Multiplies x by a frozen weight that is kept as codes, see `quantized_base`."""
    c_lora = self.cfg.lora
    bits = quantized_base.bits_of(c_lora)
    of_codes, of_scales = quantized_base.shapes(c_lora, name, shape, num_in)
    std *= mup.factors(self.cfg, axes).init
    init = lambda key, shape, dtype: quantized_base.initial(key, shape, bits)
    codes = self._declare(name + quantized_base.CODES, of_codes, axes, init)
    scale = nn.initializers.constant(quantized_base.initial_scale(std, bits))
    scales = self._declare(name + quantized_base.SCALES, of_scales, (None, *axes[num_in:]), scale)
    # Without the checkpoint, autodiff would keep the float32 weights of all layers.
    times = lambda x, codes, scales: self.times(
      x, quantized_base.weight(codes, scales, num_in), num_in
    )
    return jax.checkpoint(times)(x, codes, scales)

  def times(self, x: jax.Array, w: jax.Array, num_in: int, out_dtype: Any = None) -> jax.Array:
    """`ops.times` with the weight gradient in the dtype of `model.grad_dtype`."""
    return ops.times(x, w, num_in, wide_gradient=self.has_wide_gradients, out_dtype=out_dtype)

  @property
  def form(self) -> str:
    """The attention implementation.

    `training.build` resolves 'auto' by the devices of the mesh. A model that was made without it
    goes by JAX's default backend.
    """
    cfg = self.cfg
    if cfg.attention != "auto":
      return cfg.attention
    heads = (cfg.head_dim, cfg.latent.v_dim)
    work = choose.Workload(cfg.max_len, cfg.dtype, cfg.attn_softcap, heads)
    return choose.choose("auto", jax.default_backend(), work)

  @property
  def has_wide_gradients(self) -> bool:
    """Whether weight gradients are float32 while activations are not."""
    return self.cfg.grad_dtype == "float32" and self.cfg.dtype != "float32"

  @property
  def dtype(self) -> jnp.dtype:
    """The compute dtype."""
    return jnp.dtype(self.cfg.dtype)

  @property
  def residual_std(self) -> float:
    """Initial standard deviation of weights that write to the residual stream (GPT-2, sec. 2.3).

    With a base depth, `model.residual_scale` takes the place of more layers.
    """
    return self.cfg.init_std / (2 * (self.cfg.mup.base_depth or self.cfg.num_layers)) ** 0.5


class Norm(Module):
  """LayerNorm or RMSNorm over the last axis.

  Attributes:
    kind: 'layernorm' or 'rmsnorm'.
    size: Size of the last axis.
    eps: Added to the variance. None: `model.norm_eps`.
  """

  kind: str
  size: int
  eps: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes an array of shape [..., size]."""
    cfg = self.cfg
    scale = self.vector("scale", (self.size,), ("norm",), 1.0)
    eps = cfg.norm_eps if self.eps is None else self.eps
    if self.kind == "rmsnorm":
      return ops.rms_norm(x, scale, eps)
    bias = self.vector("bias", (self.size,), ("norm",)) if cfg.bias else None
    return ops.layer_norm(x, scale, bias, eps)


class MLP(Module):
  """activation(x up) down, or (activation(x gate) * x up) down if `model.gated` (arXiv:2002.05202).

  Attributes:
    rules: Logical axis rules.
    size: F.
  """

  rules: Rules
  size: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array, lora_key: jax.Array | None = None) -> jax.Array:
    """Applies the MLP. `lora_key` is the PRNG key of adapter dropout, or None."""
    cfg = self.cfg
    D, F = cfg.width, self.size

    def project(name, x, shape, axes, std, bias_axis):
      y = self.linear(name, x, shape, axes, std, key=lora_key)
      if cfg.bias:
        y += self.vector(f"{name}_bias", shape[1:], (bias_axis,)).astype(self.dtype)
      return checkpoint_name(y, name)

    act = ops.ACTIVATIONS[cfg.activation]
    widen = lambda name: project(name, x_BTD, (D, F), ("embed", "mlp"), cfg.init_std, "mlp")
    if cfg.gated:
      h = act(widen(GATE)) * widen(UP)
    else:
      h = act(widen(UP))
    # The columns of h are sharded like those of the weights (Megatron-LM, arXiv:1909.08053). So
    # tensor parallelism communicates only once, in the sum after the `down` matmul.
    h = self.rules.constrain(h, "batch", "length", "act_mlp")
    h = self.tap("mlp_hidden", ops.materialized(h, cfg.materialize))
    axes = ("mlp", "embed")
    return project(DOWN, h, (F, D), axes, self.residual_std, "norm")
