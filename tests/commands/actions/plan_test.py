"""Files and options of a plan are checked before minutes are spent on compiling."""

import pytest

from jaxgpt.commands.actions import plan
from jaxgpt.commands.plan import PlanOptions
from jaxgpt.errors import UserError
from jaxgpt.plan import lower, report
from jaxgpt.plan.search import search

CONFIG = "configs/llama3_8b.py:llama2_7b"
WHERE = CONFIG, [], "v5e-8"


@pytest.fixture
def compiling(monkeypatch):
  """Whether the plan came to compile."""
  calls = []

  def compile(*_, **__):
    calls.append("compiled")
    raise UserError("compiled")

  monkeypatch.setattr(lower, "compile_step", compile)
  monkeypatch.setattr(search, "search", compile)
  monkeypatch.setattr(plan.topology_lib, "devices", lambda _: [])
  return calls


@pytest.mark.parametrize("field", ["figures", "new_golden", "program", "step"])
@pytest.mark.parametrize("place", ["", "missing/plan.json"])
def test_files_that_cannot_be_written_are_found_before_compiling(field, place, tmp_path, compiling):
  outputs = plan.Outputs(**{field: tmp_path / place})
  for run in (lambda: plan.plan(*WHERE, outputs), lambda: plan.here(CONFIG, [], outputs)):
    with pytest.raises(UserError, match=r"cannot be written \((it is a|there is no) folder"):
      run()
  assert not compiling


def test_a_search_checks_its_file_first(tmp_path, compiling):
  with pytest.raises(UserError, match="cannot be written"):
    plan.search(*WHERE, out=tmp_path)
  assert not compiling
  with pytest.raises(UserError, match="compiled"):
    plan.search(*WHERE, out=tmp_path / "plans.json")
  assert not list(tmp_path.iterdir())


def test_a_budget_is_not_compared_with_itself(tmp_path, compiling):
  golden, other = tmp_path / "golden.json", tmp_path / "other.json"
  golden.write_text("{}")
  same = plan.Outputs(golden=golden, new_golden=tmp_path / "." / "golden.json")
  with pytest.raises(UserError, match=r"--golden and --write-golden name the same file"):
    plan.plan(*WHERE, same)
  assert not compiling and golden.read_text() == "{}"
  with pytest.raises(UserError, match="compiled"):
    plan.plan(*WHERE, plan.Outputs(golden=golden, new_golden=other))


def test_the_report_is_printed_before_files_are_written(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(lower, "compile_step", lambda *_, **__: None)
  monkeypatch.setattr(lower, "text", lambda _: "program")
  monkeypatch.setattr(report, "figures", lambda *_: {"memory": {"fits": True}})
  monkeypatch.setattr(report, "table", lambda _: ["the table"])
  path = tmp_path / "program.txt"

  def full(*_):
    raise UserError("the disk is full")

  monkeypatch.setattr(plan, "_write", full)
  with pytest.raises(UserError, match="disk is full"):
    plan.plan(*WHERE, plan.Outputs(program=path))
  assert "the table" in capsys.readouterr().out


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_is_not_negative_and_finite(price):
  with pytest.raises(UserError, match="price"):
    PlanOptions(config="x", topology="v5e-8", price=price)
  assert PlanOptions(config="x", topology="v5e-8", price=0.0).price == 0
