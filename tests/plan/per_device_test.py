"""Weights and activations per device: mixed layers, codes, pairs, and experts over mesh axes."""

import json
import math

import pytest

from jaxgpt import config
from jaxgpt.plan import lower, memory_estimate, per_device, time_estimate, topology, weight_traffic

LLAMA = "configs/llama3_8b.py"


def resolved(preset, *overrides):
  return lower.resolve(config.load(f"{LLAMA}:{preset}", overrides)[0])


def sizes(**axes):
  return dict.fromkeys(config.MESH_AXES, 1) | axes


def buffers(c, of=None):
  of = of or sizes(fsdp=8)
  return {b.name: b.bytes for b in memory_estimate.buffers(c, of, per_device.count(c))}


MOE = ("--config.model.moe.experts=8", "--config.model.moe.width=14336")


def test_a_mixed_pattern_has_the_mean_of_its_layers():
  dense, experts, mixed = (
    resolved("llama3_8b", *MOE, f"--config.model.mlp_pattern={pattern}")
    for pattern in ("('dense',)", "('moe',)", "('dense','moe')")
  )
  up = lambda c: per_device.widths(c.model, 2)["up"]
  assert up(experts) == 2 * up(dense)  # two experts per token
  assert up(mixed) == (up(dense) + up(experts)) / 2
  quarter = resolved("llama3_8b", *MOE, "--config.model.mlp_pattern=('none','none','none','moe')")
  assert up(quarter) == up(experts) / 4
  assert per_device.widths(quarter.model, 2)["down"] == quarter.model.width / 4


def test_the_backward_pass_is_of_the_period_with_the_most():
  """A leading dense layer is narrower than the experts of the others."""
  first = ("--config.model.mlp_pattern=('moe',)", "--config.model.moe.first_dense=16")
  few, all_ = (
    buffers(resolved("llama3_8b", *MOE, *flags))["layers (backward pass of 1)"]
    for flags in (first, first[:1])
  )
  assert few == all_


def test_nothing_saved_by_name_counts_the_experts_too():
  name = "layers (norms, activations)"
  none = "--config.model.remat=none"
  dense, experts = (
    buffers(resolved("llama3_8b", *MOE, none, f"--config.model.mlp_pattern={pattern}"))[name]
    for pattern in ("('dense',)", "('moe',)")
  )
  assert experts > 1.4 * dense


@pytest.mark.parametrize("base, share", [("int8", 0.25), ("int4", 0.125)])
def test_codes_take_their_own_bytes_and_are_not_cast(base, share):
  lora = ("--config.model.lora.rank=8", "--config.data.batch_size=8")
  full, coded = (
    resolved("llama2_7b", *lora, f"--config.model.lora.base={name}") for name in ("float32", base)
  )
  of_layers = lambda c: sum(
    w.entries(sizes()) * w.itemsize for w in per_device.count(c).layers if not w.trained
  )
  assert of_layers(coded) == pytest.approx(of_layers(full) * share, rel=0.02)
  key = "layers (weights as they are gathered)"
  assert buffers(coded)[key] < 0.02 * buffers(full)[key]
  shapes = per_device.count(coded)
  assert shapes.held_bytes(sizes()) == sum(
    w.entries(sizes()) * w.itemsize for w in shapes.layers + shapes.others
  )
  gathered = lambda c: weight_traffic.of_step(c, sizes(fsdp=8), per_device.count(c)).gathered
  assert gathered(coded) < gathered(full)


def preference(*overrides):
  small = (
    "--config.objective.name=preference",
    "--config.objective.z_loss=0.0",
    "--config.data.batch_size=64",
    "--config.data.seq_len=2048",
  )
  return resolved("llama2_7b", *small, *overrides)


def test_pairs_take_the_memory_and_the_time_of_two_sequences():
  plain = resolved("llama2_7b", "--config.data.batch_size=64", "--config.data.seq_len=2048")
  pairs, where = preference("--config.objective.loss=simpo"), topology.parse("v5e-8")
  one, two = buffers(plain), buffers(pairs)
  for name in ("layers (input of each)", "head/logits"):
    assert two[name] == 2 * one[name], name
  assert per_device.tokens_of_step(pairs) == 2 * per_device.tokens_of_step(plain)
  took = lambda c: time_estimate.seconds(c, sizes(fsdp=8), per_device.count(c), where)
  for kind in ("matmul", "kernels", "other"):
    assert took(pairs)[kind] == pytest.approx(2 * took(plain)[kind]), kind


def test_a_reference_is_run_forward():
  where = topology.parse("v5e-8")
  took = lambda c: time_estimate.seconds(c, sizes(fsdp=8), per_device.count(c), where)
  full = "--config.model.remat=save:q,k,v,attention,o,gate,up"  # nothing is computed again
  simpo, dpo = (preference(f"--config.objective.loss={loss}", full) for loss in ("simpo", "dpo"))
  assert took(dpo)["matmul"] == pytest.approx(took(simpo)["matmul"] * 4 / 3, rel=0.01)
  assert took(dpo)["kernels"] > 1.2 * took(simpo)["kernels"]
  more = set(buffers(dpo)) - set(buffers(simpo))
  gathered = "reference (weights as they are gathered)"
  assert more == {"reference", gathered, "head/logits of the fixed model"}
  counts = per_device.count(dpo)
  assert buffers(dpo)[gathered] == 2 * counts.cast_of_layers(sizes(fsdp=8)) + counts.layer_bytes(
    sizes(fsdp=8), 32, 2
  )
  once = weight_traffic.of_step(dpo, sizes(fsdp=8), counts).gathered
  assert time_estimate._gathered_forward(dpo, sizes(fsdp=8)) == once
  assert time_estimate._gathered_forward(simpo, sizes(fsdp=8)) == 0


def test_microbatches_of_contrastive_keep_one_sequence():
  c = config.base()
  c.model.update(dict(vocab_size=256, num_layers=2, width=64, num_heads=2))
  c.model.update(dict(head="pooler", head_transform="norm", causal=False))
  c.objective.name, c.data.batch_size = "contrastive", 64
  whole = config.resolve(c)
  c.optim.accumulate = 4
  cut = config.resolve(c)
  name = "layers (input of each)"
  assert buffers(whole, sizes())[name] == 8 * buffers(cut, sizes())[name]


def test_a_teacher_is_run_forward_in_its_own_size():
  c = config.base()
  small = dict(vocab_size=256, num_layers=2, width=64, num_heads=2)
  c.model.update(small)
  own = config.resolve(c)
  theirs = json.dumps(small | {"max_len": 256, "num_layers": 4})
  c.objective.update(dict(name="distillation", teacher="RUN", teacher_config=theirs))
  where = topology.parse("v5e-1")
  took = lambda c: time_estimate.seconds(c, sizes(), per_device.count(c), where)["matmul"]
  assert took(config.resolve(c)) > 1.5 * took(own)


def test_devices_with_the_same_tokens_have_room_for_the_rows_of_all():
  flags = [
    "--config.data.batch_size=64",
    "--config.data.seq_len=4096",
    "--config.model.moe.capacity=0",
    "--config.mesh.rules.mlp=none",
    "--config.mesh.rules.act_mlp=none",
  ]
  by_tensor = resolved("mixtral_8x7b", *flags, "--config.mesh.rules.experts=tensor")
  assert per_device.grouped_room(by_tensor, sizes(tensor=8)) == 8
  assert per_device.grouped_room(by_tensor, sizes(data=8)) == 1
  # Devices with other tokens exchange them, and have the room that there is for that.
  by_expert, own = resolved("mixtral_8x7b", *flags), sizes(expert=4)
  room = per_device.expert_room(by_expert, own)
  assert per_device.grouped_room(by_expert, own) == room > 1


@pytest.mark.parametrize(
  "preset", ["llama3_8b", "gemma2_9b", "mixtral_8x7b", "deepseek_v2_lite", "deepseek_v3"]
)
def test_weights_by_activation_are_those_that_a_token_uses(preset):
  c = resolved(preset)
  moe, of_layers = c.model.moe, 0
  for weight in per_device.count(c).layers:
    size = math.prod(weight.shape)
    matrix = len(weight.shape) > 2 and not (moe.experts and weight.shape[-1] == moe.experts)
    if matrix:  # no vector, and not the router
      of_layers += size * moe.per_token / moe.experts if ("expert",) in weight.mesh_axes else size
  found = (
    sum(per_device.layer_weights(c.model, c.model.moe.per_token).values()) * c.model.num_layers
  )
  assert found == pytest.approx(of_layers, rel=1e-6)


def test_ranks_of_latent_attention_that_the_mesh_does_not_divide_are_held_whole():
  counts = per_device.count(resolved("deepseek_v3"))
  weight = next(w for w in counts.layers if w.shape[1:] == (512, 128, 128))
  whole = math.prod(weight.shape)
  assert weight.entries(sizes(fsdp=256)) == whole / 256
  assert weight.entries(sizes(fsdp=448)) == whole


def test_a_pattern_whose_experts_no_layer_reaches_has_none():
  flags = ("--config.model.mlp_pattern=('dense','dense','moe')", "--config.model.num_layers=2")
  c = resolved("llama3_8b", *MOE, *flags, "--config.data.batch_size=64")
  assert per_device.expert_room(c, sizes(expert=8)) == 1
  assert per_device.grouped_room(c, sizes(tensor=8)) == 1
  found = memory_estimate.buffers(c, sizes(fsdp=8), per_device.count(c))
  assert not any("mesh.expert" in b.keys for b in found)


@pytest.mark.parametrize("capacity, rows", [(0, 2), (0.5, 1), (1.25, 2.5), (8, 8)])
def test_experts_work_on_their_slots(capacity, rows):
  """Two of eight experts per token. An expert has no more slots than a row has tokens."""
  flags = ("--config.data.batch_size=64", "--config.data.seq_len=4096")
  c = resolved("mixtral_8x7b", *flags, f"--config.model.moe.capacity={capacity}")
  assert per_device.share(c, sizes(fsdp=8)).routed == rows


def test_dots_save_no_matmuls_of_routed_experts():
  """They have a batch dimension, the experts, or are grouped. Shared experts have none."""
  flags = ("--config.data.batch_size=64", "--config.data.seq_len=4096")
  experts, shared = (
    resolved("mixtral_8x7b", *flags, "--config.model.remat=dots", f"--config.model.moe.shared={n}")
    for n in (0, 1)
  )
  assert buffers(experts)["layers/mlp/up"] == buffers(experts)["layers/mlp/gate"] == 0
  of_tokens = 32 * 8 * 4096 * 2  # layers, rows, tokens, bytes
  assert buffers(shared)["layers/mlp/up"] == of_tokens * shared.model.moe.width
  # They are computed again, as without any activation saved.
  where = topology.parse("v5p-16")
  others = "--config.model.remat=save:q,k,v,attention,o"
  took = lambda c: time_estimate.seconds(c, sizes(fsdp=8), per_device.count(c), where)
  dots, named = took(experts), took(resolved("mixtral_8x7b", *flags, others))
  assert dots["matmul"] == pytest.approx(named["matmul"])
  assert dots["other"] == pytest.approx(named["other"])


@pytest.mark.parametrize(
  "overrides, shares",
  [
    ((), (1, 1)),
    (("--config.optim.frozen=('embed','head')",), (1, 0)),
    (("--config.optim.trainable=('head',)",), (0, 1)),
  ],
)
def test_matmuls_of_frozen_weights_have_no_gradient_of_the_weight(overrides, shares):
  """A matmul takes 2 FLOPs forward, 2 for the gradient of its input and 2 for its weight's."""
  flags = ("--config.data.batch_size=64", "--config.data.seq_len=2048")
  full = "--config.model.remat=save:q,k,v,attention,o,gate,up"
  c, all_ = resolved("llama2_7b", *flags, full, *overrides), resolved("llama2_7b", *flags, full)
  counts = per_device.count(c)
  assert counts.trained_shares(c.model) == shares
  m, s = all_.model, per_device.share(all_, sizes(fsdp=8))
  saved = per_device.kept_names(m.remat)
  took = lambda trained: time_estimate._matmul_flops(m, s, saved, trained)
  head, layers = 4096 * 32000, 32 * (4 * 4096**2 + 3 * 4096 * 11008)
  assert took(shares) == pytest.approx((4 + 2 * shares[0]) * layers + (4 + 2 * shares[1]) * head)
  where = topology.parse("v5e-8")
  seconds = lambda c: time_estimate.seconds(c, sizes(fsdp=8), per_device.count(c), where)["matmul"]
  assert seconds(c) <= seconds(all_)


def test_adapters_spare_a_third_of_the_matmuls():
  flags = ("--config.data.batch_size=64", "--config.model.remat=save:q,k,v,attention,o,gate,up")
  where = topology.parse("v5e-8")
  full, lora = (
    time_estimate.seconds(c, sizes(fsdp=8), per_device.count(c), where)["matmul"]
    for c in (
      resolved("llama2_7b", *flags),
      resolved("llama2_7b", *flags, "--config.model.lora.rank=8"),
    )
  )
  assert lora == pytest.approx(full * 2 / 3, rel=0.02)


def mixtral(*overrides):
  flags = ["data.batch_size=64", "data.seq_len=4096", "model.moe.capacity=0", *overrides]
  return resolved("mixtral_8x7b", *(f"--config.{one}" for one in flags))


def test_experts_that_fsdp_shards_are_not_gathered():
  """Their tokens are exchanged instead."""
  rules = ("experts=fsdp,expert", "expert_batch=data", "embed=none")
  own, shared = mixtral(), mixtral(*(f"mesh.rules.{one}" for one in rules))
  where = topology.parse("v5p-16")
  gathered = lambda c: weight_traffic.of_step(c, sizes(fsdp=8), per_device.count(c)).gathered
  assert gathered(shared) == 0 < gathered(own)
  of_layer = 2 * (4096 * 32 * 128 * 2 + 4096 * 8 * 128 * 2 + 4096 * 8 + 2 * 4096)
  of_expert = 2 * 3 * 4096 * 14336
  found = buffers(shared)["layers (gathered)"]
  assert found == pytest.approx(of_layer + of_expert)
  assert buffers(own)["layers (gathered)"] == pytest.approx(of_layer + 8 * of_expert)
  sent = lambda c: time_estimate._activation_bytes_between_devices(
    c, sizes(fsdp=8), per_device.share(c, sizes(fsdp=8)), 1.0
  )
  assert sent(own) == 0
  # Passes, layers, bytes, width, experts of a token.
  assert sent(shared) == 5 * 32 * 2 * 4096 * 2
  took = time_estimate.seconds(shared, sizes(fsdp=8), per_device.count(shared), where)
  assert took["exposed"] > 0


def test_devices_with_the_same_tokens_share_the_work_of_experts():
  flags = ("mesh.rules.mlp=none", "mesh.rules.act_mlp=none")
  c = mixtral(*flags, "mesh.rules.experts=tensor")
  assert per_device.share(c, sizes(tensor=8)).routed == 2 / 8
  assert per_device.share(c, sizes(data=8)).routed == 2
  slots = mixtral(*flags, "mesh.rules.experts=tensor", "model.moe.capacity=1.25")
  assert per_device.share(slots, sizes(tensor=8)).routed == 2.5 / 8
  by_expert = mixtral("model.moe.capacity=1.25")
  assert per_device.share(by_expert, sizes(fsdp=2, expert=4)).routed == 2.5
  assert per_device.share(by_expert, sizes(fsdp=2, seq=4)).routed == 4 * 2.5  # whole rows


def test_rows_that_came_to_wide_models_with_narrow_experts_take_memory():
  """DeepSeek V3: 7,168 numbers per row outside the experts, and 2,048 inside."""
  flags = ("--config.data.batch_size=64", "--config.data.seq_len=4096")
  c = resolved("deepseek_v3", *flags, "--config.model.moe.capacity=1")
  name = "layers (backward pass of 1)"
  alone, exchanged = buffers(c, sizes(fsdp=8))[name], buffers(c, sizes(expert=8))[name]
  tokens = 8 * 4096
  # Three arrays of rows in place of one of hidden activations, of routed and shared experts.
  assert exchanged - alone == 2 * tokens * (8 * 3 * 7168 - (8 + 1) * 2048)
  # Mixtral's experts are wider than the model, so that hidden activations take more.
  wide = mixtral("model.moe.capacity=1")
  assert buffers(wide, sizes(fsdp=8))[name] == buffers(wide, sizes(expert=8))[name]
