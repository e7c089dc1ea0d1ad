"""The arithmetic of memory beside what libtpu allocated (tests/benchmarks/plan_memory.py)."""

import json
import pathlib

import pytest

from jaxgpt import config
from jaxgpt.plan import lower, memory_estimate, topology

COMPILED = json.loads((pathlib.Path(__file__).parent / "memory_estimate.json").read_text())


def error(entry):
  """How far the arithmetic is from the compiled figure, as a share of it."""
  c = lower.resolve(config.load(entry["config"], entry["overrides"])[0])
  got = memory_estimate.total(c, topology.parse(entry["topology"]).num_devices)
  return got / entry["total"] - 1


@pytest.fixture(scope="module")
def errors():
  return {name: error(entry) for name, entry in COMPILED.items() if entry["memory"]}


def test_memory_by_arithmetic_is_near_the_compilers(errors):
  worst = sorted(errors, key=lambda name: -abs(errors[name]))
  report = "\n".join(f"{errors[name]:+7.1%}  {name}" for name in worst)
  print(report)
  assert len(errors) >= 67
  assert abs(errors[worst[0]]) <= 0.1, report


def test_the_figures_are_of_many_kinds(errors):
  chips = {topology.parse(COMPILED[name]["topology"]).chip.name for name in errors}
  flags = [flag for name in errors for flag in COMPILED[name]["overrides"]]
  assert chips >= {"v4", "v5e", "v5p", "v6e"}
  for key in (
    "mesh.tensor",
    "mesh.seq",
    "mesh.expert",
    "mesh.data",
    "optim.accumulate",
    "optim.name",
    "objective.name",
    "objective.loss_chunk",
  ):
    assert any(flag.startswith(f"--config.{key}=") for flag in flags), key
  assert len({flag for flag in flags if "model.remat" in flag}) >= 9
  assert len({entry["libtpu"] for entry in COMPILED.values()}) == 1
