"""Faults while a run trains: what was done is saved, what failed is said, and the run can go on."""

import errno
import json
import os
import re
import resource
import time

import jax
import numpy as np
import pytest
from etils import epath

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import metric_writers, resume, run_folder, throughput
from jaxgpt.run.process import memory
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import evaluation, loop, train_step
from jaxgpt.training.loop import saving, trouble

MEASURED = (*throughput.METRICS, *memory.METRICS)


def lines(folder):
  """What the run reported, without what a clock said."""
  text = (folder / metric_writers.JSONL).read_text()
  return [
    {k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in text.splitlines()
  ]


def train(c, folder):
  return loop.train(c, folder, config.flatten(c))


def steps(folder):
  return checkpoints_lib.complete_steps(folder / "checkpoints")


def same_weights(a, b):
  """Whether the last checkpoints of two runs have the same arrays, by their digests."""
  digests = [
    json.loads((folder / "checkpoints" / "8" / "meta" / "metadata").read_text())["digests"]
    for folder in (a, b)
  ]
  return digests[0] == digests[1]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
  """(config, folder) of a run of 8 steps that nothing disturbed."""
  c = tiny(eval__every=4, log__every=2, checkpoint__keep=100)
  folder = epath.Path(tmp_path_factory.mktemp("whole") / "run")
  train(c, folder)
  return c, folder


@pytest.fixture
def before_step(monkeypatch):
  """A function (step, action) that calls an action before the batch of a step is transferred."""
  real, actions, count = batches_lib.to_devices, {}, [0]

  def to_devices(batch, mesh):
    if jax.config.jax_transfer_guard == "disallow":  # else it is a batch of an evaluation
      count[0] += 1
      if count[0] in actions:
        actions.pop(count[0])()
    return real(batch, mesh)

  def at(step, action, start=0):
    count[0] = start
    actions[step] = action

  monkeypatch.setattr(batches_lib, "to_devices", to_devices)
  return at


def raising(error):
  def act(*args, **kwargs):
    raise error

  return act


def test_whatever_ends_a_run_its_steps_are_saved(whole, tmp_path, before_step, capsys, monkeypatch):
  """The data, an interrupt, an evaluation, a disk; then the run equals an undisturbed one."""
  c, folder = whole
  run = epath.Path(tmp_path / "run")
  before_step(3, raising(RuntimeError("the data broke")))
  with pytest.raises(RuntimeError, match="the data broke"):
    train(c, run)
  assert "the state after step 2 is saved, and the same command goes on" in capsys.readouterr().err
  before_step(4, raising(KeyboardInterrupt()), start=2)
  with pytest.raises(KeyboardInterrupt):
    train(c, run)
  with monkeypatch.context() as patch:
    patch.setattr(evaluation, "evaluate", raising(ValueError("the evaluation broke")))
    with pytest.raises(ValueError, match="the evaluation broke"):
      train(c, run)
  before_step(7, raising(OSError(errno.EIO, "Input/output error")), start=4)
  with pytest.raises(UserError, match="Input/output error; this may pass: run the same") as caught:
    train(c, run)
  assert caught.value.exit_code == 75, "a launcher starts the run again"
  assert steps(run) == [2, 3, 4, 6]
  assert train(c, run).step == 8
  assert lines(run) == lines(folder) and same_weights(run, folder)


def limit_files(size, after=None):
  """A function that lets no file of this process grow beyond a size, as a full disk would.

  Args:
    size: Bytes.
    after: A checkpoint that must be complete first.
  """

  def act():
    while after is not None and not after.exists():
      time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

  return act


@pytest.fixture
def unlimited():
  yield limit_files(resource.RLIM_INFINITY)
  limit_files(resource.RLIM_INFINITY)()


class Broken(metric_writers.MetricWriter):
  def write(self, step, kind, metrics):
    if step < 6:
      raise ConnectionError("the tracker does not answer")


def test_saves_and_metric_writers_that_fail_are_said_and_tried_again_and_the_run_goes_on(
  whole, tmp_path, before_step, unlimited, capsys, monkeypatch
):
  c, folder = whole
  c = config.from_dict(c.to_dict())
  c.checkpoint.every = 2
  run = epath.Path(tmp_path / "run")
  monkeypatch.setattr(saving, "_FIRST_PAUSE", 0.0)
  entry = metric_writers.Entry(lambda run: Broken())
  monkeypatch.setitem(metric_writers.WRITERS._entries, "broken", entry)
  before_step(3, limit_files(30_000, after=run / "checkpoints" / "2"))
  before_step(7, unlimited)
  assert train(c, run).step == 8
  err = capsys.readouterr().err
  assert "the checkpoint of step 4 could not be saved (OSError: [Errno 27] File too large)" in err
  assert "trying again at once; the newest is of step 2" in err and "saved again" in err
  assert err.count("Broken fails, and the run goes on: ConnectionError: the tracker does") == 1
  assert err.count("Broken works again") == 1
  assert 2 in steps(run) and 4 not in steps(run) and 8 in steps(run)
  assert lines(run) == lines(folder) and same_weights(run, folder)
  start = run_folder.read_starts(run)[-1]
  assert start["failed"] == 4 and start["saved"] == 8


def test_a_run_that_cannot_save_ends_if_its_config_says_so(
  whole, tmp_path, before_step, unlimited, capsys, monkeypatch
):
  c, _ = whole
  c = config.from_dict(c.to_dict())
  c.checkpoint.update(dict(every=1, on_failure="stop"))
  c.train.steps, c.log.every, c.eval.every = 100_000, 1000, 0  # a failed save is seen steps later
  run = epath.Path(tmp_path / "run")
  monkeypatch.setattr(saving, "_FIRST_PAUSE", 0.0)
  before_step(2, limit_files(30_000, after=run / "checkpoints" / "1"))
  with pytest.raises(UserError, match="can't save a checkpoint in .*make room") as caught:
    train(c, run)
  assert caught.value.exit_code == 75
  assert capsys.readouterr().err.count("could not be saved") == saving.MOST_FAILURES - 1
  unlimited()
  assert steps(run) == [1] and resume.find(run).step == 1
  assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"], "no half-written ones"
  checkpoints = checkpoints_lib.Checkpoints(run / "checkpoints", read_only=True)
  assert checkpoints.shapes("params")
  checkpoints.close()


def test_metrics_that_the_disk_never_took_are_an_error_of_a_run_that_is_done(
  whole, tmp_path, monkeypatch
):
  c, folder = whole
  run = epath.Path(tmp_path / "run")
  real = metric_writers.Jsonl._append

  def full_after_step_7(writer, file):
    if writer._newest.get("train", {}).get("step") == 8:
      raise OSError(errno.ENOSPC, "No space left on device")
    real(writer, file)

  monkeypatch.setattr(metric_writers.Jsonl, "_append", full_after_step_7)
  with pytest.raises(
    trouble.UnwrittenError, match=r"2 lines of .*metrics.jsonl could not"
  ) as caught:
    train(c, run)
  assert caught.value.exit_code == 75 and steps(run)[-1] == 8
  monkeypatch.setattr(metric_writers.Jsonl, "_append", real)
  train(c, run)
  assert [x for x in lines(folder) if (x["step"], x["kind"]) != (8, "train")] == lines(run)


class FullDisk:
  """Checkpoints that cannot be saved."""

  def save(self, *content):
    raise checkpoints_lib.SaveError(epath.Path("run"), OSError(errno.ENOSPC, "no space"))

  def wait(self):
    return None

  latest = wait

  def forget_failure(self):
    return 5


def test_the_last_save_does_not_wait_as_long_as_failures_of_hours_made_it(tmp_path, monkeypatch):
  pauses = []
  monkeypatch.setattr(time, "sleep", pauses.append)
  saver = saving.Saver(config.base().checkpoint, tmp_path, FullDisk(), None, dict)
  for _ in range(9):
    saver.save(lambda: ({}, {}))
  with pytest.raises(checkpoints_lib.SaveError):
    saver.finish(lambda: ({}, {}))
  assert pauses == [0, 5, 10, 20]


def test_after_failed_saves_metrics_are_no_proof_of_a_lost_checkpoint(whole, tmp_path):
  _, folder = whole
  run = epath.Path(tmp_path / "run")
  run.mkdir()
  for name in ("config.json", "metrics.jsonl"):
    (run / name).write_text((folder / name).read_text())
  text = json.loads((run / "config.json").read_text())
  text["config"]["checkpoint"]["every"] = 2
  (run / "config.json").write_text(json.dumps(text))
  start = run_folder.read_starts(folder)[0] | {"saved": 0, "config": {"checkpoint.every": 2}}
  for record, is_refused in ((start, True), (start | {"failed": 2}, False)):
    (run / "starts.jsonl").write_text(json.dumps(record) + "\n")
    if is_refused:
      with pytest.raises(UserError, match="checkpoints are gone"):
        resume.find(run)
    else:
      assert resume.find(run).step is None


def test_checkpoints_by_time_and_what_they_cost(whole, tmp_path, capsys, monkeypatch):
  c, _ = whole
  c = config.from_dict(c.to_dict())
  c.checkpoint.every_minutes = 1e-6
  monkeypatch.setattr(saving, "_ADVISED_AFTER", 0.0)
  before = time.monotonic()
  train(c, tmp_path / "run")
  assert steps(epath.Path(tmp_path / "run")) == list(range(1, 9))
  words = (
    r"checkpoints: 8 saves held up training for ([\d.]+) s .* checkpoint.every=\d+ loses least"
  )
  (seconds,) = re.findall(words, capsys.readouterr().out)
  assert 0 < float(seconds) < time.monotonic() - before


def test_the_best_interval_loses_least():
  """Against the expected loss per second: saves, and half an interval for each failure."""
  save, step, failure = 2.0, 0.5, 3600.0
  loss = lambda steps: save / (steps * step) + steps * step / 2 / failure
  best = saving.best_interval(save, step, failure)
  assert best == min(range(1, 2000), key=loss) == 240


def test_too_little_memory_is_answered_in_keys(whole, tmp_path, monkeypatch):
  c, _ = whole
  error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")
  monkeypatch.setattr(train_step, "first_state", raising(error))
  with pytest.raises(UserError, match="out of memory .*7 bytes.*state alone.*mesh.fsdp") as caught:
    train(c, tmp_path / "run")
  assert caught.value.exit_code == 2


def test_the_evidence_is_that_of_the_last_time_a_step_was_not_finite(tmp_path):
  """A run that goes on with a lower rate may end at the same step again."""
  for value in (1.0, 2.0):
    weights = jax.numpy.full((2,), value)
    state = {"step": 3, "nonfinite_step": 3, "params": {"a": weights}}
    trouble.dump(tmp_path, state, {"tokens": np.full(2, value)}, {"loss": value})
  abstract = {"params": {"a": jax.ShapeDtypeStruct((2,), "float32", sharding=weights.sharding)}}
  saved, _ = checkpoints_lib.Checkpoints(tmp_path / "state").restore(abstract)
  assert saved["params"]["a"].tolist() == [2.0, 2.0]
  assert json.loads((tmp_path / "metrics.json").read_text()) == {"loss": 2.0}
  assert np.load(tmp_path / "batch.npz")["tokens"].tolist() == [2.0, 2.0]


def test_bugs_keep_their_traceback():
  state = {"a": jax.ShapeDtypeStruct((2,), np.float32)}
  assert trouble.explained(TypeError("a bug"), state) is None
  assert trouble.explained(FileNotFoundError(errno.ENOENT, "gone"), state) is None
  wrapped = RuntimeError("in a thread")
  wrapped.__cause__ = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
  assert trouble.explained(wrapped, state).exit_code == 75
