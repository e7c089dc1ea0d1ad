"""The configs that a search considers."""

import math

import pytest

from jaxgpt import config
from jaxgpt.config import effects
from jaxgpt.config.remat import activations
from jaxgpt.plan import lower, memory_estimate, topology
from jaxgpt.plan.search import candidates, search

LLAMA = "configs/llama3_8b.py:llama2_7b"


def llama(*overrides):
  return lower.resolve(config.load(LLAMA, overrides)[0])


def test_a_search_looks_at_all_axes_that_suit():
  t = topology.parse("v6e-64x2")
  found = candidates.meshes(llama("--config.data.seq_len=2048"), t)
  assert all(math.prod(sizes.values()) == 128 for sizes in found)
  assert all(sizes["data"] % 2 == 0 or sizes["fsdp"] % 2 == 0 for sizes in found)
  assert {sizes["seq"] for sizes in found} == {1, 2, 4, 8}  # 256 tokens of a row at least
  assert {sizes["stage"] for sizes in found} == {1, 2, 4}
  assert {sizes["expert"] for sizes in found} == {1}
  experts = llama(
    "--config.model.mlp_pattern=('moe',)",
    "--config.model.moe.experts=4",
    "--config.data.seq_len=2048",
  )
  assert {sizes["expert"] for sizes in candidates.meshes(experts, t)} == {1, 2, 4}


@pytest.mark.parametrize("where, within", [("h100x8x2", 8), ("v6e-64x2", 64)])
def test_a_model_too_large_for_a_host_or_slice_is_divided_over_them(where, within, few_axes):
  found = candidates.meshes(llama("--config.data.seq_len=2048"), topology.parse(where))
  alone = [(sizes["data"], sizes["fsdp"]) for sizes in found if sizes["tensor"] == 1]
  assert sorted(alone) == [(1, within * 2), (2, within), (within * 2, 1)]


def test_what_fits_no_host_fits_two(few_axes):
  overrides = ["--config.data.seq_len=2048"]
  c = lower.resolve(config.load("configs/llama3_8b.py:llama2_70b", overrides)[0])
  t = topology.parse("h100x8x4")
  fitting = [one for one in candidates.candidates(c, t) if one.bytes <= t.chip.hbm_limit]
  assert fitting and all(one.c.mesh.fsdp * one.c.mesh.tensor >= 16 for one in fitting)


@pytest.mark.parametrize(
  "overrides, named",
  [
    (("--config.model.gated=False",), {"q", "k", "v", "attention", "o", "up"}),
    (("--config.model.mlp_pattern=('none',)",), {"q", "k", "v", "attention", "o"}),
    ((), {"q", "k", "v", "attention", "o", "gate", "up"}),
  ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_a_search_saves_only_what_the_model_has(overrides, named, offload):
  c = llama(*overrides)
  found = candidates.remats(c.model, offload)
  assert {name for one in found for name in activations(one).saved} == named
  assert any(activations(one).offloaded for one in found) == offload
  assert len(set(found)) == len(found) >= 4 and found[0] == "full"
  for one in found:
    effects.check(candidates.changed(c, {"model.remat": one}), {"model.remat": "command line"})


def test_stages_divide_the_layers_after_the_leading_dense_ones():
  """DeepSeek V2 Lite: one dense layer, then 26 of experts."""
  overrides = ["--config.data.seq_len=2048"]
  c = lower.resolve(config.load("configs/llama3_8b.py:deepseek_v2_lite", overrides)[0])
  found = candidates.meshes(c, topology.parse("v5e-64"))
  assert {sizes["stage"] for sizes in found} == {1, 2}
  staged = next(sizes for sizes in found if sizes["stage"] == 2)
  candidates.changed(c, {f"mesh.{axis}": size for axis, size in staged.items()})


def test_keys_of_pipelines_are_unset_without_stages(few_axes):
  c = llama("--config.data.seq_len=2048", "--config.mesh.stage=2", "--config.mesh.stage_repeats=2")
  one = candidates.candidates(c, topology.parse("v5e-64"))[0]
  assert one.c.mesh.stage == one.c.mesh.stage_repeats == 1
  assert one.changes["mesh.stage_repeats"] == 1
  assert "repeats" not in search.describe(one.changes)


def test_a_loss_in_chunks_is_tried_where_the_plan_would_not_fit_otherwise(few_axes):
  overrides = ["--config.data.seq_len=8192", "--config.data.batch_size=256"]
  load = lambda *more: lower.resolve(
    config.load("configs/llama3_8b.py:llama3_8b", [*overrides, *more])[0]
  )
  t = topology.parse("v5e-256")
  chunked = [
    one for one in candidates.candidates(load(), t) if "objective.loss_chunk" in one.changes
  ]
  assert any(one.bytes <= t.chip.hbm_limit for one in chunked)
  whole = candidates.changed(chunked[0].c, {"objective.loss_chunk": 0})
  needed = memory_estimate.total(whole, t)
  assert needed > t.chip.hbm_limit and needed > chunked[0].bytes
  assert "loss_chunk 2048" in search.describe(chunked[0].changes)
  own = candidates.candidates(load("--config.objective.loss_chunk=1024"), t)
  assert not any("objective.loss_chunk" in one.changes for one in own)


def test_a_search_says_where_evaluation_needs_other_rows(few_axes):
  c, t = llama("--config.data.seq_len=2048", "--config.eval.batch_size=24"), topology.parse("v5e-8")
  found = candidates.candidates(c, t)
  assert all("eval.batch_size" not in one.changes and one.c.eval.batch_size == 24 for one in found)
  found = candidates.candidates(c, topology.parse("v5e-16"))
  assert any(one.changes.get("eval.batch_size") == one.c.data.batch_size for one in found)


@pytest.mark.parametrize(
  "preset, overrides, refused",
  [
    # QK-clip needs whole rows and all layers on a device.
    ("llama2_7b", ["optim.qk_clip=100"], lambda one: one.mesh.seq * one.mesh.stage > 1),
    # A pipeline saves the input of its layers on the device.
    ("llama2_7b", [], lambda one: one.mesh.stage > 1 and "input" in one.model.remat),
    # 4 does not divide the columns of an expert.
    ("mixtral_8x7b", ["model.moe.width=1026"], lambda one: one.mesh.tensor > 2),
  ],
)
def test_no_candidate_is_refused_by_training(preset, overrides, refused, monkeypatch):
  monkeypatch.setattr(candidates, "_ALONE", ((4, 1),))
  monkeypatch.setattr(candidates, "_SEQS", (1, 2))
  monkeypatch.setattr(candidates, "_STAGES", (1, 2))
  overrides = ["data.seq_len=2048", *overrides]
  flags = [f"--config.{one}" for one in overrides]
  c = lower.resolve(config.load(f"configs/llama3_8b.py:{preset}", flags)[0])
  found = candidates.candidates(c, topology.parse("v5e-16"), offload=True)
  assert found and not any(refused(one.c) for one in found)
