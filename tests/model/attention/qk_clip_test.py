"""QK-clip against its definition: largest logits, factors on the weights, and training steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config, tree
from jaxgpt.errors import UserError
from jaxgpt.model.attention import masks, qk_clip
from jaxgpt.model.attention.spec import Spec
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build, train_step
from tests import quick

LIMIT = 0.05


def by_definition(q, k, segments, spec):
  """The largest scaled logit of each head over all pairs that may attend."""
  mask = masks.visible(segments, causal=spec.causal, window=spec.window)
  mask &= segments[:, :, None] > 0  # a query in padding attends to nothing
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  logits = jnp.einsum("bthd,bshd->bhts", q, k) * spec.scale
  return jnp.where(mask[:, None], logits, -jnp.inf).max((0, 2, 3))


@pytest.mark.parametrize("causal, window", [(True, None), (True, 40), (False, None), (False, 40)])
def test_the_largest_logits_are_those_of_visible_pairs(causal, window):
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 300, 4, 8)), rng.normal(size=(2, 300, 2, 8))
  segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], 75, axis=1)
  # The largest products lie where no token may look: in other documents, later tokens, padding.
  q[0, 10], k[0, 80], k[0, 299], q[1, 20], k[1, 21 + 45] = 9, 9, 9, 9, 9
  spec = Spec(scale=0.3, causal=causal, window=window)
  got = qk_clip.largest_logits(
    *(jnp.asarray(x, jnp.float32) for x in (q, k)), jnp.asarray(segments), spec
  )
  np.testing.assert_allclose(got, by_definition(q, k, jnp.asarray(segments), spec), rtol=1e-5)


def test_a_batch_of_padding_has_none():
  q = jnp.ones((1, 4, 2, 8))
  got = qk_clip.largest_logits(q, q, jnp.zeros((1, 4), jnp.int32), Spec(scale=1.0))
  assert (np.asarray(got) == np.float32(masks.MASKED)).all()


MODELS = {
  "heads of their own": dict(num_kv_heads=4, qkv_bias=True, bias=True),
  "grouped": dict(num_kv_heads=2, scan_unroll=2),
  "latent": dict(
    num_kv_heads=4,
    head_dim=12,
    latent=dict(kv_rank=8, q_rank=0, rope_dim=4, v_dim=8),
  ),
  "local": dict(num_kv_heads=2, attention_pattern=("local", "global"), window=8, num_layers=3),
}


def resolved(tiny, fields, **overrides):
  c = tiny(**({"model__init_std": 0.5, "optim__qk_clip": LIMIT} | overrides))
  c.model.update(fields)
  return batches_lib.load_tokenizer_and_config(c)[1]


def mesh_of(c):
  sizes = [c.mesh[axis] for axis in config.MESH_AXES if c.mesh[axis] > 0]
  return mesh_lib.make(c.mesh, jax.devices()[: int(np.prod(sizes))])


def one_step(c):
  """(parameters before, parameters after, metrics, batch) of a step."""
  mesh = mesh_of(c)
  parts = build.build(c, mesh)
  batch = batches_lib.split_batches(c, "train").batch(0)
  step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  compiled = train_step.compile(step, parts.state, shapes, mesh)
  with jax.set_mesh(mesh):
    state = train_step.first_state(parts.model, parts.tx, c.seed, parts.state)
  before = jax.tree.map(np.array, state["params"])
  after, metrics = compiled(state, batches_lib.to_devices(batch, mesh))
  return before, jax.tree.map(np.array, after["params"]), jax.device_get(metrics), batch


@pytest.mark.parametrize("name", quick.first(MODELS, 2))
def test_weights_are_scaled_by_the_definition(tiny, name):
  """A step with clipping is the step without, times the factors of the logits before it."""
  c = resolved(tiny, MODELS[name])
  _, without, _, _ = one_step(resolved(tiny, MODELS[name], optim__qk_clip=0.0))
  before, after, metrics, batch = one_step(c)
  logits = logits_of(c, before, batch)
  m, clipped, changed = c.model, 0, set()
  got, plain = tree.flatten(after), tree.flatten(without)
  for layer, largest_LN in logits.items():
    g = np.minimum(1, LIMIT / largest_LN)
    clipped += (g < 1).sum()
    for of in ("q", "k", "q_bias", "k_bias"):
      path = f"{layer}/{of}"
      if path not in got:
        continue
      want = np.array(plain[path])  # [L, (in,) heads, size]
      for i, n in np.ndindex(g.shape):
        at = want[i, :, n] if not of.endswith("bias") else want[i, n][None]
        if m.latent.kv_rank:
          part = m.head_dim - m.latent.rope_dim
          at[..., :part] *= np.sqrt(g[i, n])
          at[..., part:] *= g[i, n]
        elif m.num_kv_heads == m.num_heads:
          at *= np.sqrt(g[i, n])
        elif of.startswith("q"):
          at *= g[i, n]
        else:
          break
      np.testing.assert_allclose(got[path], want, rtol=2e-5, atol=1e-7, err_msg=path)
      changed |= {path} if np.any(want != plain[path]) else set()
  assert changed and clipped > 0 and metrics["clipped_heads"] == clipped
  largest = max(x.max() for x in logits.values())
  np.testing.assert_allclose(metrics["largest_logit"], largest, rtol=1e-5)
  others = got.keys() - {
    f"{layer}/{of}" for layer in logits for of in ("q", "k", "q_bias", "k_bias")
  }
  assert others
  for path in others:
    np.testing.assert_array_equal(got[path], plain[path], err_msg=path)
  # With the old weights times the factors, the first layer, whose inputs stay, is at the limit.
  scaled = logits_of(c, qk_clip.clip(before, logits, build_model(c).cfg, LIMIT), batch)
  first = next(path for path in sorted(scaled) if path.startswith("layers/"))
  np.testing.assert_allclose(scaled[first][0], LIMIT, rtol=1e-4)


def build_model(c):
  return build.build(c, mesh_of(c)).model


def logits_of(c, params, batch):
  """{path of a layer: largest logits [L, N]}, from the queries and keys of a forward pass."""
  model = build_model(c)

  def keep(run, args, kwargs, context):
    if context.method_name == "mix":
      q, k, _, _, segments, spec = args
      context.module.sow(qk_clip.LARGEST, "found", by_definition(q, k, segments, spec))
    return run(*args, **kwargs)

  inputs = [jnp.asarray(batch[key]) for key in ("tokens", "positions", "segment_ids")]
  with nn.intercept_methods(keep):
    _, sown = model.apply({"params": params}, *inputs, balanced=True, mutable=[qk_clip.LARGEST])
  flat = tree.flatten(sown[qk_clip.LARGEST])
  out = {p.rsplit("/", 2)[0]: np.asarray(x) for p, x in flat.items() if p.endswith("found/0")}
  assert sum(len(x) for x in out.values()) == model.cfg.num_layers
  return out


def test_neither_microbatches_nor_the_mesh_change_it(tiny):
  want = one_step(resolved(tiny, MODELS["grouped"]))
  for keys in ({"optim__accumulate": 4}, {"mesh__fsdp": 2, "mesh__tensor": 2}):
    got = one_step(resolved(tiny, MODELS["grouped"], **keys))
    assert got[2]["clipped_heads"] == want[2]["clipped_heads"] > 0
    np.testing.assert_allclose(got[2]["largest_logit"], want[2]["largest_logit"], rtol=1e-5)
    for path, x in tree.flatten(want[1]).items():
      np.testing.assert_allclose(tree.flatten(got[1])[path], x, atol=2e-4, err_msg=path)


def test_microbatches_keep_the_largest_of_negative_logits():
  def objective(params, frozen, batch, key):
    del frozen, key
    largest = {"layers/attn": batch["x"].max(keepdims=True)}
    return (params * batch["x"]).sum(), jnp.float32(len(batch["x"])), {qk_clip.LARGEST: largest}

  batch = {"x": jnp.array([-3.0, -2.0, -5.0, -4.0])}
  f = train_step.accumulated(objective, 4)
  (loss, weight, aux), gradient = f(jnp.ones(()), None, batch, jax.random.key(0))
  assert aux[qk_clip.LARGEST]["layers/attn"] == -2
  assert (loss, weight, gradient) == (-14, 4, -14)


def test_a_limit_that_no_head_reaches_changes_no_bit(tiny):
  free, held = (one_step(resolved(tiny, {}, optim__qk_clip=limit)) for limit in (0.0, 1e6))
  jax.tree.map(np.testing.assert_array_equal, free[1], held[1])
  assert held[2]["clipped_heads"] == 0 < held[2]["largest_logit"]
  assert held[2].keys() - free[2].keys() == {"largest_logit", "clipped_heads"}


@pytest.mark.parametrize(
  "keys, words",
  [
    (dict(model__qk_norm="head"), "model.qk_norm='head' undoes the scale"),
    (dict(model__attn_softcap=30.0), "model.attn_softcap=30.0 bounds the logits"),
    (
      dict(model__lora__rank=2, init_from="x"),
      "model.lora.rank=2 leaves queries'",
    ),
    (dict(mesh__seq=2), "does not work with mesh.seq=2"),
    (dict(mesh__stage=2), "does not work with mesh.stage=2"),
    (dict(optim__frozen=("layers/attn/k",)), "keep layers/attn/k as it is"),
    (
      dict(objective__name="distillation"),
      "is for causal_lm and masked_lm, not for objective.name='dist",
    ),
  ],
)
def test_what_it_can_not_work_with_is_refused(tiny, keys, words):
  with pytest.raises(UserError, match=words):
    c = resolved(tiny, {}, **keys)
    build.build(c, mesh_of(c))
