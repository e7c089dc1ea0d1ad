"""Only adapters are trained and checkpointed, and merging them keeps the function."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt import config, tree
from jaxgpt.inference import load
from jaxgpt.model import lora, transformer
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.training import loop, train_step
from jaxgpt.training.loop import steps

LORA = dict(rank=3, alpha=6.0, targets=("q", "v", "o", "down"))


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
  """A trained run whose weights get adapters."""
  folder = tmp_path_factory.mktemp("lora") / "base"
  loop.train(tiny(train__steps=2), folder, {})
  return folder


@pytest.fixture(scope="module")
def adapted(base, tiny):
  folder = base.with_name("adapted")
  c = tiny(train__steps=4, init_from=str(base), optim__ema=0.5)
  c.model.lora.update(LORA)
  loop.train(c, folder, {})
  return folder


def is_adapter(path):
  return lora.is_adapter(path)


def test_only_adapters_are_trained_and_have_optimizer_state(adapted):
  run = load.load(adapted)
  state = run.parts.state
  names = set(tree.flatten(state["params"]))
  assert names == {
    f"layers/{path}_lora_{x}" for path in ("attn/q", "attn/v", "attn/o", "mlp/down") for x in "ab"
  }
  moments = [path for path, leaf in tree.flatten(state["opt"]).items() if leaf.ndim]
  assert moments and all(is_adapter(path) for path in moments)
  assert not any(is_adapter(path) for path in tree.flatten(state["frozen"]))


def test_frozen_weights_stay_and_adapters_change(base, adapted):
  before, after = (tree.flatten(load.load(folder).params) for folder in (base, adapted))
  for path, value in after.items():
    if not is_adapter(path):
      np.testing.assert_array_equal(value, before[path], err_msg=path)
    elif path.endswith("_lora_b"):
      assert np.abs(value).max() > 0, path


def test_a_checkpoint_holds_only_adapters(adapted):
  checkpoints = checkpoints_lib.Checkpoints(adapted / "checkpoints", read_only=True)
  assert all(map(is_adapter, checkpoints.shapes("params")))
  assert len(checkpoints_lib.frozen_shapes(adapted)) == 11


@pytest.mark.slow
def test_an_interrupted_run_of_adapters_resumes_exactly(base, tiny, adapted):
  c = tiny(train__steps=4, init_from=str(base), optim__ema=0.5, checkpoint__every=1)
  c.model.lora.update(LORA)
  folder = base.with_name("again")
  real, calls = steps.Run._read_metrics, []

  def stop_after_two(self):
    calls.append(1)
    if self._step == 2:
      self._stop.received = 15
    return real(self)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(steps.Run, "_read_metrics", stop_after_two)
    assert loop.train(c, folder, {})[0] < 4
  assert loop.train(c, folder, {})[0] == 4
  jax.tree.map(np.testing.assert_array_equal, load.load(folder).params, load.load(adapted).params)


def test_merged_weights_compute_the_same_function(adapted):
  run = load.load(adapted)
  merged = lora.merge(run.params, run.c.model.lora)
  assert not any(map(is_adapter, tree.flatten(merged)))
  plain = ml_collections.ConfigDict(run.c.model)
  plain.lora.rank = 0
  model = transformer.Transformer(ml_collections.FrozenConfigDict(plain))
  tokens = jnp.arange(24).reshape(2, 12)
  positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
  want = run.parts.model.apply({"params": run.params}, tokens, positions).logits
  got = model.apply({"params": merged}, tokens, positions).logits
  np.testing.assert_allclose(got, want, atol=1e-5)
  base_only = {k: v for k, v in tree.flatten(run.params).items() if not is_adapter(k)}
  apart = model.apply({"params": tree.unflatten(base_only)}, tokens, positions).logits
  assert np.abs(apart - want).max() > 1e-4  # the adapters do something


def test_an_adapted_run_can_be_initialized_from(adapted, tiny):
  c = tiny(train__steps=2, init_from=str(adapted))
  c.model.lora.update(LORA)
  folder = adapted.with_name("third")
  loop.train(c, folder, {})
  third, second = (tree.flatten(load.load(f).params) for f in (folder, adapted))
  np.testing.assert_array_equal(third["embed"], second["embed"])


@pytest.mark.slow
def test_dropout_of_adapters_follows_the_key():
  c = config.base()
  c.model.update(
    dict(vocab_size=40, num_layers=2, width=16, num_heads=2, lora=dict(LORA, dropout=0.5))
  )
  model = transformer.Transformer(ml_collections.FrozenConfigDict(config.resolve(c).model))
  params = jax.jit(lambda: transformer.init(model, jax.random.key(0)))()
  params = tree.map_named(lambda path, x: x + 1.0 if path.endswith("_lora_b") else x, params)
  tokens = jnp.arange(8)[None]
  run = lambda key: model.apply({"params": params}, tokens, tokens, dropout_key=key).logits
  np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
  assert np.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max() > 1e-3
  np.testing.assert_array_equal(run(None), run(None))


@pytest.mark.slow
def test_frozen_parameters_without_adapters(tiny, tmp_path):
  loop.train(tiny(train__steps=2, optim__frozen=("embed", "layers/mlp/*")), tmp_path / "r", {})
  run = load.load(tmp_path / "r")
  first = train_step.first_state(run.parts.model, run.parts.tx, 0, run.parts.state)
  np.testing.assert_array_equal(run.params["embed"], first["frozen"]["embed"])
  assert (
    np.abs(run.params["layers"]["attn"]["q"] - first["params"]["layers"]["attn"]["q"]).max() > 0
  )
