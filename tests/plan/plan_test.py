import json
import math

import jax
import pytest

from jaxgpt import config, loop, mesh, metrics
from jaxgpt.errors import UserError
from jaxgpt.plan import chips, command, explain, golden, lower, report, topology

LLAMA = "configs/llama3_8b.py:llama2_7b"
SMALL = ["--config.model.num_layers=2", "--config.model.width=256", "--config.model.num_heads=2",
         "--config.model.num_kv_heads=2", "--config.model.mlp_width=512",
         "--config.model.vocab_size=1024", "--config.model.head_dim=128",
         "--config.data.seq_len=256", "--config.data.batch_size=8"]


@pytest.mark.parametrize("name, chip, shape, slices, num_chips, num_devices", [
    ("v5e-256", "v5e", (16, 16), 1, 256, 256),
    ("v5p-128", "v5p", (4, 4, 4), 1, 64, 64),
    ("v6e-64x2", "v6e", (8, 8), 2, 128, 128),
    ("v4-64", "v4", (2, 4, 4), 1, 32, 32),
    ("tpu7x-128", "tpu7x", (4, 4, 4), 1, 64, 128),
    ("v5p:4x4x8", "v5p", (4, 4, 8), 1, 128, 128),
    ("v5p-12288", "v5p", (16, 16, 24), 1, 6144, 6144),
])
def test_names_of_topologies(name, chip, shape, slices, num_chips, num_devices):
  t = topology.parse(name)
  assert (t.chip.name, t.shape, t.slices, t.num_chips, t.num_devices) == (
      chip, shape, slices, num_chips, num_devices)


@pytest.mark.parametrize("name, words", [
    ("pod", "write CHIP-SIZE"), ("v5e-24", "slices of 1, 4, 8"), ("v9-8", "no chip 'v9'"),
    ("v5p-7", "counted in cores, 2 a chip"), ("v5e:4x4x4", "2 dimensions"), ("v5e-0", "write"),
])
def test_a_topology_that_is_not_there_is_named(name, words):
  with pytest.raises(UserError, match=words):
    topology.parse(name)


def test_peaks_agree_with_those_that_runs_report():
  for kind, name in (("TPU v4", "v4"), ("TPU v5e", "v5e"), ("TPU v5p", "v5p"), ("TPU v6e", "v6e")):
    assert math.isclose(chips.CHIPS[name].peak_flops, metrics.peak_flops(kind), rel_tol=0.01)


def test_shapes_of_the_batch_are_those_of_the_data():
  c = lower.resolve(config.load(LLAMA, SMALL)[0])
  shapes = lower.batch_shapes(c)
  assert set(shapes) == {"tokens", "targets", "loss_weights", "segment_ids", "positions"}
  assert {s.shape for s in shapes.values()} == {(8, 256)}


def test_memory_of_a_step_on_pretended_devices():
  c = lower.resolve(config.load(LLAMA, SMALL)[0])
  where = mesh.make(c.mesh)
  parts = loop.build(c, where)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(parts.state["params"]))
  small = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(parts.state["params"])
                  if len(x.shape) == 1 or x.shape[-1] == x.shape[0])
  got = lower.device_bytes(parts.state["params"])
  assert 4 * count / 8 <= got <= 4 * count / 8 + 4 * small + 20_000
  assert lower.device_bytes(parts.state["opt"]) >= 2 * got


def test_a_plan_needs_a_vocabulary_but_no_data():
  with pytest.raises(UserError, match=r"--config\.model\.vocab_size=N"):
    lower.resolve(config.base())


OOM = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.
Largest program allocations in hbm:

  1. Size: 3.91G
     Operator: op_name="jit(train_step)/jvp(Transformer)/Transformer._head/...D,DV->...V/dot_general" source_file="x.py"
     Shape: f32[8,4096,32000]{2,1,0:T(8,128)}
     Unpadded size: 3.91G
     ==========================

  2. Size: 500.0M
     Operator: op_name="state[\\'opt\\'][0].mu[\\'layers\\'][\\'mlp\\'][\\'up\\']"
     Shape: f32[2,256,512]{2,1,0}
"""


def test_out_of_memory_is_said_in_words_of_the_config():
  error = lower.read_out_of_memory(OOM, 0)
  assert error.needed == int(20.5 * 2**30) and error.limit == int(15.75 * 2**30)
  assert [b.bytes for b in error.buffers] == [int(3.91 * 2**30), 500 << 20]
  c = lower.resolve(config.load(LLAMA, SMALL)[0])
  text = "\n".join(explain.out_of_memory(error, c, topology.parse("v5e-16")))
  assert "15.75 GiB, the step needs 20.50 GiB" in text
  assert "logits and their gradient: Transformer/Transformer._head" in text and "optim.accumulate" in text
  assert "optimizer state" in text
  other = lower.read_out_of_memory("the total memory required for HLO temporaries (1.00T) exceeds "
                                   "available HBM (31.24G).", 0)
  assert (other.needed, other.limit) == (1 << 40, int(31.24 * 2**30))


def figures(**collectives):
  return {"collectives": [
      {"opcode": name.replace("_", "-"), "dtype": "bf16", "phase": "exposed", "calls": calls,
       "bytes": size} for name, (calls, size) in collectives.items()]}


def test_a_budget_of_communication_is_written_and_then_kept(tmp_path, capsys):
  path = tmp_path / "golden.json"
  assert golden.check(path, figures(all_gather=(10, 2e9))) == 0
  assert golden.check(path, figures(all_gather=(10, 2.01e9))) == 0
  assert golden.check(path, figures(all_gather=(10, 2e9), all_reduce=(4, 1e9))) == 1
  out = capsys.readouterr().out
  assert "all-reduce bf16: 0 calls, 0.000 GB in the budget; now 4 calls, 1.000 GB" in out
  assert golden.check(path, figures(all_gather=(20, 2e9))) == 1
  path.write_text("[3]")
  with pytest.raises(UserError, match="no communication budget"):
    golden.check(path, figures())


def test_causal_attention_computes_half_and_a_window_less():
  c = config.load(LLAMA, ["--config.data.seq_len=4096"])[0]
  assert report.visible_share(c) == (4096 + 512) / 8192
  c.model.window, c.model.attention_pattern = 512, ("local", "global")
  assert report.visible_share(c) == (0.25 + 0.5625) / 2


@pytest.mark.slow
def test_a_plan_of_a_small_model(tmp_path, capsys):
  pytest.importorskip("libtpu")
  out, budget = tmp_path / "plan.json", tmp_path / "golden.json"
  args = dict(price=1.2, out=out, golden=budget)
  assert command.plan(LLAMA, SMALL, "v5e-8", **args) == 0
  f = json.loads(out.read_text())
  assert f["attention"] == "splash" and f["mesh"]["fsdp"] == 8 and f["memory"]["fits"]
  # Nothing but attention is computed again: forward and two kernels backward, in two layers.
  assert {name.split("_seg")[0]: calls for name, calls in f["kernels"].items()} == {
      "splash_mha_fwd": 4, "splash_mha_dq": 2, "splash_mha_dkv": 2}
  text = capsys.readouterr().out
  assert "fits" in text and "chip-hours" in text and "cost" in text
