"""Reports of compiled programs: a small model by libtpu, larger ones by the GPU compiler."""

import json

import pytest

from jaxgpt import config
from jaxgpt.commands.actions import plan
from jaxgpt.config import installed
from jaxgpt.plan import lower, report

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


def test_a_run_in_stages_has_the_tokens_of_each():
  stages = f"--config.data.stages={((30, 8, 128), (20, 16, 128))}"
  overrides = [*SMALL, stages, "--config.train.steps=100", "--config.schedule.warmup_steps=10"]
  c = lower.resolve(config.load(LLAMA, overrides)[0])
  assert report.tokens_of_run(c) == 8 * 128 * 30 + 16 * 128 * 20 + 8 * 256 * 50


def test_a_report_says_which_stage_it_is_of():
  f = {"batch_size": 64, "seq_len": 4096, "stages_not_compiled": [[1000, 256, 1024]]}
  (line,) = report._stage_lines(f)
  assert "only the last, 64 rows x 4,096 tokens" in line and "256 x 1,024" in line
  assert not list(report._stage_lines(f | {"stages_not_compiled": []}))


@pytest.mark.slow
def test_a_plan_of_a_small_model(tmp_path, capsys):
  pytest.importorskip("libtpu")
  out, budget = tmp_path / "plan.json", tmp_path / "golden.json"
  outputs = plan.Outputs(figures=out, new_golden=budget)
  assert plan.plan(LLAMA, SMALL, "v5e-8", outputs, price=1.2) == 0
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


@pytest.mark.slow
def test_an_explicit_kernel_of_tpus_is_planned_on_a_cpu(tmp_path, capsys):
  pytest.importorskip("libtpu")
  flags = ["data.batch_size=4", "data.seq_len=256", "optim.accumulate=1"]
  flags += ["model.num_layers=2", "model.remat=none"]
  saved = []
  for form in ("splash", "auto"):
    given = [f"--config.{flag}" for flag in (*flags, f"model.attention={form}")]
    outputs = plan.Outputs(figures=tmp_path / f"{form}.json")
    assert plan.plan("configs/gpt2_124m.py", given, "v5e-4", outputs) == 0
    f = json.loads(outputs.figures.read_text())
    saved.append((f["attention"], f["attention_in_training"], f["memory"]["activations"]))
  assert saved[0][:2] == ("splash", "splash") and saved[0] == saved[1]


needs_plugin = pytest.mark.skipif(
  not installed.version("jax-cuda13-plugin"),
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
  outputs = plan.Outputs(figures=out, program=text)
  assert plan.plan(config, overrides, "h100x8", outputs) == 0
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


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize(
  "topology, heads, form, says_so",
  [("h100x8", 256, "cudnn", True), ("a100x8", 256, "reference", False)],
)
def test_a_kernel_that_only_the_gpu_itself_can_compile_is_said(
  topology, heads, form, says_so, tmp_path, capsys
):
  overrides = ["data.batch_size=8", "model.num_layers=2", f"model.head_dim={heads}"]
  flags = [f"--config.{flag}" for flag in overrides]
  outputs = plan.Outputs(figures=tmp_path / "plan.json")
  assert plan.plan("configs/llama3_8b.py:gemma_7b", flags, topology, outputs) == 0
  f = json.loads((tmp_path / "plan.json").read_text())
  assert (f["attention"], f["attention_in_training"]) == ("reference", form)
  line = "training on these GPUs uses attention cudnn, which takes less time and memory"
  assert (line in capsys.readouterr().out) == says_so
