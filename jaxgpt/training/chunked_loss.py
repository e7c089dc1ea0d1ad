"""The loss of a language model's head, a chunk of tokens at a time: its logits never exist at once.

With 128,000 tokens in the vocabulary, a row's logits are the largest array of a step. Here a scan goes
over chunks of a device's tokens and adds up the loss and, in the same pass, the gradients of the hidden
states and of the weight, so that no product is made twice. Each device works on its own tokens and
columns of the weight; the gradient is summed over the devices once, after the last chunk.

B batch, T position, M tokens of a device, C chunk, D model, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.parallel.sharding import Rules, part, without


class Terms(NamedTuple):
  """What is computed from the logits.

  Attributes:
    chunk: tokens of a device whose logits exist at once.
    softcap: of the logits, or None.
    z_loss: weight of log(Z)^2.
    wide_gradient: whether the weight's gradient is summed over devices in float32.
    rules: how the mesh cuts tokens and the weight.
  """

  chunk: int
  softcap: float | None
  z_loss: float
  wide_gradient: bool
  rules: Rules


class _Axes(NamedTuple):
  """Axes of the mesh, as tuples: of the tokens, of the weight's two dimensions."""

  tokens: tuple = ()
  embed: tuple = ()
  vocab: tuple = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def loss_sums(x_BTD, w_DV, bias_V, targets_BT, weights_BT, terms):
  """The weighted sums of a language model's loss; the gradient is that of the first one.

  Args:
    x_BTD: hidden states in the compute dtype.
    w_DV: float32 weight of the head.
    bias_V: float32, or None.
    targets_BT: token ids.
    weights_BT: of each prediction.
    terms: a `Terms`.

  Returns:
    (loss, nll): sums over all tokens of the negative log likelihood, the first with z-loss.
  """
  return _on_mesh(x_BTD, w_DV, bias_V, targets_BT, weights_BT, terms, False)[0]


def _forward(x_BTD, w_DV, bias_V, targets_BT, weights_BT, terms):
  return _on_mesh(x_BTD, w_DV, bias_V, targets_BT, weights_BT, terms, True)


def _backward(terms, grads, d):
  del terms
  scaled = jax.tree.map(lambda g: (g * d[0]).astype(g.dtype), grads)
  return *scaled, None, None


loss_sums.defvjp(_forward, _backward)


def _on_mesh(x_BTD, w_DV, bias_V, targets_BT, weights_BT, terms, with_gradients):
  """(sums, gradients of x, w and the bias), each device on its part."""
  local = functools.partial(_local, terms=terms, with_gradients=with_gradients)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(x_BTD, w_DV, bias_V, targets_BT, weights_BT, axes=_Axes())
  tokens = terms.rules.fitting_spec(mesh, targets_BT.shape, ("rows", "length"))
  # Devices with other tokens have nothing to add up: over their axes the vocabulary is gathered.
  vocab = without(terms.rules.mesh_axes("vocab"), tokens)
  weight = P(part(terms.rules.mesh_axes("embed")), part(vocab))
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


def _names(spec):
  """The mesh axes of parts of a PartitionSpec."""
  return tuple(name for part in spec for name in ((part,) if isinstance(part, str) else part or ()))


def _local(x_BTD, w_DV, bias_V, targets_BT, weights_BT, terms, with_gradients, axes):
  dtype = x_BTD.dtype
  w = w_DV.astype(dtype)
  if axes.embed:
    w = jax.lax.all_gather(w, axes.embed, axis=0, tiled=True)
  D, V = w.shape
  chunks = [
    _chunks(a, terms.chunk)
    for a in (x_BTD.reshape(-1, D), targets_BT.reshape(-1), weights_BT.reshape(-1))
  ]
  first = jax.lax.axis_index(axes.vocab) * V if axes.vocab else 0

  def body(total, chunk):
    sums, grads = total
    x_CD, targets_C, weights_C = chunk
    more, dlogits = _of_logits(_product(x_CD, w, bias_V), targets_C - first, weights_C, terms, axes)
    sums = jax.tree.map(jnp.add, sums, more)
    if not with_gradients:
      return (sums, grads), None
    narrow = dlogits.astype(dtype)
    dx_CD = jnp.einsum("CV,DV->CD", narrow, w, preferred_element_type=jnp.float32)
    dw, db = grads
    dw += jnp.einsum("CD,CV->DV", x_CD, narrow, preferred_element_type=jnp.float32)
    db = None if db is None else db + dlogits.sum(0)
    return (sums, (dw, db)), _summed(dx_CD, axes.vocab).astype(dtype)

  grads = None
  if with_gradients:
    grads = jnp.zeros((D, V), jnp.float32), None if bias_V is None else jnp.zeros_like(bias_V)
  zero = jnp.zeros((), jnp.float32)
  (sums, grads), dx = jax.lax.scan(body, ((zero, zero), grads), tuple(chunks))
  sums = jax.tree.map(lambda s: _summed(s, axes.tokens), sums)
  if not with_gradients:
    return sums, None
  dx = dx.reshape(-1, D)[: targets_BT.size].reshape(x_BTD.shape)
  dw, db = grads
  dw = dw if terms.wide_gradient else dw.astype(dtype)
  return sums, (
    dx,
    _reduced(dw, axes).astype(w_DV.dtype),
    None if db is None else _summed(db, axes.tokens),
  )


def _chunks(x, size):
  """[M, …] -> [chunks, C, …], filled up with zeros, whose weight is none."""
  size = min(size, x.shape[0])
  x = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(-1, size, *x.shape[1:])


def _product(x_CD, w_DV, bias_V):
  logits = jnp.einsum("CD,DV->CV", x_CD, w_DV, preferred_element_type=jnp.float32)
  return logits if bias_V is None else logits + bias_V


def _of_logits(logits_CV, targets_C, weights_C, terms, axes):
  """((loss, nll), gradient of the loss by the logits), of a device's columns of the logits.

  Args:
    targets_C: counted from this device's first column.
  """
  slope = 1
  if terms.softcap is not None:
    tanh = jnp.tanh(logits_CV / terms.softcap)
    logits_CV, slope = terms.softcap * tanh, 1 - tanh * tanh
  top = logits_CV.max(-1, keepdims=True)
  top = jax.lax.pmax(top, axes.vocab) if axes.vocab else top
  exp_CV = jnp.exp(logits_CV - top)
  z = _summed(exp_CV.sum(-1, keepdims=True), axes.vocab)
  log_z_C = (jnp.log(z) + top)[:, 0]
  hit_CV = jnp.arange(logits_CV.shape[1]) == targets_C[:, None]
  of_target_C = _summed(jnp.where(hit_CV, logits_CV, 0).sum(-1), axes.vocab)
  nll = ((log_z_C - of_target_C) * weights_C).sum()
  loss = nll + terms.z_loss * (jnp.square(log_z_C) * weights_C).sum()
  of_z_C = weights_C * (1 + 2 * terms.z_loss * log_z_C)
  dlogits = exp_CV / z * of_z_C[:, None] - jnp.where(hit_CV, weights_C[:, None], 0)
  return (loss, nll), dlogits * slope


def _summed(x, names):
  return jax.lax.psum(x, names) if names else x


def _reduced(dw_DV, axes):
  """The weight's gradient summed over the devices of the tokens, each keeping its own rows."""
  if axes.embed and set(axes.embed) <= set(axes.tokens):
    dw_DV = jax.lax.psum_scatter(dw_DV, axes.embed, scatter_dimension=0, tiled=True)
    return _summed(dw_DV, tuple(name for name in axes.tokens if name not in axes.embed))
  dw_DV = _summed(dw_DV, axes.tokens)
  if axes.embed:
    rows = dw_DV.shape[0] // jax.lax.axis_size(axes.embed)
    dw_DV = jax.lax.dynamic_slice_in_dim(dw_DV, jax.lax.axis_index(axes.embed) * rows, rows)
  return dw_DV
