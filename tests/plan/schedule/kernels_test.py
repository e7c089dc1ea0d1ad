"""Time of attention kernels: schedules, and how often each part of them runs."""

import dataclasses

import pytest

from jaxgpt.model.attention.masks import Band
from jaxgpt.parallel.chips import CHIPS
from jaxgpt.plan.cost import Call
from jaxgpt.plan.schedule import dump, kernels
from tests.plan.schedule.bundles_test import text

CAUSAL = kernels.Mask(Band(causal=True), 8192, 8192)
V6E = CHIPS["v6e"]


def test_hidden_blocks_cost_only_their_iteration():
  found = kernels.count("splash_mha_fwd", text("v6e_512_fwd"), CAUSAL, V6E)
  # Of 16 x 16 blocks of a head, 136 are on or below the diagonal; 16 rows start and end.
  assert found.cycles == 39 + 32 * (256 * 268 + 136 * 911 + 16 * 252)
  assert (found.blocks, found.pairs, found.cores) == (32 * 136, 32 * 256, 1)
  assert found.seconds == found.cycles / 1.75e9


def test_gradients_of_keys_end_once_for_the_heads_that_share_them():
  found = kernels.count("splash_mha_dkv", text("v6e_512_dkv"), CAUSAL, V6E)
  assert found.cycles == 51 + 32 * (256 * 286 + 136 * 1274) + 8 * 16 * 125


def test_fused_gradients_write_a_part_for_each_block_of_keys():
  one = kernels.count("splash_mha_dkv", text("v6e_1024_fused_dkv"), CAUSAL, V6E)
  # In HBM: values, statistics (8 rows of float32), three gradients. Blocks of 1,024 x 128 in
  # bfloat16 are 262,144 bytes; 36 of 64 blocks are visible, and 8 columns end for each key head.
  dq = 32 * 64 * 262_144
  assert one.bytes == dq + 8 * 8 * 3 * 262_144 + 32 * 36 * 8 * 1024 * 4


def test_memory_counts_where_it_takes_longer():
  slow = dataclasses.replace(V6E, hbm_bandwidth=1e9)
  found = kernels.count("splash_mha_fwd", text("v6e_512_fwd"), CAUSAL, slow)
  assert found.seconds == found.bytes / 1e9 > found.cycles / V6E.clock


def test_two_cores_share_the_heads():
  found = kernels.count("splash_mha_fwd", text("v5p_512_segmented_fwd"), CAUSAL, CHIPS["v5p"])
  assert found.cores == 2
  assert found.cycles == 68 + 16 * (256 * 398 + 136 * 1183 + 16 * 507)


@pytest.mark.parametrize(
  "chip, mask, reason",
  [
    ("v5e", CAUSAL, "a grid of"),  # one core cannot have half of the heads
    ("v5p", kernels.Mask(Band(True), 4096, 4096), "operands of 8192 x 8192 tokens"),
    ("v5p", kernels.Mask(Band(True, 1024), 8192, 8192), "a grid of"),  # its rows are shorter
  ],
)
def test_a_schedule_of_another_call_is_not_counted(chip, mask, reason):
  with pytest.raises(kernels.NotUnderstood, match=reason):
    kernels.count("splash_mha_fwd", text("v5p_512_segmented_fwd"), mask, CHIPS[chip])


def test_kernels_of_a_step_say_where_their_seconds_come_from(tmp_path, monkeypatch):
  monkeypatch.setattr(dump, "_folder", tmp_path)
  (tmp_path / "17-splash_mha_fwd.3-01-final_bundles.txt").write_text(text("v6e_512_fwd"))
  (tmp_path / "17-splash_mha_fwd.3-00-schedule-analysis_final_bundles.txt").write_text(
    "no schedule"
  )
  label = CAUSAL.band.label(8192, 8192)
  calls = {
    Call("splash_mha_fwd.3", "splash_mha_fwd", f"jit(step)/{label}/fwd"): [2, 1e12],
    Call("splash_mha_fwd.4", "splash_mha_fwd", f"jit(step)/{label}/fwd"): [1, 1e12],
  }
  calls[Call("splash_mha_fwd.5", "splash_mha_fwd", f"jit(step)/{label}/fwd")] = [3, 1.5e12]
  counted, assumed, twin = kernels.of_step(calls, V6E, share=0.5)
  alone = kernels.count("splash_mha_fwd", text("v6e_512_fwd"), CAUSAL, V6E)
  assert counted.source == kernels.SCHEDULE and counted.seconds == 2 * alone.seconds
  assert counted.flops == 1e12 * 136 / 256
  assert twin.source == kernels.SCHEDULE and twin.seconds == 3 * alone.seconds  # equal to the first
  assert assumed.source == kernels.ASSUMED and assumed.reason.startswith("libtpu wrote no schedule")
  assert assumed.seconds == 0.5e12 / (V6E.clocked_flops / 2)


def test_kernels_of_another_process_are_counted_under_the_given_mask(tmp_path):
  # MaxText's kernels carry their block sizes in the name, and no mask.
  name = "splash_mha_fwd_segmented_residuals_block_q_512.7"
  (tmp_path / f"17-{name}-01-final_bundles.txt").write_text(text("v6e_512_fwd"))
  calls = {Call(name, name.removesuffix(".7"), "jit(step)/fwd"): [2, 1e12]}
  (found,) = kernels.of_step(calls, V6E, share=0.5, mask=CAUSAL, folder=tmp_path)
  alone = kernels.count("splash_mha_fwd", text("v6e_512_fwd"), CAUSAL, V6E)
  assert found.source == kernels.SCHEDULE and found.seconds == 2 * alone.seconds
  (found,) = kernels.of_step(calls, V6E, share=0.5, mask=CAUSAL)
  assert found.source == kernels.ASSUMED and "no schedule" in found.reason


def test_a_kernel_is_told_by_the_start_of_its_name():
  plain = kernels.count("splash_mha_dkv", text("v6e_512_dkv"), CAUSAL, V6E)
  name = "splash_mha_dkv_no_residuals_block_kv_dq_512_block_q_dq_512"
  assert kernels.count(name, text("v6e_512_dkv"), CAUSAL, V6E) == plain
