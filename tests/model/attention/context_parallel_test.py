"""Rows that are cut over devices: attention as if they were not, and as much work for each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.model import layers, ops
from jaxgpt.model import remat as remat_lib
from jaxgpt.model.attention import attention, blockwise, context_parallel, ring
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding


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


def agree(mesh, T, form, atol=1e-5, interpret=False, **fields):
  q, k, v, segments = inputs(T)
  fields = dict(scale=0.3, softcap=None) | fields
  mask = ops.visible(segments, causal=fields["causal"], window=fields["window"])
  plain = {name: fields[name] for name in ("scale", "softcap")}
  want = with_gradients(lambda *x: attention.reference(*x, mask, **plain), segments, q, k, v)
  same = lambda x: x
  to, back = (
    (context_parallel.balance, context_parallel.restore) if fields["causal"] else (same, same)
  )

  def cut(*qkv):
    return back(
      attention.in_parts(form, *map(to, qkv), to(segments), interpret=interpret, **fields)
    )

  with jax.set_mesh(mesh):
    got = with_gradients(cut, segments, q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


@pytest.mark.parametrize(
  "seq, fields",
  [
    (2, dict(causal=True, window=None)),
    (4, dict(causal=True, window=None, softcap=2.0)),
    (8, dict(causal=True, window=None)),
    (4, dict(causal=True, window=5)),  # less than a chunk
    (4, dict(causal=True, window=21)),  # three chunks
    (4, dict(causal=False, window=None)),
    (2, dict(causal=False, window=20)),
  ],
)
def test_rows_that_are_cut_attend_as_whole_ones(seq, fields):
  agree(mesh_of(seq), 64, "batched", **fields)


def test_rows_and_heads_are_cut_too():
  agree(mesh_of(2, data=2, tensor=2), 32, "batched", causal=True, window=9)


@pytest.mark.parametrize("seq, axes, window", [(4, {}, None), (2, dict(data=2), 9)])
def test_some_heads_after_the_others(seq, axes, window, monkeypatch):
  monkeypatch.setattr(ring, "_HEADS_BYTES", 1)  # as many turns as there are key heads
  agree(mesh_of(seq, **axes), 64, "batched", causal=True, window=window)


def test_heads_take_their_turn_where_there_is_much_of_them():
  def turns(T, N, K):
    q, k = (jax.ShapeDtypeStruct((1, heads, T, 128), jnp.bfloat16) for heads in (N, K))
    counted = jax.make_jaxpr(lambda q, k: ring._by_heads(lambda q, k: (q, k), q, k))(q, k)
    loops = [e.params["length"] for e in counted.eqns if e.primitive.name == "scan"]
    return loops or [1]

  assert turns(16_384, 32, 8) == turns(4096, 32, 8) == [8]
  assert turns(1024, 32, 8) == [2]
  assert turns(512, 32, 8) == turns(16_384, 8, 1) == [1]


@pytest.mark.parametrize(
  "fields",
  [
    dict(causal=True, window=None),
    dict(causal=True, window=40, softcap=2.0),
    pytest.param(dict(causal=False, window=200), marks=pytest.mark.slow),
  ],
)
def test_the_kernel_for_tpus_in_parts(fields):
  agree(mesh_of(2), 512, "splash", atol=2e-5, interpret=True, **fields)


@pytest.mark.slow
def test_the_kernel_for_tpus_goes_around():
  agree(mesh_of(4), 1024, "splash", atol=2e-5, interpret=True, causal=True, window=None)


@pytest.mark.parametrize("fields", [dict(causal=True, window=None), dict(causal=False, window=9)])
def test_what_gpus_read_of_gathered_keys(fields, monkeypatch):
  monkeypatch.setattr(attention, "cudnn", attention.reference)  # which no CPU has
  agree(mesh_of(4), 64, "cudnn", **fields)


def test_order_and_back():
  x = jnp.arange(2 * 32 * 3).reshape(2, 32, 3)
  with jax.set_mesh(mesh_of(4)):
    balanced = jax.jit(context_parallel.balance)(x)
    np.testing.assert_array_equal(jax.jit(context_parallel.restore)(balanced), x)
  first = balanced.addressable_shards[0].data[0, :, 0]
  np.testing.assert_array_equal(first // 3, [0, 1, 2, 3, 28, 29, 30, 31])
  assert context_parallel.balance(x) is x, "no mesh"
  with jax.set_mesh(mesh_of(4)):
    assert context_parallel.balance(x[:, :30]) is not None and context_parallel.parts(30) == 1


def counted(monkeypatch, n, window=None, order=context_parallel.chunks):
  """How many keys the ring lets each query of a row read: [device, its queries], and their places."""

  def forward(kernel, band, q, k, v, q_ids, k_ids):
    there = band.array(q.shape[2], k.shape[2]) & (k_ids[..., None, :] > 0)
    count = there.sum(-1).astype(jnp.float32)  # [B, 1, T]
    return jnp.broadcast_to(count[..., None], q.shape), jnp.zeros(q.shape[:3])

  def join(part, other):
    (a, log_a), (b, log_b) = part, other
    return a + jnp.where(log_b[..., None] > blockwise.NOTHING / 2, b, 0), log_a

  monkeypatch.setattr(blockwise, "forward", forward)
  monkeypatch.setattr(blockwise, "join", join)
  monkeypatch.setattr(context_parallel, "chunks", order)
  x, T = jnp.ones((1, 64, 1, 1)), 64
  with jax.set_mesh(mesh_of(n)):
    out = jax.jit(
      functools.partial(
        attention.in_parts, "batched", scale=1.0, softcap=None, causal=True, window=window
      )
    )(x, x, x, jnp.ones((1, T), jnp.int32))
  places = order(n, True)[..., None] * (T // (2 * n)) + np.arange(T // (2 * n))
  return np.asarray(out).reshape(n, -1), places.reshape(n, -1)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 5, 24])
def test_every_device_has_as_many_pairs_to_compute(n, window, monkeypatch):
  got, places = counted(monkeypatch, n, window)
  np.testing.assert_array_equal(got, np.minimum(places + 1, window or 64), "each key read once")
  block = (64 // (2 * n)) ** 2
  # The first queries of a row have no full window, which longer windows spread over some devices.
  assert np.ptp(got.sum(1)) <= (0 if window is None else max(block, window**2 / 2))


def test_in_the_rows_own_order_the_last_device_has_most():
  n, T = 4, 64
  places = np.arange(T).reshape(n, -1)
  assert np.ptp((places + 1).sum(1)) > 10 * (T // (2 * n)) ** 2


def test_attention_that_is_saved_does_not_go_around_again():
  q, _, _, segments = inputs(32, N=2)

  def exponentials(remat):
    def layer(x, _):
      qkv = layers.named(sharding.DEFAULT, x * 2, x * 3, x * 4)
      return attention.attend("batched", *qkv, None, segments, scale=0.3, causal=True), None

    layer = jax.checkpoint(layer, policy=remat_lib.policy(remat))
    run = lambda x: jax.lax.scan(layer, x, None, length=2)[0].sum()
    return jax.jit(jax.grad(run)).lower(q).compile().as_text().count(" exponential(")

  with jax.set_mesh(mesh_of(2)):
    assert exponentials("save_attention") < exponentials("save_qkv")


def test_no_array_of_all_pairs_of_positions():
  T = 96
  q, k, v, segments = inputs(T)

  def loss(q, k, v):
    return attention.attend("batched", q, k, v, None, segments, scale=0.3, causal=True).sum()

  with jax.set_mesh(mesh_of(4)):
    assert not attention.needs_mask("batched", T) and attention.needs_mask("batched", T + 1)
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).as_text()
  assert f"x{T}x" in text and f"{T}x{T}x" not in text
