"""Attention over a paged cache next to its definition, with entries in float32 and in int8."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxgpt import config
from jaxgpt.model.attention import paged
from jaxgpt.model.attention.kernels import paged as paged_kernel
from jaxgpt.model.attention.spec import Spec
from jaxgpt.model.kv_cache import Pool
from jaxgpt.parallel import mesh as mesh_lib

B, T, N, K, H, S, J = 2, 3, 4, 2, 8, 4, 4
LENGTHS = np.array([15, 13])  # of each row; a step has the last T tokens
TABLES = np.array([[5, 2, 7, 4], [1, 6, 3, 8]], np.int32)
# (row, block of its table) of each chunk. -1: none.
CHUNKS = ((0, 0), (0, 1), (1, 0)), ((1, 1), (0, 2), (1, 2)), ((1, 3), (-1, 0), (0, 3))
SPEC = Spec(scale=0.3, softcap=5.0, window=7)


def by_definition(q_TNH, k_SKH, v_SKH, first):
  """Attention of consecutive queries from a position on, in NumPy."""
  out = np.zeros((*q_TNH.shape[:2], v_SKH.shape[-1]))
  for t, n in np.ndindex(q_TNH.shape[:2]):
    at = slice(max(0, first + t - SPEC.window + 1), first + t + 1)
    logits = k_SKH[at, n * K // N] @ q_TNH[t, n] * SPEC.scale
    weights = np.exp(SPEC.softcap * np.tanh(logits / SPEC.softcap))
    out[t, n] = weights / weights.sum() @ v_SKH[at, n * K // N]
  return out


def rounded(x):
  """What a cache in int8 holds of vectors."""
  scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
  return np.round(x / scale) * scale


def step_of(at_BT):
  """A call for tokens at some positions. Each row reads all its blocks."""
  pad = lambda x: np.pad(np.asarray(x, np.int32), (0, 2))
  starts = np.tile(np.arange(J) * S, B)
  table = np.arange(B * J, dtype=np.int32).reshape(B, J)
  pairs = paged.Pairs(
    pad(np.repeat(np.arange(B), J)), pad(TABLES.ravel()), pad(starts), table, np.int32(B * J)
  )
  return paged.Step(
    np.take_along_axis(TABLES, at_BT // S, axis=1), at_BT % S, {"local": pairs}, J * S, 2
  )


@pytest.mark.parametrize("v_size", [None, 5])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_cache_is_attended_to_by_definition(dtype, v_size):
  rng = np.random.default_rng(0)
  k, v = rng.normal(size=(2, B, J * S, K, H)).astype(np.float32)
  q = rng.normal(size=(B, J * S, N, H)).astype(np.float32)
  rows, at_BT = np.arange(B)[:, None], LENGTHS[:, None] - np.arange(T, 0, -1)
  scales = np.zeros((K, 9, S), np.float32) if dtype == "int8" else None

  @jax.jit
  def found(q, k, v):
    pools, chunks = [Pool(np.zeros((K, 9, S, H), dtype), scales)] * 2, []
    pools = jax.tree.map(jnp.asarray, pools)

    def attend(q, call, at):
      values = None if v_size else pools[1]
      return paged.attend(q, pools[0], values, call, "local", at, SPEC, v_size=v_size)

    for parts in CHUNKS:
      b, numbers = np.array(parts).T
      tables = np.where((b >= 0)[:, None], TABLES[b], 0)
      call = jax.tree.map(jnp.asarray, paged.Chunk(tables, numbers, J * S))
      at = (numbers[:, None] * S + np.arange(S)).ravel()
      here = np.repeat(b, S)[None], at[None]
      pools = [paged.write(pool, x[here], call) for pool, x in zip(pools, (k, v))]
      chunks.append(attend(q[here], call, at[None]))
    step = jax.tree.map(jnp.asarray, step_of(at_BT))
    pools = [paged.write(pool, 1 + x[rows, at_BT], step) for pool, x in zip(pools, (k, v))]
    return chunks, attend(q[rows, at_BT], step, at_BT)

  chunks, steps = found(*map(jnp.asarray, (q, k, v)))
  held = rounded if dtype == "int8" else lambda x: x
  values = lambda k, v: held(k)[..., :v_size] if v_size else held(v)
  for parts, chunk in zip(CHUNKS, chunks):
    for (b, number), found_SNH in zip(
      parts, chunk.reshape(-1, S, N, H if v_size is None else v_size)
    ):
      if b >= 0:
        at = slice(number * S, number * S + S)
        want = by_definition(q[b, at], held(k[b]), values(k[b], v[b]), at.start)
        np.testing.assert_allclose(found_SNH, want, atol=2e-6)
  for x in (k, v):
    x[rows, at_BT] += 1
  for b, at in enumerate(at_BT):
    want = by_definition(q[b, at], held(k[b]), values(k[b], v[b]), at[0])
    np.testing.assert_allclose(steps[b], want, atol=2e-6)
  if dtype == "int8":  # the tolerance tells it from the cache that is not rounded
    exact = by_definition(q[b, at], k[b], k[b][..., :v_size] if v_size else v[b], at[0])
    assert 1e-4 < np.abs(steps[b] - exact).max() < 0.05


@pytest.mark.parametrize("sizes", [{}, dict(tensor=2, data=2)], ids=str)
@pytest.mark.parametrize("softcap, N", [(None, 8), (5.0, 16)])
def test_the_kernel_for_tpus_computes_what_the_definition_says(softcap, N, sizes, monkeypatch):
  monkeypatch.setattr(paged_kernel, "_TOKENS", 32)  # two turns for the longest row
  K, H, S, M = 2, 128, 16, 12
  rng = np.random.default_rng(0)
  pools = [Pool(jnp.asarray(rng.normal(size=(K, M, S, H)), "bfloat16")) for _ in "kv"]
  q = jnp.asarray(rng.normal(size=(3, 1, N, H)), "bfloat16")
  at_BT = np.array([[5], [63], [0]], np.int32)  # the last row is idle
  table = np.array([[0, 8, 8, 8], [1, 2, 3, 4], [8, 8, 8, 8]], np.int32)
  blocks = np.array([7, 1, 9, 4, 2, 0, 0, 0], np.int32)
  starts = np.array([0, 0, 16, 32, 48, 0, 0, 0], np.int32)
  pairs = paged.Pairs(np.array([0, 1, 1, 1, 1, 0, 0, 0]), blocks, starts, table, np.int32(5))
  call = jax.tree.map(jnp.asarray, paged.Step(at_BT, at_BT, {"global": pairs}, 64, 2))
  spec = Spec(scale=0.1, softcap=softcap)
  c = config.base()
  c.mesh.update(dict(data=1, fsdp=1) | sizes)
  mesh = mesh_lib.make(c.mesh, jax.devices()[: math.prod(sizes.values())])

  def attend(with_kernel):
    run = lambda *args: paged.attend(*args, spec, with_kernel=with_kernel)
    return np.asarray(jax.jit(run, static_argnums=4)(q, *pools, call, "global", at_BT), "float32")

  with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
    assert paged_kernel.supports(q, *pools, table, spec)
    found, want = attend(True), attend(False)
  np.testing.assert_allclose(found[:2], want[:2], atol=0.02)
  assert np.abs(want[:2]).max() > 0.5 and np.isfinite(found).all()


def test_the_kernel_leaves_other_calls_to_the_definition():
  pool = Pool(jnp.zeros((2, 3, 16, 128), "bfloat16"))
  q = jnp.zeros((3, 1, 4, 128), "bfloat16")
  spec = Spec(scale=1.0)
  table = np.zeros((3, 4), np.int32)
  fits = lambda q=q, k=pool, v=pool, table=table, spec=spec: paged_kernel.supports(
    q, k, v, table, spec
  )
  assert fits()
  assert not fits(spec=spec._replace(window=8)) and not fits(v=None)
  assert not fits(q=jnp.zeros((3, 2, 4, 128), "bfloat16"))
  assert not fits(k=Pool(jnp.zeros((2, 3, 16, 128), "float32")))
  assert not fits(k=Pool(jnp.zeros((2, 3, 8, 128), "bfloat16")))
  assert not fits(table=np.zeros((256, 2048), np.int32))
  assert not fits(k=Pool(pool.entries.astype("int8"), jnp.zeros((2, 3, 16))))
