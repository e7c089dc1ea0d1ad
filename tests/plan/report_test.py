"""The report of a small model, compiled by libtpu."""

import json

import pytest

from jaxgpt.commands.actions import plan

LLAMA = "configs/llama3_8b.py:llama2_7b"

SMALL = [
  "--config.model.num_layers=2",
  "--config.model.width=256",
  "--config.model.num_heads=2",
  "--config.model.num_kv_heads=2",
  "--config.model.mlp_width=512",
  "--config.model.vocab_size=1024",
  "--config.model.head_dim=128",
  "--config.data.seq_len=256",
  "--config.data.batch_size=8",
]


@pytest.mark.slow
def test_a_plan_of_a_small_model(tmp_path, capsys):
  pytest.importorskip("libtpu")
  out, budget = tmp_path / "plan.json", tmp_path / "golden.json"
  args = dict(price=1.2, out=out, golden=budget)
  assert plan.plan(LLAMA, SMALL, "v5e-8", **args) == 0
  f = json.loads(out.read_text())
  assert f["attention"] == "splash" and f["mesh"]["fsdp"] == 8 and f["memory"]["fits"]
  # Nothing but attention is computed again: forward and two kernels backward, in two layers.
  assert {name.split("_seg")[0]: calls for name, calls in f["kernels"].items()} == {
    "splash_mha_fwd": 4,
    "splash_mha_dq": 2,
    "splash_mha_dkv": 2,
  }
  text = capsys.readouterr().out
  assert "fits" in text and "chip-hours" in text and "cost" in text
  assert "xla_tpu_scoped_vmem_limit_kib=65536" in text and f["options"]
