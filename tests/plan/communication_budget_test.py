"""Budgets of communication: what each axis of the mesh moves, and that a lost rule is noticed."""

import json
import pathlib

import jax
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.commands.actions import plan
from jaxgpt.config import mesh_rules
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh, sharding
from jaxgpt.plan import communication_budget, cost, hlo, lower
from jaxgpt.training import build as build_lib
from jaxgpt.training import train_step

BUDGETS = pathlib.Path(__file__).parent / "communication_budgets"
SMALL = {
  "model.num_layers": 2,
  "model.width": 256,
  "model.num_heads": 2,
  "model.num_kv_heads": 2,
  "model.mlp_width": 512,
  "model.vocab_size": 1024,
  "model.head_dim": 128,
  "data.seq_len": 256,
  "data.batch_size": 8,
}
EXPERTS = {"model.moe.experts": 4, "model.moe.capacity": 1.25}
# axis -> (preset, overrides, the rule that is taken away)
AXES = {
  "fsdp": ("llama2_7b", {"mesh.fsdp": 4}, "embed"),
  "tensor": ("llama2_7b", {"mesh.fsdp": 2, "mesh.tensor": 2, "model.mlp_width": 1536}, "mlp"),
  "expert": ("mixtral_8x7b", EXPERTS | {"mesh.fsdp": 2, "mesh.expert": 2}, "experts"),
  "exchange": (
    "mixtral_8x7b",
    {"model.moe.experts": 8, "mesh.fsdp": 2, "mesh.expert": 2},
    "experts",
  ),
  "seq": ("llama2_7b", {"mesh.fsdp": 2, "mesh.seq": 2, "data.seq_len": 512}, "length"),
}


def plan_of(axis):
  preset, values, _ = AXES[axis]
  return f"configs/llama3_8b.py:{preset}", [
    f"--config.{k}={v}" for k, v in (SMALL | values).items()
  ]


def figures(**collectives):
  return {
    "estimate": "schedule",
    "collectives": [
      {
        "opcode": name.replace("_", "-"),
        "dtype": "bf16",
        "phase": "exposed",
        "calls": calls,
        "bytes": size,
      }
      for name, (calls, size) in collectives.items()
    ],
  }


def test_a_budget_of_communication_is_written_and_then_kept(tmp_path, capsys):
  path = tmp_path / "golden.json"
  with pytest.raises(UserError, match=r"--golden=.*golden.json: no such file; .*--write-golden=.*"):
    communication_budget.check(path, figures(all_gather=(10, 2e9)))
  communication_budget.write(path, figures(all_gather=(10, 2e9)))
  assert communication_budget.check(path, figures(all_gather=(10, 2.01e9))) == 0
  assert communication_budget.check(path, figures(all_gather=(10, 2e9), all_reduce=(4, 1e9))) == 1
  out = capsys.readouterr().out
  assert "all-reduce bf16: 0 calls, 0.000 GB in the budget; now 4 calls, 1.000 GB" in out
  assert communication_budget.check(path, figures(all_gather=(20, 2e9))) == 1
  path.write_text("[3]")
  with pytest.raises(UserError, match="is not a communication budget"):
    communication_budget.check(path, figures())
  with pytest.raises(UserError, match="cannot be written: Is a directory"):
    communication_budget.write(tmp_path, figures())
  gpu = figures(all_gather=(10, 2e9)) | {"estimate": "roofline"}
  communication_budget.write(tmp_path / "gpu.json", gpu)
  assert "jax-cuda13-plugin" in json.loads((tmp_path / "gpu.json").read_text())["compilers"]


def test_of_another_compiler_all_bytes_are_compared(tmp_path, capsys, monkeypatch):
  path = tmp_path / "golden.json"
  monkeypatch.setattr(communication_budget, "compilers", lambda _: {"libtpu": "1"})
  communication_budget.write(path, figures(all_gather=(10, 2e9)))
  monkeypatch.setattr(communication_budget, "compilers", lambda _: {"libtpu": "2"})
  assert (
    communication_budget.check(path, figures(all_gather=(4, 1e9), collective_permute=(99, 0.9e9)))
    == 0
  )
  assert "the budget is from libtpu 1, this program from libtpu 2" in capsys.readouterr().out
  assert communication_budget.check(path, figures(all_gather=(10, 1.7e9))) == 1
  assert "all collectives: 2.000 GB in the budget; now 1.700 GB" in capsys.readouterr().out


def lose(axis, monkeypatch):
  """The override that takes an axis's rule away; of a row that no config may change, a patch."""
  rule = AXES[axis][2]
  if rule not in mesh_rules.FIXED:
    return [f"--config.mesh.rules.{rule}=none"]
  monkeypatch.setitem(mesh_rules.FIXED, rule, mesh_rules.FixedRule((), ""))
  left = tuple((name, () if name == rule else axes) for name, axes in sharding.FIXED.table)
  monkeypatch.setattr(sharding, "FIXED", sharding.Rules(left))
  return []


def budget_on_fake_devices(axis, overrides=()):
  path, given = plan_of(axis)
  c = lower.resolve(config.load(path, [*given, *overrides])[0])
  where = mesh.make(c.mesh, jax.devices()[:4])
  parts = build_lib.build(c, where)
  step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  compiled = train_step.compile(step, parts.state, lower.batch_shapes(c), where)
  found = cost.of_program(hlo.parse(compiled.as_text())).collectives
  return communication_budget.budget(
    {
      "collectives": [
        {"opcode": opcode, "dtype": dtype, "calls": calls, "bytes": size}
        for (opcode, dtype, _), (calls, size) in found.items()
      ]
    }
  )


@pytest.mark.parametrize(
  "axis", ["fsdp", *(pytest.param(axis, marks=pytest.mark.slow) for axis in AXES if axis != "fsdp")]
)
def test_a_lost_rule_breaks_the_budget_of_fake_devices(axis, monkeypatch):
  want = budget_on_fake_devices(axis)
  assert want
  got = budget_on_fake_devices(axis, lose(axis, monkeypatch))
  assert list(communication_budget.differences(want, got))
  assert list(communication_budget.differences(want, got, same_compiler=False))


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
def test_a_lost_rule_breaks_the_golden_budget_of_a_tpu(axis, monkeypatch, capsys):
  pytest.importorskip("libtpu")
  path = BUDGETS / f"{axis}.json"
  before = path.read_text()
  file, given = plan_of(axis)
  run = lambda more: plan.plan(file, [*given, *more], "v5e-4", plan.Outputs(golden=path))
  assert run([]) == 0, capsys.readouterr().out
  assert run(lose(axis, monkeypatch)) == 1
  assert path.read_text() == before
  stored = json.loads(before)["collectives"]
  assert stored and all(np.isfinite(entry["bytes"]) for entry in stored.values())
