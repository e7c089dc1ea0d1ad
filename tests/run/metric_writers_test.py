"""Metric writers: which are open, and what they leave."""

import json
import resource
import threading

import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.run import metric_writers


def resolved(**changes):
  c = config.base()
  c.train.steps = 10
  c.schedule.warmup_steps = 0
  c.update_from_flattened_dict({f"log.{key}": value for key, value in changes.items()})
  return config.resolve(c, vocab_size=8)


def lines(folder):
  return [json.loads(x) for x in (folder / metric_writers.JSONL).read_text().splitlines()]


def test_metrics_go_to_the_terminal_and_a_file(tmp_path, capsys):
  writers = metric_writers.make(resolved(), tmp_path, 0)
  writers.write(1, "train", {"loss": 2.5, "lr": 1e-3, "step_time": 2.0})
  writers.write(1, "validation", {"loss": 2.25})
  assert writers.newest(1, "validation") == {"step": 1, "kind": "validation", "loss": 2.25}
  assert writers.newest(2, "validation") is None
  writers.close()
  assert lines(tmp_path)[0] == {
    "step": 1,
    "kind": "train",
    "loss": 2.5,
    "lr": 1e-3,
    "step_time": 2.0,
  }
  said = capsys.readouterr().out
  assert "train      step 1/10  loss 2.5000  lr 1.00e-03  ETA 0:18" in said
  assert "validation step 1/10  loss 2.2500" in said
  assert not (tmp_path / "tensorboard").exists()


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
  writers = metric_writers.make(resolved(), tmp_path, 0)
  for step in (1, 2, 3):
    writers.write(step, "train", {"loss": float(step)})
  writers.close()
  with (tmp_path / metric_writers.JSONL).open("a") as f:
    f.write('{"step": 4, "ki')  # cut short by a kill
  writers = metric_writers.make(resolved(), tmp_path, 2)
  assert writers.newest(2, "train")["loss"] == 2.0
  writers.write(3, "train", {"loss": 7.0})
  writers.close()
  assert [(r["step"], r["loss"]) for r in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 7.0)]


def test_tensorboard_is_turned_on_by_the_config(tmp_path):
  writers = metric_writers.make(resolved(tensorboard=True), tmp_path, 0)
  writers.write(1, "train", {"loss": 2.5})
  writers.close()
  assert list((tmp_path / "tensorboard").iterdir())


def test_a_line_that_the_disk_does_not_take_is_written_later_and_never_in_parts(tmp_path, capsys):
  writers = metric_writers.make(resolved(), tmp_path, 0)
  path = tmp_path / metric_writers.JSONL
  writers.write(1, "train", {"loss": 1.0})
  unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, unlimited[1]))
  try:
    for step in (2, 3):
      writers.write(step, "train", {"loss": 1.0})
      assert [r["step"] for r in lines(tmp_path)] == [1]
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
  writers.write(4, "train", {"loss": 1.0})
  writers.close()
  assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3, 4]
  err = capsys.readouterr().err
  assert err.count("metrics.jsonl cannot be written") == 1 and "Jsonl works again" in err


def test_tensorboard_goes_on_in_a_new_file_after_its_thread_has_died(tmp_path, monkeypatch, capsys):
  run = metric_writers.Run(resolved(), tmp_path, 0)
  board = metric_writers.TensorBoard(run)

  def full(event):
    raise OSError("No space left on device")

  monkeypatch.setattr(threading, "excepthook", lambda args: None)
  monkeypatch.setattr(board._writer.file_writer.event_writer._ev_writer, "write_event", full)
  writers = metric_writers.Writers(board)
  while "TensorBoard fails" not in capsys.readouterr().err:  # the thread dies when it likes
    writers.write(1, "train", {"loss": 2.5})
  writers.write(2, "train", {"loss": 2.5})
  writers.close()
  assert "TensorBoard works again" in capsys.readouterr().err
  assert len(list((tmp_path / "tensorboard").iterdir())) == 2


class Csv(metric_writers.MetricWriter):
  def __init__(self, run):
    self._path = run.folder / "metrics.csv"

  def write(self, step, kind, metrics):
    with self._path.open("a") as f:
      f.write(f"{step},{kind},{metrics['loss']}\n")


def test_a_registered_writer_is_turned_on_by_its_option(tmp_path, monkeypatch):
  entry = metric_writers.Entry(
    Csv, wanted=lambda c: c.log.options.get("csv", False), options=("csv",)
  )
  monkeypatch.setitem(metric_writers.WRITERS._entries, "csv", entry)
  for c in (resolved(), resolved(**{"options.csv": True})):
    writers = metric_writers.make(c, tmp_path, 0)
    writers.write(1, "train", {"loss": 2.5})
    writers.close()
  assert (tmp_path / "metrics.csv").read_text() == "1,train,2.5\n"
  with pytest.raises(
    UserError, match="log.options.cvs: no metric writer reads it; did you mean 'csv'"
  ):
    metric_writers.make(resolved(**{"options.cvs": True}), tmp_path, 0)


def test_the_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metric_writers.distributed, "is_first", lambda: False)
  writers = metric_writers.make(resolved(), tmp_path, 0)
  writers.write(1, "train", {"loss": 2.5})
  assert writers.newest(1, "train") is None
  writers.flush()
  writers.close()
  assert not list(tmp_path.iterdir())


def test_the_file_is_json_also_where_a_metric_is_not_finite(tmp_path):
  writers = metric_writers.make(resolved(), tmp_path, 0)
  writers.write(1, "validation", {"loss": 800.0, "perplexity": float("inf")})
  writers.write(2, "validation", {"loss": float("nan")})
  writers.close()
  text = (tmp_path / metric_writers.JSONL).read_text()
  assert "Infinity" not in text and "NaN" not in text
  assert [(r["loss"], r.get("perplexity", 0)) for r in lines(tmp_path)] == [
    (800.0, None),
    (None, 0),
  ]
