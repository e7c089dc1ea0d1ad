"""Every form of attention against a loop over queries."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.model import ops
from jaxgpt.model.attention import attention
from jaxgpt.parallel import mesh as mesh_lib


def inputs(B=2, T=7, N=4, K=2, H=8):
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (B, T, N, H))
  k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:3])
  mask = jax.random.bernoulli(keys[3], 0.6, (B, T, T)).at[0, 3].set(False)
  return q, k, v, mask


def by_definition(q, k, v, mask, scale, softcap):
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  group = q.shape[2] // k.shape[2]
  for b, t, n in np.ndindex(q.shape[:3]):
    keys = np.flatnonzero(mask[b, t])
    if keys.size:
      logits = k[b, keys, n // group] @ q[b, t, n] * scale
      logits = softcap * np.tanh(logits / softcap) if softcap else logits
      weights = np.exp(logits - logits.max())
      out[b, t, n] = weights @ v[b, keys, n // group] / weights.sum()
  return out


@pytest.mark.parametrize("form", ["reference", "batched"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_forms_agree_with_the_definition(form, softcap, heads):
  q, k, v, mask = inputs(N=heads[0], K=heads[1])
  out = attention.attend(form, q, k, v, mask, scale=0.3, softcap=softcap)
  np.testing.assert_allclose(out, by_definition(q, k, v, np.asarray(mask), 0.3, softcap), atol=1e-5)


@pytest.mark.parametrize("T", [8, 7, 12])
def test_the_causal_form_skips_only_what_the_mask_hides(T, monkeypatch):
  monkeypatch.setattr(attention, "_CHUNK", 2)
  monkeypatch.setattr(attention, "_MOST_CHUNKS", 4)
  q, k, v, mask = inputs(T=T)
  mask &= jnp.tril(jnp.ones((T, T), bool))

  def both(f):
    out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, mask, scale=0.3), q, k, v)
    return out, vjp(jnp.cos(out))

  got = both(functools.partial(attention.batched, causal=True))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, both(attention.reference)
  )


@pytest.mark.parametrize("form", ["reference", "batched"])
def test_gradients_agree_and_a_row_that_sees_nothing_has_none(form):
  q, k, v, mask = inputs()

  def loss(form):
    return lambda q, k, v: jnp.sin(attention.attend(form, q, k, v, mask, scale=0.3)).sum()

  got = jax.grad(loss(form), (0, 1, 2))(q, k, v)
  want = jax.grad(loss("reference"), (0, 1, 2))(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
  assert np.isfinite(got[0]).all() and not got[0][0, 3].any()


def test_heads_that_do_not_divide_are_refused():
  q, k, v, mask = inputs(N=4, K=3)
  with pytest.raises(ValueError, match="4 query heads are no multiple of 3"):
    attention.reference(q, k, v, mask, scale=1.0)


@pytest.mark.parametrize(
  "fields",
  [
    dict(causal=True),
    dict(causal=True, window=40),
    dict(causal=False, window=40),
    dict(causal=True, softcap=2.0, K=1),
  ],
)
def test_the_kernel_for_tpus_agrees_with_the_definition(fields):
  T = 256
  fields = dict(fields)
  q, k, v, _ = inputs(T=T, K=fields.pop("K", 2))
  segments = jnp.array([[1] * 100 + [2] * 100 + [0] * 56, [1] * T])
  softcap = fields.pop("softcap", None)
  mask = ops.visible(segments, **fields)
  real = (segments != 0)[..., None, None]

  def both(f):
    out, vjp = jax.vjp(lambda q, k, v: f(q, k, v) * real, q, k, v)
    return out, vjp(jnp.cos(out) * real)

  got = both(
    lambda q, k, v: attention.splash(
      q, k, v, segments, scale=0.3, softcap=softcap, interpret=True, **fields
    )
  )
  want = both(lambda q, k, v: attention.reference(q, k, v, mask, scale=0.3, softcap=softcap))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_the_kernel_for_tpus_under_a_mesh():
  q, k, v, _ = inputs(B=4, T=256)
  segments = jnp.ones((4, 256), jnp.int32).at[:, 200:].set(2)
  run = jax.jit(functools.partial(attention.splash, scale=0.3, causal=True, interpret=True))
  c = config.base().mesh
  c.update(dict(data=4, fsdp=1, tensor=2))
  with jax.set_mesh(mesh_lib.make(c)):
    got = run(q, k, v, segments)
  want = attention.reference(q, k, v, ops.visible(segments, causal=True), scale=0.3)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  "platform, more, form",
  [
    ("cpu", {}, "batched"),
    ("tpu", {}, "splash"),
    ("tpu", dict(length=100), "reference"),
    ("gpu", {}, "cudnn"),
    ("gpu", dict(dtype="float32"), "reference"),
    ("gpu", dict(softcap=30.0), "reference"),
    ("gpu", dict(heads=(256, 256)), "reference"),
    ("gpu", dict(heads=(100, 100)), "reference"),
    ("gpu", dict(heads=(128, 64)), "reference"),
  ],
)
def test_auto_goes_by_the_platform(platform, more, form):
  fields = dict(length=1024, dtype="bfloat16", softcap=None, heads=(64, 64)) | more
  assert attention.choose("auto", platform, **fields) == form
  assert attention.choose("batched", platform, **fields) == "batched"


@pytest.mark.parametrize(
  "form, platform, more, words",
  [
    ("splash", "cpu", {}, "a kernel for TPUs, and the devices are of the kind 'cpu'"),
    ("cudnn", "tpu", {}, "a kernel for GPUs, and the devices are of the kind 'tpu'"),
    ("splash", "tpu", dict(length=1000), "data.seq_len=1000 is no multiple of 128"),
    ("cudnn", "gpu", dict(dtype="float32"), "set model.dtype=bfloat16"),
  ],
)
def test_a_kernel_that_cannot_run_is_refused(form, platform, more, words):
  fields = dict(length=1024, dtype="bfloat16", softcap=None, heads=(64, 64)) | more
  with pytest.raises(UserError, match=words):
    attention.choose(form, platform, **fields)


def test_heads_go_to_cudnn_where_the_gpu_has_kernels_for_them(monkeypatch):
  fields = dict(length=1024, dtype="bfloat16", softcap=None, heads=(256, 128))
  with pytest.raises(
    UserError, match=r"no kernel for heads of 256 \(values 128\) on a GPU that is not"
  ):
    attention.choose("cudnn", "gpu", **fields)
  gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
  monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
  assert attention.choose("auto", "gpu", **fields) == "cudnn"
  assert attention.choose("cudnn", "gpu", **fields) == "cudnn"
  gpu.compute_capability = "gfx942"
  assert attention.choose("auto", "gpu", **fields) == "reference"
  gpu.compute_capability = "8.0"
  with pytest.raises(UserError, match="on NVIDIA H100; leave model.attention=auto"):
    attention.choose("cudnn", "gpu", **fields)
