"""`jaxgpt sweep` and `jaxgpt coordinate-check`, as a user types them."""

import json
import shutil

import pytest

from jaxgpt.commands import main

SWEEP = """
from jaxgpt.analysis.sweep import Sweep

def get_sweep():
  return Sweep(base={base!r}, grid={{"optim.b1": (0.8, 0.9)}})
"""


def run(capsys, *args):
  code = main.main([str(arg) for arg in args])
  return code, *capsys.readouterr()


@pytest.fixture
def sweep(trained, tmp_path):
  """Arguments of a sweep of two runs, the second like the trained one."""
  (tmp_path / "sweep.py").write_text(SWEEP.format(base=str(trained / "config.json")))
  return ("sweep", f"--config={tmp_path / 'sweep.py'}", f"--workdir={tmp_path / 'out'}")


def test_runs_by_index_and_a_table(sweep, trained, tmp_path, capsys):
  code, out, _ = run(capsys, *sweep, "--list")
  assert code == 0 and [line.split()[1] for line in out.splitlines()] == [
    "b1=0.8,seed=0",
    "b1=0.9,seed=0",
  ]
  shutil.copytree(trained, tmp_path / "out" / "runs" / "b1=0.9,seed=0")
  code, out, _ = run(capsys, *sweep, "--index=1")
  assert code == 0 and "run 1 of 2" in out and "all 8 steps are done" in out
  code, out, _ = run(capsys, *sweep, "--only-table")
  assert code == 0 and "the sweep is not done" in out and "1 not done" in out
  found = json.loads((tmp_path / "out" / "table.json").read_text())
  assert not found["complete"] and found["rows"][0]["setting"] == {"optim.b1": 0.9}
  assert found["rows"][0]["step"] == 8 and found["rows"][1]["median"] is None
  assert "best: jaxgpt train" in out and "--config.optim.b1=0.9" in out
  assert (tmp_path / "out" / "plot.svg").read_text().startswith("<svg")
  (tmp_path / "out" / "runs" / "old").mkdir()
  assert "not in the table: old" in run(capsys, *sweep, "--only-table")[1]


def test_a_run_of_another_config_is_no_run_of_the_sweep(sweep, trained, tmp_path, capsys):
  shutil.copytree(trained, tmp_path / "out" / "runs" / "b1=0.9,seed=0")
  for args in ((), ("--only-table",), ("--index=1",)):
    code, _, err = run(capsys, *sweep, *args, "--config.optim.b2=0.6")
    assert code == 2 and "optim.b2 was" in err and "is 0.6; take another --workdir" in err
  assert run(capsys, *sweep, "--only-table", "--config.log.every=1")[0] == 0, "it changes no result"


def test_a_run_that_is_done_after_all_has_not_failed(sweep, trained, tmp_path, capsys):
  shutil.copytree(trained, tmp_path / "out" / "runs" / "b1=0.9,seed=0")
  record = tmp_path / "out" / "failed" / "b1=0.9,seed=0.json"
  record.parent.mkdir()
  record.write_text('{"kind": "failed", "message": "disk full"}')
  assert run(capsys, *sweep, "--index=1")[0] == 0 and not record.exists()


def test_mistakes_are_refused_before_anything_runs(sweep, tmp_path, capsys):
  for args, words in (
    (("--index=2",), "--index=2: the sweep has runs 0 to 1"),
    (("--list", "--only-table"), "exclude each other"),
    (("--config.optim.b1=1",), "the sweep gives 'optim.b1' itself"),
    (("--config.optim.b2=2",), "run b1=0.8,seed=0: optim.b2=2"),
    (("--only-table", "--x=b2"), "--x=b2: not a key of this sweep"),
  ):
    code, _, err = run(capsys, *sweep, *args)
    assert code == 2 and words in err, err
  assert not (tmp_path / "out" / "runs").exists()


def test_coordinate_check_wants_widths_or_depths(trained, capsys):
  check = ("coordinate-check", f"--config={trained / 'config.json'}")
  assert "one of the two" in run(capsys, *check)[2]
  code, _, err = run(capsys, *check, "--widths=32,33")
  assert code == 2 and "gives no whole number at this width" in err
  assert "at least two, rising" in run(capsys, *check, "--depths=2")[2]
