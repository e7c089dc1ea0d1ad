"""Language-model loss over chunks of tokens, so that the whole logits never exist.

With 128,000 tokens in the vocabulary, the logits are the largest array of a step: 2 GiB in float32
for a row of 4,096 tokens. This module scans over chunks of a device's tokens instead. Each
iteration computes the logits of one chunk, its loss, and already the gradients of the hidden states
and of the head's weight, so that no product is computed twice:

            scan over chunks ->
  x_MD    | x_CD  | x_CD  | …        logits_CV = x_CD w_DV        exists only within an iteration
  targets | t_C   | t_C   | …        loss     += sum of weights * (nll + z_loss log_z^2)
          v       v       v          d_logits_CV = d loss / d logits
  loss, nll  = carry, summed         dx_CD     = d_logits_CV w_DV^T     output of the iteration
  dw_DV      = carry, summed         dw_DV    += x_CD^T d_logits_CV     carry, float32

The forward pass thus computes the gradients for an upstream gradient of 1, and the backward pass
only scales them (`_backward`). This is exact since the loss is a sum.

On a mesh, each device scans over its own tokens and its own columns of the weight. Devices that
share tokens but hold other columns exchange a max and two sums per token (`losses.softmax_terms`).
Devices with other tokens sum the weight's gradient once, after the last chunk, rather than once per
chunk.

B batch, T position, M tokens of a device, C chunk, D model, V vocabulary (columns of a device).
"""

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.parallel.sharding import Rules, part, without
from jaxgpt.training import losses

Sums: TypeAlias = tuple[jax.Array, jax.Array]  # (loss, nll), scalars


class Options(NamedTuple):
  """Options of the loss.

  Attributes:
    chunk: Tokens per device whose logits exist at once.
    softcap: Logits become softcap * tanh(logits / softcap). None for no cap.
    z_loss: Weight of log(Z)^2.
    float32_gradient: Sum the weight's gradient over devices in float32 rather than in x's dtype.
    rules: Logical axis rules, which say how the mesh shards tokens and the weight.
    smoothing: Label smoothing, see `losses`.
  """

  chunk: int
  softcap: float | None
  z_loss: float
  float32_gradient: bool
  rules: Rules
  smoothing: float = 0.0


class _Axes(NamedTuple):
  """Mesh axes that shard the tokens, and the two dimensions of the weight."""

  tokens: losses.MeshAxes = ()
  embed: losses.MeshAxes = ()
  vocab: losses.MeshAxes = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def loss_sums(
  x_BTD: jax.Array,
  w_DV: jax.Array,
  bias_V: jax.Array | None,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  options: Options,
) -> Sums:
  """The weighted sums of a language model's loss. Only the first one has a gradient.

  Args:
    x_BTD: Hidden states in the compute dtype.
    w_DV: Float32 weight of the head.
    bias_V: Float32 bias of the head, or None.
    targets_BT: Token ids.
    weights_BT: Loss weight of each prediction.
    options: An `Options`.

  Returns:
    (loss, nll): Sums over all tokens, in nats. The loss includes label smoothing and z-loss.
  """
  return _on_mesh(x_BTD, w_DV, bias_V, targets_BT, weights_BT, options, False)[0]


def _forward(x_BTD, w_DV, bias_V, targets_BT, weights_BT, options):
  return _on_mesh(x_BTD, w_DV, bias_V, targets_BT, weights_BT, options, True)


def _backward(options, grads, d_sums):
  del options
  scaled = jax.tree.map(lambda g: (g * d_sums[0]).astype(g.dtype), grads)
  return *scaled, None, None


loss_sums.defvjp(_forward, _backward)


def _on_mesh(
  x_BTD: jax.Array,
  w_DV: jax.Array,
  bias_V: jax.Array | None,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  options: Options,
  with_gradients: bool,
) -> tuple[Sums, Any]:
  """(sums, gradients of x, weight and bias or None), each device on its shards."""
  local = functools.partial(_local, options=options, with_gradients=with_gradients)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(x_BTD, w_DV, bias_V, targets_BT, weights_BT, axes=_Axes())
  tokens = options.rules.fitting_spec(mesh, targets_BT.shape, ("rows", "length"))
  # Over mesh axes that shard the tokens, the vocabulary is gathered: these devices have no terms of
  # the same token to sum.
  vocab = without(options.rules.mesh_axes("vocab"), tokens)
  weight = P(part(options.rules.mesh_axes("embed")), part(vocab))
  bias = None if bias_V is None else P(weight[1])
  x = P(*tokens, None)
  local = functools.partial(local, axes=_Axes(_names(tokens), *(_names([a]) for a in weight)))
  grads = (x, weight, bias) if with_gradients else None
  return jax.shard_map(
    local,
    in_specs=(x, weight, bias, tokens, tokens),
    out_specs=((P(), P()), grads),
    check_vma=False,
  )(x_BTD, w_DV, bias_V, targets_BT, weights_BT)


def _names(spec: Any) -> losses.MeshAxes:
  """The mesh axes in entries of a PartitionSpec."""
  return tuple(
    name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())
  )


def _local(
  x_BTD: jax.Array,
  w_DV: jax.Array,
  bias_V: jax.Array | None,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  options: Options,
  with_gradients: bool,
  axes: _Axes,
) -> tuple[Sums, Any]:
  """The scan over one device's chunks. See `_on_mesh`."""
  dtype = x_BTD.dtype
  w = w_DV.astype(dtype)
  if axes.embed:
    w = jax.lax.all_gather(w, axes.embed, axis=0, tiled=True)
  D, V = w.shape
  chunks = [
    _chunks(a, options.chunk)
    for a in (x_BTD.reshape(-1, D), targets_BT.reshape(-1), weights_BT.reshape(-1))
  ]
  first_column = jax.lax.axis_index(axes.vocab) * V if axes.vocab else 0

  def body(total, chunk):
    sums, grads = total
    x_CD, targets_C, weights_C = chunk
    more, d_logits_CV = _sums_and_gradient(
      _logits(x_CD, w, bias_V), targets_C - first_column, weights_C, options, axes.vocab
    )
    sums = jax.tree.map(jnp.add, sums, more)
    if not with_gradients:
      return (sums, grads), None
    narrow_CV = d_logits_CV.astype(dtype)
    dx_CD = jnp.einsum("CV,DV->CD", narrow_CV, w, preferred_element_type=jnp.float32)
    dw, db = grads
    dw += jnp.einsum("CD,CV->DV", x_CD, narrow_CV, preferred_element_type=jnp.float32)
    db = None if db is None else db + d_logits_CV.sum(0)
    return (sums, (dw, db)), losses.psum(dx_CD, axes.vocab).astype(dtype)

  grads: Any = None
  if with_gradients:
    grads = jnp.zeros((D, V), jnp.float32), None if bias_V is None else jnp.zeros_like(bias_V)
  zero = jnp.zeros((), jnp.float32)
  (sums, grads), dx = jax.lax.scan(body, ((zero, zero), grads), tuple(chunks))
  sums = jax.tree.map(lambda s: losses.psum(s, axes.tokens), sums)
  if not with_gradients:
    return sums, None
  dx_BTD = dx.reshape(-1, D)[: targets_BT.size].reshape(x_BTD.shape)  # without the padding
  dw, db = grads
  dw = dw if options.float32_gradient else dw.astype(dtype)
  return sums, (
    dx_BTD,
    _reduce_weight_gradient(dw, axes).astype(w_DV.dtype),
    None if db is None else losses.psum(db, axes.tokens),
  )


def _chunks(x: jax.Array, size: int) -> jax.Array:
  """[M, …] -> [chunks, C, …], padded with zeros, whose loss weight is 0."""
  size = min(size, x.shape[0])
  x = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(-1, size, *x.shape[1:])


def _logits(x_CD: jax.Array, w_DV: jax.Array, bias_V: jax.Array | None) -> jax.Array:
  logits = jnp.einsum("CD,DV->CV", x_CD, w_DV, preferred_element_type=jnp.float32)
  return logits if bias_V is None else logits + bias_V


def _sums_and_gradient(
  logits_CV: jax.Array,
  targets_C: jax.Array,
  weights_C: jax.Array,
  options: Options,
  vocab_axes: losses.MeshAxes,
) -> tuple[Sums, jax.Array]:
  """The sums of a chunk, and the gradient of the loss with respect to its logits.

  Args:
    logits_CV: This device's columns of the logits, before the softcap.
    targets_C: Token ids, counted from this device's first column.
    weights_C: Loss weight of each prediction.
    options: An `Options`.
    vocab_axes: Mesh axes that the columns are sharded over.
  """
  slope: jax.Array | int = 1
  if options.softcap is not None:
    tanh = jnp.tanh(logits_CV / options.softcap)
    logits_CV, slope = options.softcap * tanh, 1 - tanh * tanh
  nll_C, log_z_C, probs_CV = losses.softmax_terms(logits_CV, targets_C, vocab_axes)
  smoothing, mean_C, d_target_C = options.smoothing, None, weights_C
  num_columns = logits_CV.shape[-1] * (jax.lax.axis_size(vocab_axes) if vocab_axes else 1)
  if smoothing:
    mean_C = losses.psum(logits_CV.sum(-1), vocab_axes) / num_columns
    d_target_C = weights_C * (1 - smoothing)
  sums = losses.weighted_sums(nll_C, log_z_C, weights_C, options.z_loss, smoothing, mean_C)
  d_log_z_C = weights_C * (1 + 2 * options.z_loss * log_z_C)
  d_logits_CV = losses.logits_gradient(probs_CV, targets_C, d_log_z_C[:, None], d_target_C[:, None])
  if smoothing:
    d_logits_CV -= (smoothing / num_columns) * weights_C[:, None]
  return sums, d_logits_CV * slope


def _reduce_weight_gradient(dw_DV: jax.Array, axes: _Axes) -> jax.Array:
  """Sums the weight's gradient over the devices of the tokens. Each keeps its own rows of D."""
  if axes.embed and set(axes.embed) <= set(axes.tokens):
    dw_DV = jax.lax.psum_scatter(dw_DV, axes.embed, scatter_dimension=0, tiled=True)
    return losses.psum(dw_DV, tuple(name for name in axes.tokens if name not in axes.embed))
  dw_DV = losses.psum(dw_DV, axes.tokens)
  if axes.embed:
    size = dw_DV.shape[0] // jax.lax.axis_size(axes.embed)
    first = jax.lax.axis_index(axes.embed) * size
    dw_DV = jax.lax.dynamic_slice_in_dim(dw_DV, first, size)
  return dw_DV
