"""Attention: the definition, and forms of it that a backend runs faster.

B batch, T query position, S key position, N heads, K key/value heads, G = N / K, H head size.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.errors import UserError
from jaxgpt.model import ops
from jaxgpt.model.attention import blockwise, context_parallel, ring
from jaxgpt.parallel import sharding

_MASKED = -1e30  # finite, so that a row with no visible key has no NaN in its gradient


def reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale, softcap=None):
  """Grouped-query attention by definition: the reference for every kernel.

  Args:
    q_BTNH: queries; N is a multiple of K, query head n reads key head n // (N // K).
    k_BSKH, v_BSKH: keys and values; the values' H may be another than the keys'.
    mask_BTS: True where query t may read key s. A row with no True yields zeros.
    scale: factor on the logits, 1/sqrt(H) in most families.
    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118), or None.

  Returns:
    out_BTNH in q's dtype; the softmax runs in float32.

  Raises:
    ValueError: N is no multiple of K.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  if N % K:
    raise ValueError(f"{N} query heads are no multiple of {K} key/value heads")
  q = q_BTNH.reshape(B, T, K, N // K, H)
  logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BSKH, preferred_element_type=jnp.float32)
  logits = ops.softcap(logits * scale, softcap)
  mask = mask_BTS[:, None, None]
  weights = jax.nn.softmax(jnp.where(mask, logits, _MASKED), axis=-1)
  weights = jnp.where(mask, weights, 0).astype(q.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, -1)


# Smaller chunks of queries leave less of the upper triangle, but make smaller matmuls.
_CHUNK = 128
_MOST_CHUNKS = 8  # each is compiled on its own


def batched(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale, softcap=None, causal=False):
  """Grouped-query attention in the form that XLA's CPU backend runs fastest.

  Heads become a batch dimension of plain matmuls, the softmax's gradient is written out, and where
  the mask is causal the keys after each chunk of queries are never multiplied.

  Args:
    q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale, softcap: as in `reference`, which does the work where
      there is a softcap.
    causal: whether `mask_BTS` hides every key after its query (and T = S).

  Returns:
    As `reference`.
  """
  if softcap is not None:
    return reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  heads_first = lambda x, *shape: x.swapaxes(1, 2).reshape(*shape)
  chunks = min(T // _CHUNK, _MOST_CHUNKS) if causal and T % _CHUNK == 0 else 1
  chunks = chunks if T % chunks == 0 else 1
  q = heads_first(q_BTNH, B * K, N // K, T, H)
  k, v = (heads_first(x, B * K, x.shape[1], x.shape[3]) for x in (k_BSKH, v_BSKH))
  bias = jnp.where(mask_BTS, 0.0, _MASKED)
  out = _chunked(q, k, v, bias, scale, chunks)
  return out.reshape(B, N, T, -1).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(q, k, v, bias, scale, chunks):
  """q [B*K, G, T, H], k and v [B*K, S, H], bias [B, T, S] -> [B*K, G, T, H]."""
  return _chunked_fwd(q, k, v, bias, scale, chunks)[0]


def _bounds(T, S, chunks):
  """(first query, last query, last key) of each chunk."""
  size = T // chunks
  return [(i * size, (i + 1) * size, S if chunks == 1 else (i + 1) * size) for i in range(chunks)]


def _fold(x):
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _dot(a, b, contract_a, contract_b, dtype=None):
  return jax.lax.dot_general(
    a, b, (((contract_a,), (contract_b,)), ((0,), (0,))), preferred_element_type=dtype
  )


def _chunked_fwd(q, k, v, bias, scale, chunks):
  BK, G, T, _ = q.shape
  B, S = bias.shape[0], k.shape[1]
  outs, weights = [], []
  for a, b, s in _bounds(T, S, chunks):
    logits = _dot(_fold(q[:, :, a:b]) * scale, k[:, :s], 2, 2, jnp.float32)
    logits = logits.reshape(B, BK // B, G, b - a, s) + bias[:, None, None, a:b, :s]
    top = logits.max(-1, keepdims=True)
    e = jnp.exp(logits - top)
    sees_any = top > 0.5 * _MASKED
    p = e * jnp.where(sees_any, 1 / e.sum(-1, keepdims=True), 0)
    p = p.reshape(BK, G * (b - a), s).astype(q.dtype)
    weights.append(p)
    outs.append(_dot(p, v[:, :s], 2, 1).reshape(BK, G, b - a, -1))
  out = jnp.concatenate(outs, 2)
  return out, (q, k, v, bias, tuple(weights), out)


def _chunked_bwd(scale, chunks, saved, dout):
  q, k, v, bias, weights, out = saved
  BK, G, T, H = q.shape
  S = k.shape[1]
  delta = (dout * out).sum(-1, keepdims=True, dtype=jnp.float32)
  dq, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
  for (a, b, s), p in zip(_bounds(T, S, chunks), weights, strict=True):
    grow = lambda x, s=s: jnp.pad(x, ((0, 0), (0, S - s), (0, 0)))
    d = _fold(dout[:, :, a:b])
    dv += grow(_dot(p, d, 1, 1))
    dlogits = p * (_dot(d, v[:, :s], 2, 2, jnp.float32) - _fold(delta[:, :, a:b])) * scale
    dlogits = dlogits.astype(q.dtype)
    dq.append(_dot(dlogits, k[:, :s], 2, 1).reshape(BK, G, b - a, H))
    dk += grow(_dot(dlogits, _fold(q[:, :, a:b]), 1, 1))
  return jnp.concatenate(dq, 2), dk, dv, jnp.zeros_like(bias)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def splash(
  q_BTNH,
  k_BSKH,
  v_BSKH,
  segment_ids_BT,
  *,
  scale,
  softcap=None,
  causal=False,
  window=None,
  interpret=False,
  rules=sharding.DEFAULT,
):
  """Splash attention, the Pallas kernel for TPUs, which skips what a mask hides block by block.

  Under a mesh each device takes its rows and heads; see `in_parts` for rows that are cut.

  Args:
    q_BTNH, k_BSKH, v_BSKH, scale, softcap: as in `reference`; T = S.
    segment_ids_BT: 1, 2, … for the documents of a row, 0 for padding, which sees other padding.
    causal, window: see `ops.visible`.
    interpret: runs the kernel's definition on any backend, slowly.
    rules: a `sharding.Rules`.

  Returns:
    As `reference`, but for padding.
  """
  T, N = q_BTNH.shape[1:3]
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else rules.num_shards(mesh, "act_heads")
  kernel = blockwise.splash_of(
    blockwise.Band(causal, window),
    N,
    T,
    T,
    blockwise.Kernel("splash", softcap, interpret),
    OUTPUT,
    shards,
  )
  q, k, v = blockwise.padded(*(x.swapaxes(1, 2) for x in (q_BTNH * scale, k_BSKH, v_BSKH)))

  def local(kernel, q, k, v, ids_BT):
    one = lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash_kernel.SegmentIds(q=ids, kv=ids))
    return jax.vmap(one)(q, k, v, ids_BT)

  if not mesh.empty and mesh.size > 1:
    rows, heads = rules.spec(("batch", "act_heads"))
    of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, P(heads, None)))
    whole = P(rows, heads)
    local = jax.shard_map(
      local, in_specs=(of_kernel, whole, whole, whole, P(rows)), out_specs=whole, check_vma=False
    )
  out = local(kernel, q, k, v, segment_ids_BT)
  return out[..., : v_BSKH.shape[-1]].swapaxes(1, 2).astype(q_BTNH.dtype)


OUTPUT = "attention"  # name of what attention puts out, and its kernels' statistics, for remat
CUDNN_FORWARD = (
  "dot_product_attention_fwd_wrapper"  # JAX's name of the step that makes both at once
)


def cudnn(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale, causal=False, rules=sharding.DEFAULT):
  """cuDNN's flash attention, for GPUs: 16-bit types, no softcap.

  Under a mesh each device takes its rows and heads; see `in_parts` for rows that are cut.

  Args:
    q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale: as in `reference`.
    causal: whether `mask_BTS` hides every key after its query (and T = S); they are then skipped.
    rules: a `sharding.Rules`.

  Returns:
    As `reference`, but a row with no True has some average of the values.
  """

  def local(q, k, v, mask):
    return jax.nn.dot_product_attention(
      q, k, v, mask=mask[:, None], scale=scale, is_causal=causal, implementation="cudnn"
    )

  args, mesh = (q_BTNH, k_BSKH, v_BSKH, mask_BTS), jax.sharding.get_abstract_mesh()
  if mesh.size > 1 and not mesh.manual_axes:
    # Left to itself, JAX would write the addresses of Python objects into the program.
    specs = [
      rules.fitting_spec(mesh, x.shape, ("batch", None, "act_heads", None)) for x in args[:3]
    ]
    specs.append(rules.fitting_spec(mesh, mask_BTS.shape, ("batch", None, None)))
    local = jax.shard_map(local, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
  return local(*args)


def in_parts(
  form,
  q_BTNH,
  k_BTKH,
  v_BTKH,
  segment_ids_BT,
  *,
  scale,
  softcap,
  causal,
  window,
  interpret=False,
  rules=sharding.DEFAULT,
):
  """Attention where the mesh cuts rows over devices: see `context` and `ring`.

  Args:
    form: 'splash', 'cudnn', which reads gathered keys, or any other: by definition.
    causal: whether a token reads only what came before; tokens are then in `context.balance`'s
      order.

  The other arguments and the result are those of `splash`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  kernel = blockwise.Kernel("splash" if form == "splash" else "plain", softcap, interpret)
  (axis,) = sharding.FIXED.mesh_axes("length")
  plan = context_parallel.Plan(kernel, causal, window, axis, mesh.shape[axis], OUTPUT)
  first = lambda x: x.swapaxes(1, 2)
  run, args = ring.attend, (first(q_BTNH * scale), first(k_BTKH), first(v_BTKH))
  order = ("batch", "act_heads", "length", None)
  if form == "cudnn" and softcap is None:
    run, args = _cudnn_in_parts, (q_BTNH * scale, k_BTKH, v_BTKH)
    order = ("batch", "length", "act_heads", None)
  ids = segment_ids_BT[:, None]
  specs = [rules.fitting_spec(mesh, x.shape, order) for x in args]
  specs.append(rules.fitting_spec(mesh, ids.shape, ("batch", None, "length")))
  out = jax.shard_map(
    functools.partial(run, plan), in_specs=tuple(specs), out_specs=specs[0], check_vma=False
  )(*args, ids)
  return first(out) if run is ring.attend else out


def _cudnn_in_parts(plan, q_BTNH, k_BTKH, v_BTKH, ids_B1T):
  """cuDNN takes no part of a softmax: a device's queries read keys that are gathered."""
  gather = lambda x, axis: jax.lax.all_gather(x, plan.axis, axis=axis, tiled=True)
  mask = context_parallel.mask_of(plan, ids_B1T[:, 0], gather(ids_B1T[:, 0], 1))
  return cudnn(q_BTNH, gather(k_BTKH, 1), gather(v_BTKH, 1), mask, scale=1.0)


FORMS = ("reference", "batched", "splash", "cudnn")
KERNELS = {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}  # the platforms that they run on


def choose(form, platform, *, length, dtype, softcap, heads):
  """The form that 'auto' stands for.

  Args:
    form: one of `FORMS`, which is returned as it is, or 'auto'.
    platform: of the devices: 'cpu', 'tpu', 'gpu' (or 'cuda', as plans name it).
    length: tokens a row.
    dtype: of the queries.
    softcap: on the logits, or None.
    heads: (size of a head's queries and keys, of its values).

  Raises:
    UserError: a kernel is asked for that these devices don't run, or that takes no such rows or heads.
  """
  auto = f"leave model.attention=auto, or choose one of {', '.join(FORMS[:2])}"
  if form in KERNELS and platform not in KERNELS[form]:
    raise UserError(
      f"model.attention={form!r} is a kernel for {KERNELS[form][0].upper()}s, and the "
      f"devices are of the kind {platform!r}; {auto}"
    )
  if form == "splash" and length % blockwise.LANES:
    raise UserError(
      f"model.attention='splash': data.seq_len={length} is no multiple of "
      f"{blockwise.LANES}, its smallest block; make it one, or {auto}"
    )
  if form == "cudnn" and jnp.dtype(dtype).itemsize != 2:
    raise UserError(
      f"model.attention='cudnn' takes 16-bit types: set model.dtype=bfloat16, or {auto}"
    )
  if form == "cudnn" and not _cudnn_takes(*heads):
    raise UserError(
      f"model.attention='cudnn': cuDNN has no kernel for heads of {heads[0]} (values "
      f"{heads[1]}) on {_gpu() or 'a GPU that is not here'}; leave model.attention=auto"
    )
  if form != "auto":
    return form
  if platform == "cpu":
    return "batched"
  if platform == "tpu" and length % blockwise.LANES == 0:
    return "splash"
  takes_any = platform in KERNELS["cudnn"] and jnp.dtype(dtype).itemsize == 2 and softcap is None
  if takes_any and _cudnn_takes(*heads):
    return "cudnn"
  return "reference"


def _cudnn_takes(of_keys, of_values):
  """Whether JAX has cuDNN's kernels for heads of these sizes, which depends on the GPU that is here."""
  version = jax.local_devices()[0].compute_capability if _gpu() else "0"
  if not version.replace(".", "", 1).isdigit():
    return False  # not NVIDIA's
  is_new = float(version) >= 9.0
  return (
    of_keys % 8 == 0
    and of_values % 8 == 0
    and of_keys <= (256 if is_new else 128)
    and (of_keys == of_values or is_new)
  )


def _gpu():
  """The name of the GPU that is here, or None."""
  device = jax.local_devices()[0]
  return device.device_kind if device.platform == "gpu" else None


def needs_mask(form, length):
  """Whether a form reads `mask_BTS` for rows of so many tokens, and not what it is made of."""
  return form != "splash" and context_parallel.parts(length) == 1


def attend(
  form,
  q_BTNH,
  k_BSKH,
  v_BSKH,
  mask_BTS,
  segment_ids_BT=None,
  *,
  scale,
  softcap=None,
  causal=False,
  window=None,
  rules=sharding.DEFAULT,
):
  """Attention by the named form; the result is named `OUTPUT` for remat policies.

  Args:
    form: one of `FORMS`.
    mask_BTS: see `reference`; None where `needs_mask` says so.
    segment_ids_BT, window: what the mask is made of, see `ops.visible`.
    causal: whether the mask hides every key after its query (and T = S). Where the mesh cuts
      rows, tokens are then in the order of `context.balance`.
    rules: a `sharding.Rules`, by which each device takes its rows and heads.

  The other arguments and the result are those of `reference`.
  """
  if mask_BTS is None:
    run = (
      functools.partial(in_parts, form) if context_parallel.parts(q_BTNH.shape[1]) > 1 else splash
    )
    return run(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      segment_ids_BT,
      scale=scale,
      softcap=softcap,
      causal=causal,
      window=window,
      rules=rules,
    )
  if form == "cudnn" and softcap is None:
    out = cudnn(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, causal=causal, rules=rules)
  elif form == "batched":
    out = batched(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap, causal=causal)
  else:
    out = reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)
  return checkpoint_name(out, OUTPUT)
