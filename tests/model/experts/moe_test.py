"""Experts against their definition, capacity, and the router losses."""

import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt.model import ops
from jaxgpt.model.experts import moe, router
from jaxgpt.parallel import sharding
from tests import quick
from tests.model.experts import layer_config

B, T, D = 2, 6, 8


def section(**fields):
  """The `model` section of a layer with four experts and these fields of `model.moe`."""
  return layer_config.section(dict(experts=4) | fields)


def run(cfg, real=None, seed=0):
  """(parameters, input, output, statistics) of a layer with random weights."""
  layer = moe.MoE(cfg, sharding.DEFAULT)
  x = jax.random.normal(jax.random.key(seed), (B, T, D))
  real = jnp.ones((B, T), bool) if real is None else real
  params = jax.tree.map(
    lambda box: box.value,
    layer.init(jax.random.key(1), x, real)["params"],
    is_leaf=lambda x: hasattr(x, "value"),
  )
  if "router_bias" in params:
    params["router_bias"] = jnp.array([1.0, -1.0, 0.5, 0.0])
  y, stats = layer.apply({"params": params}, x, real)
  return params, x, y, stats


def mlp(x, gate, up, down):
  return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def by_definition(cfg, params, x):
  """Every expert on every token, weighted by the router, independent of `router.route`."""
  c = cfg.moe
  logits = x @ params["router"]
  scores = jax.nn.softmax(logits) if c.router == "softmax" else jax.nn.sigmoid(logits)
  out = jnp.zeros_like(x)
  for b, t in np.ndindex(B, T):
    s = np.asarray(scores[b, t])
    order = sorted(
      range(4),
      key=lambda e: (
        -(s + np.asarray(params.get("router_bias", 0.0)))[e] if "router_bias" in params else -s[e]
      ),
    )
    chosen = order[: c.per_token]
    total = sum(s[e] for e in chosen) if c.normalize else 1.0
    for e in chosen:
      y = mlp(x[b, t], *(params[name][e] for name in ("gate", "up", "down")))
      out = out.at[b, t].add(s[e] / total * c.scale * y)
  if c.shared:
    out += mlp(x, *(params["shared"][name] for name in ("gate", "up", "down")))
  return out


@pytest.mark.parametrize(
  "fields",
  [
    dict(),
    dict(per_token=1, normalize=False),
    dict(shared=2),
    dict(router="sigmoid", scale=2.5),
    dict(capacity=4.0),
  ],
)
def test_each_token_gets_its_experts_and_none_is_dropped(fields):
  cfg = section(**fields)
  params, x, y, stats = run(cfg)
  np.testing.assert_allclose(y, by_definition(cfg, params, x), atol=1e-5)
  assert stats["dropped"] == 0
  assert stats["chosen"].sum() == B * T * cfg.moe.per_token


def test_groups_limit_the_choice_of_experts():
  logits = jnp.array([[3.0, -9.0, 2.0, 1.5]])
  pick = lambda **f: sorted(
    router.route(logits, None, section(groups=2, top_groups=1, **f).moe)[1][0]
  )
  assert pick() == [0, 1]  # the group of the best expert
  bias = jnp.zeros(4)
  grouped = section(groups=2, top_groups=1, router="sigmoid").moe
  assert sorted(router.route(logits, bias, grouped)[1][0].tolist()) == [2, 3]  # of the best two


def test_capacity_drops_the_last_tokens_of_a_row_and_counts_them():
  cfg = section(capacity=0.5, per_token=1, normalize=False)  # one slot per expert and row
  params, x, y, stats = run(cfg)
  full = by_definition(cfg, params, x)
  experts = np.asarray((x @ params["router"]).argmax(-1))
  for b in range(B):
    for t in range(T):
      kept = experts[b, t] not in experts[b, :t]
      np.testing.assert_allclose(y[b, t], full[b, t] if kept else 0, atol=1e-5)
  assert stats["dropped"] == sum(T - len(set(row)) for row in experts.tolist()) > 0


def test_padding_takes_no_slot_and_is_not_counted():
  real = jnp.arange(T) < jnp.array([[4], [T]])
  cfg = section(capacity=0.75, per_token=1, normalize=False)
  _, _, y, stats = run(cfg, real)
  assert stats["tokens"] == 4 + T == stats["chosen"].sum()
  np.testing.assert_array_equal(y[0, 4:], 0)


@pytest.mark.parametrize("capacity, padded", quick.first([(0.6, True), (1.0, False), (4.0, True)]))
def test_gradients_with_a_capacity_are_those_of_the_definition(capacity, padded):
  real = jnp.arange(T) < jnp.array([[4], [T]]) if padded else jnp.ones((B, T), bool)
  cfg = section(capacity=capacity)
  params, x, _, stats = run(cfg, real)
  assert (stats["dropped"] > 0) == (capacity < 4)
  slots = min(math.ceil(capacity * T * 2 / 4), T)
  _, experts, _ = router.route(x @ params["router"], None, cfg.moe)
  kept, queue = np.zeros((B, T, 2)), np.zeros((B, 4), int)
  for b, t, i in np.ndindex(B, T, 2):
    e = int(experts[b, t, i])
    kept[b, t, i] = real[b, t] and queue[b, e] < slots
    queue[b, e] += int(real[b, t])

  def definition(params, x):
    weights, experts, _ = router.route(x @ params["router"], None, cfg.moe)
    every = jax.vmap(mlp, (None, 0, 0, 0))(x, params["gate"], params["up"], params["down"])
    hot = jax.nn.one_hot(experts, 4)
    return jnp.einsum("BTX,BTX,BTXE,EBTD->BTD", weights, kept, hot, every)

  layer = moe.MoE(cfg, sharding.DEFAULT)
  g = jax.random.normal(jax.random.key(2), x.shape)
  of = lambda apply: jax.jit(jax.grad(lambda params, x: (apply(params, x) * g).sum(), (0, 1)))
  got = of(lambda params, x: layer.apply({"params": params}, x, real)[0])(params, x)
  want = of(definition)(params, x)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_gradients_reach_the_router_and_every_expert():
  layer = moe.MoE(section(), sharding.DEFAULT)
  params, x, _, _ = run(section())
  loss = lambda p: jnp.square(layer.apply({"params": p}, x, jnp.ones((B, T), bool))[0]).sum()
  grads = jax.grad(loss)(params)
  assert all(
    np.abs(g).max(axis=tuple(range(1, g.ndim))).min() > 0
    for g in jax.tree.leaves(grads)
    if g.ndim == 3
  )
  assert np.abs(grads["router"]).max() > 0


def test_losses_agree_with_hugging_face():
  torch = pytest.importorskip("torch")
  mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
  logits = np.random.default_rng(0).normal(size=(3, B, T, 4)).astype(np.float32) * 2  # 3 layers
  real = np.arange(T) < np.array([[4], [T]])
  want = mixtral.load_balancing_loss_func(
    tuple(torch.tensor(x.reshape(-1, 4)) for x in logits), 4, 2, torch.tensor(real.astype(int))
  )
  total = None
  for x in jnp.asarray(logits):
    _, experts, scores = router.route(x, None, section().moe)
    stats = router.statistics(x, scores, experts, jnp.asarray(real))
    total = stats if total is None else jax.tree.map(jnp.add, total, stats)
  balance, z = router.losses(total)
  np.testing.assert_allclose(balance, want, rtol=1e-5)
  log_z = np.log(np.exp(logits).sum(-1))[:, real]
  np.testing.assert_allclose(z, np.square(log_z).mean(), rtol=1e-5)


def test_activations_without_a_gate():
  c = ml_collections.ConfigDict(section())
  c.gated = False
  params, x, y, _ = run(ml_collections.FrozenConfigDict(c))
  assert "gate" not in params
  one = lambda e: ops.ACTIVATIONS["silu"](x @ params["up"][e]) @ params["down"][e]
  weights, experts, _ = router.route(x @ params["router"], None, c.moe)
  want = sum(jnp.where(experts == e, weights, 0).sum(-1)[..., None] * one(e) for e in range(4))
  np.testing.assert_allclose(y, want, atol=1e-5)
