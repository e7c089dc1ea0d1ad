"""Plans for GPUs: the topology's description, and the roofline of programs in XLA's form."""

import dataclasses
import json

import numpy as np
import pytest

from jaxgpt.commands.actions import plan
from jaxgpt.errors import UserError
from jaxgpt.parallel import chips
from jaxgpt.plan import gpu_target_config, hlo, roofline, topology


@pytest.mark.parametrize(
  "name, chip, hosts, num",
  [
    ("h100x8", "h100", 1, 8),
    ("h100x8x2", "h100", 2, 16),
    ("a100x4", "a100", 1, 4),
    ("h200x8", "h200", 1, 8),
    ("b200x8x16", "b200", 16, 128),
  ],
)
def test_names_of_hosts_of_gpus(name, chip, hosts, num):
  t = topology.parse(name)
  assert (t.chip.name, t.slices, t.num_devices, t.num_chips) == (chip, hosts, num, num)


@pytest.mark.parametrize(
  "name, words",
  [
    ("h100x16", "1 to 8 GPUs"),
    ("h100x8x0", "1 to 8 GPUs"),
    ("h99x8", "chip='h99': choose one of v4, v5e"),
    ("h100", "for GPUs h100x8"),
    ("v4x8", "is not a GPU"),
  ],
)
def test_hosts_that_are_not_there_are_named(name, words):
  with pytest.raises(UserError, match=words):
    topology.parse(name)


def test_a_description_has_the_installed_versions(monkeypatch):
  monkeypatch.setattr(
    gpu_target_config.installed,
    "version",
    {"nvidia-cudnn-cu13": "9.12.3.4", "nvidia-cuda-runtime": "13.0.96"}.get,
  )
  text = gpu_target_config.target_config(chips.CHIPS["a100"].gpu)
  assert "dnn_version_info { major: 9 minor: 12 patch: 3 }" in text
  assert "runtime_version { major: 13 minor: 0 patch: 96 }" in text
  assert "cuda_compute_capability { major: 8 minor: 0 feature_extension: NONE }" in text
  assert "shared_memory_per_block_optin: 166912" in text and "core_count: 108" in text
  assert "major: 9 minor: 0 feature_extension: ACCELERATED" in gpu_target_config.target_config(
    chips.CHIPS["h100"].gpu
  )


def test_without_the_compiler_the_extra_is_named(monkeypatch):
  def missing(*args, **kwargs):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
  with pytest.raises(UserError, match=r"pip install 'jaxgpt\[cuda\]'.*not implemented for cuda"):
    topology.devices(topology.parse("h100x8"))


@pytest.mark.parametrize(
  "text, groups",
  [
    ("replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
    ("replica_groups={{0,1,2,3}}", [[0, 1, 2, 3]]),
    ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), use_global", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'c'}, dimensions={1}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
  ],
)
def test_who_takes_part_in_a_collective(text, groups):
  made = hlo.Instruction("c", (), "all-gather", (), text, False)
  np.testing.assert_array_equal(hlo.groups(made), groups)


def test_a_collective_that_does_not_say_who_takes_part_is_all():
  assert hlo.groups(hlo.Instruction("c", (), "all-gather", (), "replica_groups={}", False)) is None


PROGRAM = """HloModule m, is_scheduled=true

%copied (p: f32[4,1024], i: s32[]) -> f32[1,1024] {
  %p = f32[4,1024] parameter(0)
  %i = s32[] parameter(1)
  %flat = f32[4,1024] bitcast(%p)
  ROOT %slice = f32[1,1024] dynamic-slice(%flat, %i, %i), dynamic_slice_sizes={1,1024}
}

%written (q: f32[4,1024], n: f32[1,1024], j: s32[]) -> f32[4,1024] {
  %q = f32[4,1024] parameter(0)
  %n = f32[1,1024] parameter(1)
  %j = s32[] parameter(2)
  ROOT %update = f32[4,1024] dynamic-update-slice(%q, %n, %j, %j)
}

%body (state: (s32[], f32[4,1024])) -> (s32[], f32[4,1024]) {
  %state = (s32[], f32[4,1024]) parameter(0)
  %k = s32[] get-tuple-element(%state), index=0
  %x = f32[4,1024] get-tuple-element(%state), index=1
  %row = f32[1,1024] fusion(%x, %k), kind=kLoop, calls=%copied
  %y = f32[4,1024] fusion(%x, %row, %k), kind=kLoop, calls=%written
  ROOT %out = (s32[], f32[4,1024]) tuple(%k, %y)
}

%condition (state.1: (s32[], f32[4,1024])) -> pred[] {
  %state.1 = (s32[], f32[4,1024]) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: bf16[512,1024], b: bf16[1024,2048], c: (s32[], f32[4,1024])) -> bf16[512,2048] {
  %a = bf16[512,1024] parameter(0)
  %b = bf16[1024,2048] parameter(1)
  %c = (s32[], f32[4,1024]) parameter(2)
  %start = ((bf16[512,1024]), bf16[1024,1024]) all-gather-start(%a), GROUPS, dimensions={0}
  %while = (s32[], f32[4,1024]) while(%c), condition=%condition, body=%body, TRIPS
  %d = bf16[512,2048] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = bf16[1024,1024] all-gather-done(%start)
  ROOT %sum = bf16[512,2048] all-reduce(%d), GROUPS, to_apply=%add
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')


def of(groups, hosts):
  chip = dataclasses.replace(
    chips.CHIPS["h100"],
    hbm_bandwidth=1e9,
    ici_bandwidth=1e9,
    dcn_bandwidth=1e8,
    clock=1e9,
    flops_per_cycle=1000,
  )
  return roofline.of_program(hlo.parse(PROGRAM.replace("GROUPS", groups)), chip, hosts)


def test_a_roofline_takes_what_limits_each_instruction():
  got = of("replica_groups={{0,1}}", [0, 0])
  flops, moved = 2 * 512 * 1024 * 2048, 2 * (512 * 1024 + 1024 * 2048 + 512 * 2048)
  assert got.flops == flops
  assert got.seconds["matmul"] == max(flops / 1e12, moved / 1e9) == moved / 1e9
  # Of the four rows one is read and one is written, in each of three runs; and the counter.
  assert (
    got.traffic == 3 * (2 * 4096 + 2 * 4096 + 2 * 4) == pytest.approx(1e9 * got.seconds["other"])
  )


def test_collectives_are_hidden_by_what_is_scheduled_beside_them():
  got = of("replica_groups={{0,1}}", [0, 0])
  gathered, reduced = 1024 * 1024 * 2 / 2, 2 * 512 * 2048 * 2 / 2
  assert got.collectives == {
    ("all-gather", "bf16", roofline.NVLINK, "overlapped"): [1, gathered],
    ("all-reduce", "bf16", roofline.NVLINK, "exposed"): [1, reduced],
  }
  assert got.seconds["exposed"] == pytest.approx(reduced / 1e9)
  assert got.seconds["unhidden"] == 0  # the gather takes less than the matmul
  slow = of("replica_groups={{0,1}}", [0, 1])
  beside = slow.seconds["matmul"] + slow.seconds["other"]
  assert slow.seconds["unhidden"] == pytest.approx(gathered / 1e8 - beside)


def test_members_of_a_host_share_its_network():
  assert of("replica_groups={{0,1}}", [0, 1]).bytes(link=roofline.NETWORK) > 0
  one = of("replica_groups={{0,2},{1,3}}", [0, 0, 1, 1])
  both = of("replica_groups={{0,1,2,3}}", [0, 0, 1, 1])
  assert one.bytes(link=roofline.NVLINK) == both.bytes(link=roofline.NVLINK) == 0
  rate = lambda r: r.bytes("exposed") / r.seconds["exposed"]
  assert rate(both) == pytest.approx(2 * rate(one))  # each sends over two cards
  inside = of("replica_groups={{0,1},{2,3}}", [0, 0, 1, 1])
  assert inside.bytes(link=roofline.NETWORK) == 0


@pytest.mark.parametrize(
  "target, mask, name, flops",
  [
    ("__cudnn$fmhaScaleBiasSoftmax", "CAUSAL", "cudnn_attention_forward", 2),
    ("__cudnn$fmhaSoftmax", "NO_MASK", "cudnn_attention_forward", 4),
    ("__cudnn$fmhaScaleBiasSoftmaxBackward", "CAUSAL", "cudnn_attention_backward", 5),
  ],
)
def test_cudnns_attention_is_known_by_its_call(target, mask, name, flops):
  of_heads = "bf16[8,1024,12,64]{3,2,1,0}"
  made = hlo.Instruction(
    "fwd",
    (),
    "custom-call",
    (),
    (
      f'custom_call_target="{target}", '
      f"operand_layout_constraints={{{of_heads}, {of_heads}, {of_heads}}}"
      f', backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "{mask}"}}}}'
    ),
    False,
  )
  assert roofline.attention_kernel(made) == (name, flops * 8 * 1024 * 1024 * 12 * 64)
  other = made._replace(attributes='custom_call_target="__cudnn$convForward"')
  assert roofline.attention_kernel(other) is None


def test_of_a_condition_the_longer_branch_counts():
  text = """HloModule m, is_scheduled=true

%long (p: f32[1024]) -> f32[1024] {
  %p = f32[1024] parameter(0)
  ROOT %c = f32[1024] copy(%p)
}

%short (q: f32[1024]) -> f32[1024] {
  ROOT %q = f32[1024] parameter(0)
}

ENTRY %main (a: f32[1024], b: pred[]) -> f32[1024] {
  %a = f32[1024] parameter(0)
  %b = pred[] parameter(1)
  ROOT %r = f32[1024] conditional(%b, %a, %a), true_computation=%long, false_computation=%short
}
"""
  chip = chips.CHIPS["h100"]
  assert roofline.of_program(hlo.parse(text), chip, [0]).traffic == 8192


needs_plugin = pytest.mark.skipif(
  not gpu_target_config.installed.version("jax-cuda13-plugin"),
  reason="needs JAX's CUDA plugin (pip install 'jaxgpt[cuda]', 4.4 GB); no GPU",
)


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize(
  "config, overrides, forward, backward",
  [
    (
      "configs/gpt2_124m.py",
      ["--config.data.batch_size=64", "--config.optim.accumulate=1"],
      12,
      12,
    ),
    (
      "configs/llama3_8b.py",
      ["--config.data.batch_size=8", "--config.model.remat=save:q,k,v,attention"],
      32,
      32,
    ),
    ("configs/llama3_8b.py", ["--config.data.batch_size=8", "--config.model.num_layers=4"], 8, 4),
  ],
)
def test_the_program_for_8_h100_holds_cudnns_flash_attention(
  config, overrides, forward, backward, tmp_path
):
  out, text = tmp_path / "plan.json", tmp_path / "program.txt"
  assert plan.plan(config, overrides, "h100x8", out=out, save_text=text) == 0
  f, text = json.loads(out.read_text()), text.read_text()
  assert text.count('custom_call_target="__cudnn$fmhaScaleBiasSoftmax"') >= 1
  assert text.count('custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"') >= 1
  assert '"mask_type": "CAUSAL"' in text and '"mask_type": "NO_MASK"' not in text
  assert f["attention"] == "cudnn" and f["kernels"] == {
    "cudnn_attention_forward": forward,
    "cudnn_attention_backward": backward,
  }
  assert f["memory"]["fits"] and f["link_bytes"]["network"] == 0 < f["link_bytes"]["NVLink"]
  assert 0.9 * f["model_flops"] < f["matmul_flops"] + f["kernel_flops"] and 0 < f["mfu"] < 1
