"""Adapters on a base of codes (QLoRA): the base is the quantized run's, and stays so to the bit."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt import tree
from jaxgpt.analysis.compression import compressed_run, quantize
from jaxgpt.commands.actions import import_export
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.model import transformer
from jaxgpt.model.quantization import quantized_base
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run.compression import quantized_weights
from jaxgpt.training.loop import steps
from tests.trained import train

LORA = dict(rank=3, alpha=6.0, targets=("q", "v", "o", "down"), base="int4", base_group=16)


@pytest.fixture(scope="module")
def int4(trained, tmp_path_factory):
  folder = tmp_path_factory.mktemp("base") / "int4"
  compressed_run.quantized(trained, folder, quantize.Settings("nearest", 4, 16))
  return folder


def config_of(tiny, source, **lora):
  c = tiny(train__steps=4, init_from=str(source), checkpoint__every=1)
  c.model.lora.update(LORA | lora)
  return c


@pytest.fixture(scope="module")
def adapted(tiny, int4):
  folder = int4.with_name("adapted")
  return folder, train(config_of(tiny, int4), folder)


def base_of(folder):
  """The frozen parameters of a run as they are in its folder."""
  run = load.load(folder)
  return tree.flatten(checkpoints_lib.load_frozen(folder, run.parts.state)["frozen"])


@pytest.mark.parametrize(("bits", "num_in", "groups"), [(4, 1, 1), (4, 1, 3), (4, 2, 6), (8, 2, 3)])
def test_weights_are_codes_times_scales(bits, num_in, groups):
  rng = np.random.default_rng(bits)
  shape = (12, 5) if num_in == 1 else (3, 8, 5)
  inputs = int(np.prod(shape[:num_in]))
  codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
  scales = rng.random((groups, 5)).astype("float32")
  stored = codes.astype(np.int8)
  if bits == 4:
    flat = codes.reshape(inputs, 5)
    pairs = (flat[::2] & 15) | ((flat[1::2] & 15) << 4)
    stored = pairs.astype(np.uint8).reshape(*shape[: num_in - 1], shape[num_in - 1] // 2, 5)
  found = quantized_base.weight(jnp.asarray(stored), jnp.asarray(scales), num_in)
  expected = codes.reshape(groups, -1, 5).astype("float32") * scales[:, None]
  np.testing.assert_array_equal(found, expected.reshape(shape))


@pytest.mark.slow
def test_only_adapters_train_and_the_base_stays_to_the_bit(int4, adapted, trained):
  folder, said = adapted
  base, run = base_of(folder), load.load(folder)
  stored = {
    path.replace("/codes", "_codes").replace("/scales", "_scales"): x
    for path, x in tree.flatten(
      checkpoints_lib.Checkpoints(int4 / "checkpoints", read_only=True).restore(
        {"params": stored_like(int4)}
      )[0]["params"]
    ).items()
  }
  assert base["layers/attn/o_codes"].dtype == np.uint8
  for path, x in base.items():
    np.testing.assert_array_equal(np.asarray(x), np.asarray(stored[path]).reshape(x.shape), path)
  assert base.keys() == stored.keys()
  adapters = tree.flatten(run.parts.state["params"])
  assert {path.rpartition("/")[2] for path in adapters} == {
    f"{name}_lora_{x}" for name in ("q", "v", "o", "down") for x in "ab"
  }
  params = tree.flatten(run.params)
  assert all(np.abs(params[path]).max() > 0 for path in adapters)
  # Half a byte for each weight and float32 for each scale and each parameter outside of matrices.
  weights = {p: x.size for p, x in tree.flatten(load.load(trained).params).items()}
  matrices = [p for p in weights if p + "_codes" in base]
  size = sum(weights[p] // 2 + weights[p] // 16 * 4 for p in matrices)
  size += sum(4 * n for p, n in weights.items() if p not in matrices)
  assert size == sum(x.nbytes for x in base.values())
  assert f"the frozen ones take {size:,} bytes (int4 in the layers)" in said
  count = sum(weights.values()) + sum(x.size for x in adapters.values())
  assert f" of {count:,} parameters" in said


def stored_like(folder):
  run = load.load(folder)
  return quantized_weights.stored_like(quantized_weights.of_run(folder), run.parts.state["params"])


@pytest.mark.slow
def test_adapters_get_the_gradients_that_they_get_on_dequantized_weights(adapted, int4):
  run = load.load(adapted[0])
  cfg = run.parts.model.cfg
  plain = ml_collections.FrozenConfigDict(
    cfg.to_dict() | {"lora": cfg.lora.to_dict() | {"base": "float32"}}
  )
  tokens = jnp.arange(48).reshape(2, 24)
  positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
  params = jax.device_get(run.params)
  found = []
  for model, all_weights in (
    (transformer.Transformer(cfg), params),
    (transformer.Transformer(plain), jax.device_get(quantized_base.numbers(params))),
  ):
    names = [path for path in tree.flatten(all_weights) if "_lora_" in path]
    adapters, frozen = tree.split(all_weights, names)
    loss = lambda adapters, frozen=frozen, model=model: jnp.square(
      model.apply({"params": tree.merge(adapters, frozen)}, tokens, positions).logits
    ).mean()
    found.append(jax.jit(jax.value_and_grad(loss))(adapters))
  assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-6)
  for path, ours in tree.flatten(found[0][1]).items():
    theirs = tree.flatten(found[1][1])[path]
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), err_msg=path)


@pytest.mark.slow
def test_training_lowers_the_loss(adapted, int4):
  after, before = (load.evaluate_run(load.load(f))["loss"] for f in (adapted[0], int4))
  assert after < before


@pytest.mark.slow
def test_an_interrupted_run_resumes_exactly(tiny, int4, adapted, tmp_path):
  real = steps.Run._read_metrics

  def stop_after_two(self):
    if self._step == 2:
      self._stop.received = 15
    return real(self)

  c = config_of(tiny, int4)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(steps.Run, "_read_metrics", stop_after_two)
    train(c, tmp_path / "run")
  assert load.load(tmp_path / "run").step == 2
  train(c, tmp_path / "run")
  jax.tree.map(
    np.testing.assert_array_equal,
    load.load(tmp_path / "run").params,
    load.load(adapted[0]).params,
  )


@pytest.mark.slow
def test_merging_and_export_are_in_float32(adapted, tmp_path):
  folder, _ = adapted
  run = load.load(folder)
  merged = compressed_run.opened(folder)
  assert not any(quantized_base.is_code(p) for p in tree.flatten(merged.params))
  tokens = jnp.arange(24).reshape(2, 12)
  positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
  logits = [
    r.parts.model.apply({"params": r.params}, tokens, positions).logits for r in (run, merged)
  ]
  np.testing.assert_allclose(*logits, atol=1e-5)
  import_export.export_run(folder, tmp_path / "hf", certify=False)
  with pytest.raises(UserError, match="has no quantized weights"):
    import_export.export_run(folder, tmp_path / "codes", packed=True)


@pytest.mark.slow
def test_a_run_of_numbers_can_start_from_it(tiny, adapted, tmp_path):
  c = tiny(train__steps=2, init_from=str(adapted[0]))
  train(c, tmp_path / "run")
  c.model.lora.update(dict(LORA, base="float32", base_group=0))
  c.optim.lr = 0.0
  train(c, tmp_path / "adapters")
  ours, theirs = (
    load.load(f).params["layers"]["attn"] for f in (tmp_path / "adapters", adapted[0])
  )
  weight = jax.vmap(lambda codes, scales: quantized_base.weight(codes, scales, 1))
  np.testing.assert_array_equal(ours["k"], weight(theirs["k_codes"], theirs["k_scales"]))


def test_a_base_without_these_codes_is_refused(tiny, trained, int4, tmp_path):
  start = lambda source, **lora: train(
    config_of(tiny, source, **lora), tmp_path / f"run{lora}{source.name}"
  )
  with pytest.raises(UserError, match="has no codes of layers/attn/k, which model.lora.base needs"):
    start(trained)
  with pytest.raises(UserError, match="set model.lora.base='int4' and model.lora.base_group=16"):
    start(int4, base_group=8)
  with pytest.raises(UserError, match="set model.lora.base='int4' and model.lora.base_group=16"):
    start(int4, base="int8")
  with pytest.raises(UserError, match="model.lora.base_group=12: q has 32 inputs"):
    start(int4, base_group=12)


def test_the_backward_pass_keeps_no_weights(tiny):
  """Gradients save codes and inputs of a matmul, and not the float32 weight."""
  codes, scales = jnp.zeros((64, 128), jnp.int8), jnp.ones((1, 128))
  times = lambda x: jax.checkpoint(lambda x, c, s: x @ quantized_base.weight(c, s, 1))(
    x, codes, scales
  ).sum()
  saved = jax.tree.leaves(jax.vjp(times, jnp.ones((2, 64)))[1])
  assert not any(x.shape == (64, 128) and x.dtype == jnp.float32 for x in saved)
