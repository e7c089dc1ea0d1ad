"""Runs are compared and listed by what they left behind."""

import json
import shutil

import pytest

from jaxgpt.analysis import compare_runs, curves, run_table
from jaxgpt.errors import UserError


def test_a_run_equals_itself(trained, tmp_path):
  shutil.copytree(trained, tmp_path / "copy")
  found = compare_runs.compare(trained, tmp_path / "copy")
  assert not (found.config or found.environment or found.data)
  assert found.curves.first_difference is None and found.curves.last == 8
  assert "equal to the bit in all 10 records" in "\n".join(compare_runs.lines(found))


def test_config_and_curves_that_differ_are_named(trained, other_trained):
  found = compare_runs.compare(trained, other_trained)
  changes = {c.key: (c.first, c.second) for c in found.config if c.matters}
  assert changes["optim.lr"] == (1e-2, 2e-2) and changes["train.steps"] == (8, 4)
  difference = found.curves.first_difference
  assert (difference.step, difference.metric, found.curves.before) == (1, "lr", 0)
  assert "optim.adam_lr" not in changes  # it follows from optim.lr
  assert found.figures["train loss"][0] != found.figures["train loss"][1]
  text = "\n".join(compare_runs.lines(found))
  assert "optim.lr: 0.01 and 0.02" in text and "no record before is equal" in text


def test_the_first_difference_of_metrics():
  def records(*losses, **more):
    return {("train", n): {"step": n, "loss": x} | more for n, x in enumerate(losses, 1)}

  a = records(3.0, 2.0, 1.0, tokens_per_second=1)
  assert curves.compare(a, records(3.0, 2.0, tokens_per_second=2)).first_difference is None
  a = records(3.0, 2.0, host_memory=1, device_memory=1)
  b = records(3.0, 2.0, host_memory=2, device_memory=2)
  assert curves.compare(a, b).first_difference is None
  a = records(3.0, 2.0, 1.0)
  found = curves.compare(a, records(3.0, 2.5, 0.0))
  assert (found.first_difference.step, found.before, found.largest) == (2, 1, (3, 1.0))
  assert found.first_difference.describe().endswith("2.0 and 2.5, a difference of 5.00e-01")
  assert curves.compare(a, records(3.0, 2.5, 0.0), until=1).first_difference is None


def test_data_that_differ_are_described(trained, tmp_path, corpus):
  shutil.copytree(trained, tmp_path / "run")
  path = tmp_path / "run" / "starts.jsonl"
  (tmp_path / "run" / "files.json").unlink()
  record = json.loads(path.read_text())
  path.write_text(json.dumps(record | {"data_digest": "0" * 64}) + "\n")
  found = compare_runs.compare(trained, tmp_path / "run")
  assert found.data[0].endswith("and 000000000000")


def test_the_table_of_runs(trained, other_trained, tmp_path):
  shutil.copytree(trained, tmp_path / "a" / "one")
  shutil.copytree(other_trained, tmp_path / "a" / "two")
  shutil.copytree(trained, tmp_path / "broken")
  (tmp_path / "broken" / "config.json").write_text("{")
  rows = {row.run: row for row in run_table.table(tmp_path)}
  one, two = rows["a/one"], rows["a/two"]
  assert (one.status, one.step, one.steps) == ("done", 8, 8)
  assert one.differs == {"optim.lr": 1e-2, "train.steps": 8} != two.differs
  assert one.loss < two.loss and one.bits_per_byte and one.tokens_per_second
  assert rows["broken"].status == "broken" and "config.json" in rows["broken"].note
  order = lambda *args: [row.run for row in run_table.table(tmp_path, *args)]
  assert order("loss") == ["a/one", "a/two", "broken"]
  assert order("loss", True) == ["a/two", "a/one", "broken"]
  assert order("optim.lr", True)[0] == "a/two"
  with pytest.raises(UserError, match="there are run, status"):
    order("los")
  with pytest.raises(UserError, match="holds no run"):
    run_table.table(tmp_path / "a" / "one" / "tokenizer")
  shutil.rmtree(tmp_path / "a" / "one" / "checkpoints" / "8")
  assert run_table.table(tmp_path / "a" / "one")[0].status == "stopped"
