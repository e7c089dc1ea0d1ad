"""Weights and gradients that devices exchange: which of them, over which axes, in which dtype."""

import pytest

from jaxgpt import config
from jaxgpt.plan import lower, per_device, weight_traffic

LLAMA = "configs/llama3_8b.py"
WEIGHTS = 6_738_415_616 - 65 * 4096  # of Llama-2-7B, norms left out


def traffic(preset, *overrides, **axes):
  flags = ["--config.data.batch_size=64", "--config.data.seq_len=2048"]
  flags += [f"--config.{one}" for one in overrides]
  c = lower.resolve(config.load(f"{LLAMA}:{preset}", flags)[0])
  sizes = dict.fromkeys(config.MESH_AXES, 1) | axes
  return weight_traffic.of_step(c, sizes, per_device.count(c))


def test_fsdp_gathers_weights_and_scatters_their_gradients():
  found = traffic("llama2_7b", fsdp=8)
  assert found.gathered == found.scattered == 2 * WEIGHTS
  assert found.summed == 2 * 65 * 4096  # of the norms, which each device has
  assert traffic("llama2_7b", "optim.accumulate=2", fsdp=8) == found.times(2)


def test_a_pipeline_gathers_its_layers_in_each_tick_and_the_others_once():
  others = 2 * 32000 * 4096
  for microbatches in (4, 8):
    found = traffic(
      "llama2_7b", f"mesh.stage_microbatches={microbatches}", "mesh.stage=2", fsdp=4, stage=2
    )
    ticks = microbatches + 1
    assert found.gathered == 2 * (ticks * (WEIGHTS - others) / 2 + others)


@pytest.mark.parametrize("axis", ["data", "seq", "expert"])
def test_gradients_are_summed_over_the_axes_that_shard_tokens(axis):
  found = traffic("llama2_7b", **{axis: 8})
  assert found.gathered == found.scattered == 0
  assert found.summed == 2 * (WEIGHTS + 65 * 4096)


def test_stages_sum_the_gradients_of_what_is_outside_the_layers():
  found = traffic("llama2_7b", "mesh.stage=8", stage=8)
  assert found.summed == 2 * (2 * 32000 * 4096 + 4096)


def test_weights_that_no_rule_shards_are_summed_over_fsdp():
  found = traffic("llama2_7b", "mesh.rules.embed=none", fsdp=8)
  assert found.gathered == found.scattered == 0
  assert found.summed == 2 * (WEIGHTS + 65 * 4096)


def test_experts_are_not_summed_over_their_own_axis():
  of_all, of_experts = traffic("mixtral_8x7b", data=8), traffic("mixtral_8x7b", expert=8)
  experts = 32 * 8 * 3 * 4096 * 14336
  assert of_all.summed - of_experts.summed == 2 * experts
  wide = "model.grad_dtype=float32"
  assert traffic("mixtral_8x7b", wide, data=8).summed == 2 * of_all.summed - 2 * experts
  assert traffic("mixtral_8x7b", wide, expert=8).summed == 2 * of_experts.summed


def test_only_gradients_of_trained_weights_are_reduced():
  full, lora = traffic("llama2_7b", fsdp=8), traffic("llama2_7b", "model.lora.rank=8", fsdp=8)
  assert lora.gathered > full.gathered
  assert lora.scattered < 0.01 * full.scattered
  frozen = traffic("llama2_7b", "optim.trainable=('head',)", data=8)
  assert frozen.summed == 2 * 32000 * 4096
