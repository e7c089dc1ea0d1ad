"""Rows that are sharded over devices: same attention as whole rows, equal work for each device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.model import remat as remat_lib
from jaxgpt.model import self_attention
from jaxgpt.model.attention import (
  attention,
  blockwise,
  context_parallel,
  masks,
  reference,
  ring,
  token_order,
)
from jaxgpt.model.attention.kernels import cudnn
from jaxgpt.model.attention.spec import BlockOutput, Spec
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from tests import quick


def mesh_of(seq, **axes):
  c = config.base().mesh
  c.update(dict(data=1, fsdp=1, seq=seq) | axes)
  return mesh_lib.make(c, jax.devices()[: seq * int(np.prod(list(axes.values()), dtype=int))])


def inputs(T, N=4, K=2):
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (2, T, heads, 8)) for key, heads in zip(keys, (N, K, K)))
  segments = np.ones((2, T), np.int32)
  segments[0, T // 4 :], segments[0, 3 * T // 4 :], segments[1, T // 8 :] = 2, 0, 2
  return q, k, v, jnp.asarray(segments)


def with_gradients(f, segments, *args):
  """Outputs and gradients at the places that are no padding."""
  real = (segments != 0)[..., None, None]

  @jax.jit
  def run(*args):
    out, vjp = jax.vjp(lambda *args: f(*args) * real, *args)
    return out, vjp(jnp.cos(out) * real)

  return run(*args)


def agree(mesh, T, form, atol=1e-5, **fields):
  q, k, v, segments = inputs(T)
  spec = Spec(scale=0.3, **fields)
  mask = masks.visible(segments, causal=spec.causal, window=spec.window)
  whole = functools.partial(reference.attention, scale=spec.scale, softcap=spec.softcap)
  want = with_gradients(lambda *qkv: whole(*qkv, mask), segments, q, k, v)
  same = lambda x: x
  to, back = (token_order.balance, token_order.restore) if spec.causal else (same, same)

  def sharded(*qkv):
    return back(context_parallel.attention(form, *map(to, qkv), to(segments), spec))

  with jax.set_mesh(mesh):
    got = with_gradients(sharded, segments, q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


@pytest.mark.parametrize(
  "seq, fields",
  quick.first(
    [
      (4, dict(causal=True, window=None, softcap=2.0)),
      (4, dict(causal=True, window=21)),  # three chunks
      (2, dict(causal=False, window=20)),
      (2, dict(causal=True, window=None)),
      (8, dict(causal=True, window=None)),
      (4, dict(causal=True, window=5)),  # less than a chunk
      (4, dict(causal=False, window=None)),
    ],
    3,
  ),
)
def test_sharded_rows_attend_as_whole_ones(seq, fields):
  agree(mesh_of(seq), 64, "batched", **fields)


def test_batch_and_heads_are_sharded_too():
  agree(mesh_of(2, data=2, tensor=2), 32, "batched", causal=True, window=9)


@pytest.mark.parametrize("seq, axes, window", [(4, {}, None), (2, dict(data=2), 9)])
def test_groups_of_heads(seq, axes, window, monkeypatch):
  monkeypatch.setattr(ring, "_GROUP_BYTES", 1)  # one key head per group
  agree(mesh_of(seq, **axes), 64, "batched", causal=True, window=window)


def test_large_queries_are_processed_in_groups_of_heads():
  def groups(T, N, K):
    q, k = (jax.ShapeDtypeStruct((1, heads, T, 128), jnp.bfloat16) for heads in (N, K))
    counted = jax.make_jaxpr(lambda q, k: ring._by_heads(lambda q, k: (q, k), q, k))(q, k)
    loops = [e.params["length"] for e in counted.eqns if e.primitive.name == "scan"]
    return loops or [1]

  assert groups(16_384, 32, 8) == groups(4096, 32, 8) == [8]
  assert groups(1024, 32, 8) == [2]
  assert groups(512, 32, 8) == groups(16_384, 8, 1) == [1]


@pytest.mark.parametrize(
  "fields",
  [
    dict(causal=True, window=40, softcap=2.0),
    pytest.param(dict(causal=True, window=None), marks=pytest.mark.slow),
    pytest.param(dict(causal=False, window=200), marks=pytest.mark.slow),
  ],
)
def test_splash_blocks(fields):
  agree(mesh_of(2), 512, "splash", atol=2e-5, interpret=True, **fields)


@pytest.mark.parametrize(
  "T, fields", [(192, dict(causal=True)), (160, dict(causal=False, window=9, softcap=2.0))]
)
def test_chunks_that_no_block_of_splash_fits_are_computed_by_definition(T, fields):
  agree(mesh_of(2), T, "splash", **fields)


@pytest.mark.slow
def test_splash_blocks_in_a_ring():
  agree(mesh_of(4), 1024, "splash", atol=2e-5, interpret=True, causal=True, window=None)


@pytest.mark.parametrize("fields", [dict(causal=True, window=None), dict(causal=False, window=9)])
def test_gathered_keys_for_cudnn(fields, monkeypatch):
  # cuDNN's kernel does not run on CPUs.
  by_definition = lambda q, k, v, mask, spec: reference.attention(q, k, v, mask, scale=spec.scale)
  monkeypatch.setattr(cudnn, "attention", by_definition)
  agree(mesh_of(4), 64, "cudnn", **fields)


def counted(monkeypatch, n, window=None):
  """Number of keys that each query attends to, [device, query], and the queries' positions."""

  def forward(cp, band, block):
    q, k_ids = block.q, block.k_ids
    seen = band.array(q.shape[2], block.k.shape[2]) & (k_ids[..., None, :] > 0)
    count = seen.sum(-1).astype(jnp.float32)  # [B, 1, T]
    return BlockOutput(jnp.broadcast_to(count[..., None], q.shape), jnp.zeros(q.shape[:3]))

  def merge(a, b):
    exists = b.log_z[..., None] > blockwise.NO_LOG_Z / 2
    return BlockOutput(a.out + jnp.where(exists, b.out, 0), a.log_z)

  monkeypatch.setattr(blockwise, "forward", forward)
  monkeypatch.setattr(blockwise, "merge", merge)
  x, T = jnp.ones((1, 64, 1, 1)), 64
  spec = Spec(scale=1.0, causal=True, window=window)
  with jax.set_mesh(mesh_of(n)):
    run = jax.jit(functools.partial(context_parallel.attention, "batched", spec=spec))
    out = run(x, x, x, jnp.ones((1, T), jnp.int32))
  size = T // (2 * n)
  positions = token_order.chunks(n, True)[..., None] * size + np.arange(size)
  return np.asarray(out).reshape(n, -1), positions.reshape(n, -1)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 5, 24])
def test_every_device_computes_equally_many_pairs(n, window, monkeypatch):
  got, positions = counted(monkeypatch, n, window)
  np.testing.assert_array_equal(got, np.minimum(positions + 1, window or 64), "each key once")
  block = (64 // (2 * n)) ** 2
  # The first queries of a row see fewer keys than the window. Longer windows spread this over
  # several devices.
  assert np.ptp(got.sum(1)) <= (0 if window is None else max(block, window**2 / 2))


def test_saved_attention_is_not_computed_again():
  q, _, _, segments = inputs(32, N=2)
  spec = Spec(scale=0.3, causal=True)

  def exponentials(remat):
    def layer(x, _):
      qkv = self_attention.mark((x * 2, x * 3, x * 4), sharding.DEFAULT)
      return attention.attend("batched", *qkv, None, segments, spec), None

    layer = jax.checkpoint(layer, policy=remat_lib.policy(remat))
    run = lambda x: jax.lax.scan(layer, x, None, length=2)[0].sum()
    return jax.jit(jax.grad(run)).lower(q).compile().as_text().count(" exponential(")

  with jax.set_mesh(mesh_of(2)):
    assert exponentials("save_attention") < exponentials("save_qkv")


def test_no_array_over_all_pairs_of_positions():
  T = 96
  q, k, v, segments = inputs(T)
  spec = Spec(scale=0.3, causal=True)

  def loss(q, k, v):
    return attention.attend("batched", q, k, v, None, segments, spec).sum()

  with jax.set_mesh(mesh_of(4)):
    assert not attention.needs_mask("batched", T) and attention.needs_mask("batched", T + 1)
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).as_text()
  assert f"x{T}x" in text and f"{T}x{T}x" not in text
