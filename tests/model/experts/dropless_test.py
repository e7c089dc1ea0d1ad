"""Experts on several devices against their definition: outputs and every gradient.

The ragged all-to-all does not run on CPU. `emulated` does by definition what its documentation
says, so the sizes and offsets that jaxgpt gives it are tested all the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.model.experts import dropless, exchange, moe
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from tests import quick
from tests.model.experts.layer_config import section

B, T, D, E = 8, 4, 8, 8
LIMIT = 1e-5  # of the largest value of an array


def mesh_of(**axes):
  c = config.base().mesh
  c.update(dict(fsdp=1) | axes)
  return mesh_lib.make(c, jax.devices()[: int(np.prod(list(axes.values())))])


def inputs(rows=B, seed=0):
  """(activations, padding, a weight for each output). The last row is padding only."""
  x, g = (jax.random.normal(jax.random.key(seed + i), (rows, T, D)) for i in range(2))
  real = jnp.arange(T) < (jnp.arange(rows)[:, None] * 3 % T + 1)
  return x, real.at[-1].set(rows == 1), g


@functools.cache
def params_of(cfg):
  layer = moe.MoE(cfg, sharding.DEFAULT)
  x, real, _ = inputs()
  boxes = layer.init(jax.random.key(1), x, real)["params"]
  is_box = lambda x: hasattr(x, "value")
  axes = jax.tree.map(lambda box: tuple(box.names), boxes, is_leaf=is_box)
  params = jax.tree.map(lambda box: box.value, boxes, is_leaf=is_box)
  if "router_bias" in params:
    params["router_bias"] = jnp.linspace(-0.2, 0.2, E)
  return params, axes


def by_definition(cfg, params, x, real):
  """Every expert on every token. Those that the token is not routed to count 0 times."""
  c = cfg.moe
  logits = x @ params["router"]
  scores = jax.nn.softmax(logits) if c.router == "softmax" else jax.nn.sigmoid(logits)
  choice = scores + params.get("router_bias", 0.0)
  kept = choice >= jnp.sort(choice, -1)[..., -c.per_token, None]
  weights = jnp.where(kept, scores, 0)
  if c.normalize:
    weights /= weights.sum(-1, keepdims=True)
  up = jnp.einsum("btd,edf->btef", x, params["up"])
  h = jax.nn.silu(up)
  if cfg.gated:
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, params["gate"])) * up
  each = jnp.einsum("btef,efd->bted", h, params["down"])
  y = jnp.einsum("bted,bte->btd", each, weights * c.scale * real[..., None])
  if c.shared:
    s = params["shared"]
    y += (jax.nn.silu(x @ s["gate"]) * (x @ s["up"])) @ s["down"]
  return y


def results(f, params, x, g):
  """(output, {name: gradient}) of a function of parameters and activations."""

  def loss(params, x):
    y = f(params, x)
    return (y * g).sum(), y

  (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
  return y, {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(grads)}


def on_mesh(cfg, mesh, rules=sharding.DEFAULT, rows=B, remat=False):
  """As `results`, of the layer on a mesh, and its statistics."""
  params, axes = params_of(cfg)
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
  params = jax.device_put(params, sharding.params_shardings(axes, shapes, mesh, rules))
  x, real, g = inputs(rows)
  layer = moe.MoE(cfg, rules)
  apply = lambda params, x: layer.apply({"params": params}, x, real)
  if remat:
    apply = jax.checkpoint(apply)
  with jax.set_mesh(mesh):
    out = jax.jit(lambda p, x: results(lambda p, x: apply(p, x)[0], p, x, g))(params, x)
    return *out, jax.jit(lambda p, x: apply(p, x)[1])(params, x)


def assert_equals_definition(cfg, mesh, rules=sharding.DEFAULT, rows=B, remat=False):
  y, grads, stats = on_mesh(cfg, mesh, rules, rows, remat)
  x, real, g = inputs(rows)
  f = lambda params, x: by_definition(cfg, params, x, real)
  want_y, want = results(f, params_of(cfg)[0], x, g)
  assert grads.keys() == want.keys() and len(want) >= 4
  for name, array in {"y": y, **grads}.items():
    expected = want_y if name == "y" else want[name]
    largest = np.abs(expected).max()
    assert (largest > 0.01) != name.endswith("['router_bias']"), f"{name}: up to {largest}"
    error = np.abs(array - expected).max() / max(largest, 0.01)
    assert error < LIMIT, f"{name}: {error:.1e}"
  assert stats["dropped"] == 0
  return stats


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
  """`jax.lax.ragged_all_to_all` as its documentation defines it, on arrays of all devices."""
  me = jax.lax.axis_index(axis_name)
  given = (operand, input_offsets, send_sizes, output_offsets)
  rows, starts, sizes, targets = jax.lax.all_gather(given, axis_name)
  at = jnp.arange(output.shape[0])
  for peer in range(rows.shape[0]):
    place = at - targets[peer, me]
    # The sizes that the receiver names must be those that the sender names.
    arrives = (place >= 0) & (place < sizes[peer, me]) & (place < recv_sizes[peer])
    row = rows[peer].at[starts[peer, me] + place].get(mode="clip")
    output = jnp.where(arrives[:, None], row, output)
  return output


@pytest.fixture
def as_on_tpu(monkeypatch):
  """Makes the exchange take its way for accelerators."""
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
  made = dropless.layout
  monkeypatch.setattr(dropless, "layout", lambda *args: made(*args)._replace(platform="gpu"))


MESHES = [
  dict(expert=2, fsdp=2, data=2),
  dict(expert=4, tensor=2),
  dict(expert=2, seq=2, tensor=2),
  dict(expert=8),
  dict(expert=2, fsdp=4),
  dict(expert=4, data=2),
  dict(expert=4, seq=2),
  dict(fsdp=2, seq=2, tensor=2),
]


@pytest.mark.parametrize("axes", quick.first(MESHES))
def test_devices_that_share_experts_compute_what_the_definition_says(axes):
  stats = assert_equals_definition(section(), mesh_of(**axes))
  assert (stats["sent"] > 0) == ("expert" in axes)


@pytest.mark.parametrize("axes", quick.first(MESHES[:7], 1))
def test_ragged_slices_give_the_same(as_on_tpu, axes):
  assert_equals_definition(section(), mesh_of(**axes))


@pytest.mark.parametrize(
  "fields",
  quick.first(
    [
      dict(moe=dict(shared=2, router="sigmoid", scale=2.5)),
      dict(moe=dict(per_token=1, normalize=False)),
      dict(moe=dict(per_token=5)),  # more than a device has
      dict(gated=False),
    ],
    1,
  ),
)
def test_forms_of_the_layer(fields):
  assert_equals_definition(section(**fields), mesh_of(expert=4, fsdp=2))


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True])
def test_rematerialized(request, ragged):
  if ragged:
    request.getfixturevalue("as_on_tpu")
  assert_equals_definition(section(), mesh_of(expert=4, fsdp=2), remat=True)


# Devices of an axis that does not shard the tokens have the same ones, and share the work on them.
@pytest.mark.parametrize(
  "axes, rules, rows",
  quick.first(
    [
      (dict(expert=4, fsdp=2), {}, 1),  # one row, as when a prompt is read
      (dict(expert=2, fsdp=2, tensor=2), dict(experts="tensor,expert", mlp="none"), B),
      (dict(expert=2, fsdp=2, tensor=2), dict(experts="expert,tensor", mlp="none"), B),
      (dict(expert=2, fsdp=4), dict(experts="fsdp,expert", embed="none"), B),
      (dict(expert=2, seq=4), dict(experts="expert,seq"), B),
      (dict(tensor=8), dict(experts="tensor", mlp="none"), B),
    ],
    2,
  ),
)
def test_other_rules_for_experts(axes, rules, rows):
  c = config.base().mesh
  c.rules.update(rules)
  assert_equals_definition(section(), mesh_of(**axes), sharding.rules(c), rows)


def test_rows_beyond_the_buffer_are_counted_and_give_zero():
  cfg = section(dict(buffer=0.5, per_token=1, normalize=False))
  mesh = mesh_of(expert=4)
  y, _, stats = on_mesh(cfg, mesh)
  x, real, _ = inputs()
  want = by_definition(cfg, params_of(cfg)[0], x, real)
  is_kept = np.abs(y - want).max(-1) < 1e-5
  is_zero = np.abs(y).max(-1) == 0
  assert (is_kept | is_zero).all()
  lost = (is_zero & np.asarray(real)).sum()
  assert 0 < lost == stats["dropped"]
  assert on_mesh(section(dict(buffer=4.0, per_token=1)), mesh)[2]["dropped"] == 0


def test_the_same_rows_are_beyond_the_buffer_of_both_exchanges(as_on_tpu, monkeypatch):
  cfg = section(dict(buffer=0.5))
  y, grads, stats = on_mesh(cfg, mesh_of(expert=4))
  monkeypatch.undo()
  want_y, want, want_stats = on_mesh(cfg, mesh_of(expert=4))
  np.testing.assert_array_equal(y, want_y)
  jax.tree.map(np.testing.assert_array_equal, grads, want)
  assert stats["dropped"] == want_stats["dropped"] > 0


def test_sent_counts_pairs_that_leave_their_device():
  cfg = section(dict(per_token=1))
  x, real, _ = inputs()
  experts = np.asarray((x @ params_of(cfg)[0]["router"]).argmax(-1))
  leaves = experts // (E // 4) != np.arange(B)[:, None] // (B // 4)
  assert on_mesh(cfg, mesh_of(expert=4))[2]["sent"] == (leaves & np.asarray(real)).sum() > 0


@pytest.mark.parametrize(
  "broken",
  [
    "a result that is not summed over the columns",
    "slices that come back one device too early",
    "tokens that are grouped by the wrong device's experts",
  ],
)
def test_a_broken_exchange_would_be_seen(monkeypatch, broken):
  if broken.startswith("a result"):
    monkeypatch.setattr(jax.lax, "psum", lambda x, axes: x)
  elif broken.startswith("slices"):
    move = exchange.move
    wrong = lambda s: s._replace(elsewhere=jnp.roll(s.elsewhere, 1), size=jnp.roll(s.size, 1))
    monkeypatch.setattr(exchange, "move", lambda g, r, a, b, n: move(g, r, wrong(a), b, n))
  else:
    kinds = dropless._kinds
    monkeypatch.setattr(dropless, "_kinds", lambda counts, n: kinds(jnp.roll(counts, 1, 0), n))
  with pytest.raises(AssertionError, match="y: "):
    assert_equals_definition(section(), mesh_of(expert=4, tensor=2))


def test_a_device_gathers_only_its_own_experts():
  """Memory of a compiled layer whose experts are much larger than its tokens."""
  cfg = section(dict(width=4096), width=512)

  def temporaries(n):
    mesh = mesh_of(expert=n, fsdp=8 // n)
    layer = moe.MoE(cfg, sharding.DEFAULT)
    x = jax.ShapeDtypeStruct((B, T, 512), jnp.float32)
    real = jax.ShapeDtypeStruct((B, T), bool)
    boxes = jax.eval_shape(layer.init, jax.random.key(0), x, real)["params"]
    is_box = lambda x: hasattr(x, "value")
    axes = jax.tree.map(lambda box: tuple(box.names), boxes, is_leaf=is_box)
    shapes = jax.tree.map(lambda box: box.value, boxes, is_leaf=is_box)
    placed = sharding.params_shardings(axes, shapes, mesh, sharding.DEFAULT)
    params = jax.tree.map(
      lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, placed
    )
    with jax.set_mesh(mesh):
      apply = jax.jit(lambda params, x, real: layer.apply({"params": params}, x, real)[0])
      return apply.lower(params, x, real).compile().memory_analysis().temp_size_in_bytes

  weights = 3 * E * 512 * 4096 * 4
  for n in (1, 2, 4):
    assert 0.9 * weights / n < temporaries(n) < 1.5 * weights / n, n
