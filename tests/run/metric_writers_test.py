"""Metric writers: which are open, and what they leave."""

import csv
import json
import resource
import sys
import threading
import time

import pytest
from tensorboardX.proto import event_pb2

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


class Losses(metric_writers.MetricWriter):
  def __init__(self, run):
    self._path = run.folder / "losses.txt"

  def write(self, step, kind, metrics):
    with self._path.open("a") as f:
      f.write(f"{step},{kind},{metrics['loss']}\n")


def test_a_registered_writer_is_turned_on_by_its_option(tmp_path, monkeypatch):
  entry = metric_writers.Entry(
    Losses, wanted=lambda c: c.log.options.get("losses", False), options=("losses",)
  )
  monkeypatch.setitem(metric_writers.WRITERS._entries, "losses", entry)
  for c in (resolved(), resolved(**{"options.losses": True})):
    writers = metric_writers.make(c, tmp_path, 0)
    writers.write(1, "train", {"loss": 2.5})
    writers.close()
  assert (tmp_path / "losses.txt").read_text() == "1,train,2.5\n"
  with pytest.raises(
    UserError, match="log.options.loses: no metric writer reads it; did you mean 'losses'"
  ):
    metric_writers.make(resolved(**{"options.loses": True}), tmp_path, 0)


def test_the_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metric_writers.opening.distributed, "is_first", lambda: False)
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


# ---- what each writer gives back ----

LOGGED = [
  (1, "train", {"loss": 2.5, "lr": 1 / 3, "tokens": 20480.0}),
  (1, "validation", {"loss": 2.25, "task/rouge": 0.1 + 0.2}),
  (2, "train", {"loss": 1e-30, "lr": 123456789.123, "tokens": 20480.0}),
]


def log(folder, logged=LOGGED, start=0, **changes):
  writers = metric_writers.make(resolved(**changes), folder, start)
  for step, kind, metrics in logged:
    writers.write(step, kind, metrics)
  writers.close()


def test_csv_gives_back_every_number(tmp_path):
  log(tmp_path, csv=True)
  with (tmp_path / metric_writers.CSV).open(newline="") as file:
    found = [
      (int(r["step"]), r["kind"], r["metric"], float(r["value"])) for r in csv.DictReader(file)
    ]
  assert found == [(s, k, name, v) for s, k, metrics in LOGGED for name, v in metrics.items()]


def test_csv_drops_the_lines_of_repeated_steps_and_of_a_kill(tmp_path):
  log(tmp_path, csv=True)
  with (tmp_path / metric_writers.CSV).open("a") as file:
    file.write("2,train,lo")
  log(tmp_path, [(2, "train", {"loss": float("nan")})], start=1, csv=True)
  last = (tmp_path / metric_writers.CSV).read_text().splitlines()[5:]
  assert last == ["1,validation,task/rouge,0.30000000000000004", "2,train,loss,"]


def test_tensorboard_gives_back_every_number(tmp_path):
  log(tmp_path, tensorboard=True)
  (path,) = (tmp_path / "tensorboard").iterdir()
  found, texts = {}, []
  data = path.read_bytes()
  while data:  # records: length, its checksum, an event, its checksum
    size = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]
    for value in event.summary.value:
      if value.HasField("tensor"):
        texts.append((value.tag, value.tensor.string_val[0].decode()))
      else:
        found[event.step, value.tag] = value.simple_value
  assert found == {
    (s, f"{kind}/{name}"): pytest.approx(v, rel=1e-7)
    for s, kind, metrics in LOGGED
    for name, v in metrics.items()
  }
  assert texts[0][0].startswith("config") and "`train.steps`: `10`" in texts[0][1]


def test_mlflow_gives_back_every_number(tmp_path):
  mlflow = pytest.importorskip("mlflow", reason="pip install -e '.[mlflow]'")
  uri = f"file:{tmp_path}/mlruns"
  log(tmp_path, mlflow=uri)
  client = mlflow.MlflowClient(tracking_uri=uri)
  (experiment,) = [e for e in client.search_experiments() if e.name == "jaxgpt"]
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.data.params["train.steps"] == "10" and run.info.status == "FINISHED"
  found = {
    (m.step, name): m.value
    for name in run.data.metrics
    for m in client.get_metric_history(run.info.run_id, name)
  }
  assert found == {(s, f"{k}/{n}"): v for s, k, metrics in LOGGED for n, v in metrics.items()}


SAMPLES = [metric_writers.Sample("one", "<b>two</b>\nthree"), metric_writers.Sample("", "four")]


def test_trackers_take_samples(tmp_path, monkeypatch):
  pytest.importorskip("mlflow", reason="pip install -e '.[mlflow]'")
  pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  uri = f"file:{tmp_path}/mlruns"
  writers = metric_writers.make(
    resolved(tensorboard=True, mlflow=uri, wandb="a-project"), tmp_path, 0
  )
  writers.write_samples(3, SAMPLES)
  writers.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"samples/0" in events.read_bytes() and b"    <b>two</b>\n    three" in events.read_bytes()
  (text,) = (tmp_path / "mlruns").rglob("samples/3.md")
  assert "    <b>two</b>\n    three" in text.read_text() and "    four" in text.read_text()
  (table,) = (tmp_path / "wandb").rglob("*.table.json")
  assert json.loads(table.read_text())["data"] == [list(one) for one in SAMPLES]


def leveldb_records(data):
  """The records of a log in LevelDB's format, whose file has a header of 7 bytes."""
  at, parts = 7, b""
  while at + 7 <= len(data):
    size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    left = 32768 - at % 32768  # in this block
    if kind == 0 or left < 7:
      at += left
      continue
    parts += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # whole, or the last piece
      yield parts
      parts = b""


def test_wandb_offline_gives_back_every_number(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
  from wandb.proto import wandb_internal_pb2

  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  log(tmp_path, wandb="a-project")
  (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
  found, ended, began = {}, False, time.monotonic()
  while not ended and time.monotonic() < began + 30:  # its process writes when it likes
    for data in leveldb_records(path.read_bytes()):
      record = wandb_internal_pb2.Record.FromString(data)
      items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
      step = items.pop("step", None)
      found |= {(step, name): v for name, v in items.items() if not name.startswith("_")}
      ended |= record.HasField("exit")
  assert found == {(s, f"{k}/{n}"): v for s, k, metrics in LOGGED for n, v in metrics.items()}


def test_a_writer_that_cannot_be_opened_is_said_and_the_others_go_on(tmp_path, monkeypatch, capsys):
  def unreachable(run):
    raise ConnectionError("no route to host")

  entry = metric_writers.Entry(unreachable, wanted=lambda c: bool(c.log.mlflow))
  monkeypatch.setitem(metric_writers.WRITERS._entries, "mlflow", entry)
  log(tmp_path, mlflow="http://nowhere")
  assert len(lines(tmp_path)) == 3
  assert (
    "mlflow can't be opened, and the run goes on without it: Connection" in capsys.readouterr().err
  )


@pytest.mark.parametrize("key", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, key):
  monkeypatch.setitem(sys.modules, key, None)
  with pytest.raises(UserError, match=rf"log\.{key}='x' needs {key}.*jaxgpt\[{key}\]"):
    metric_writers.make(resolved(**{key: "x"}), tmp_path, 0)
