"""Spikes of the loss: a run goes back, leaves out the batches at fault, and can be repeated."""

import json

import numpy as np
import pytest
from etils import epath

from jaxgpt import config
from jaxgpt.analysis import replay, reproduce
from jaxgpt.errors import UserError
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import run_folder, throughput
from jaxgpt.run.process import memory
from jaxgpt.run.provenance import rewinds as rewinds_lib
from jaxgpt.training import loop
from jaxgpt.training.loop import spikes
from tests.parallel import distributed_test as several

MEASURED = (*throughput.METRICS, *memory.METRICS)
# Step 12 destroys the weights of a run that takes it, so the loss of step 13 is high.
SCHEDULE = """import jax.numpy as jnp

from jaxgpt.training.schedules import Schedule

HIGH = {high}
Broken = Schedule(
  lambda c_schedule, steps: lambda step: jnp.where(jnp.isin(step, jnp.array({at})), HIGH, 1.0)
)
"""


@pytest.fixture
def spiking(tiny, tmp_path):
  """A function that makes a config with `high` times the peak learning rate at the steps `at`."""

  def make(at=(12,), high="1e3", **overrides):
    folder = tmp_path / "code"
    folder.mkdir(exist_ok=True)
    (folder / "broken.py").write_text(SCHEDULE.format(at=list(at), high=high))
    keys = dict(schedule__name="broken.py:Broken", code_folder=str(folder), train__steps=18)
    keys |= dict(schedule__warmup_steps=0, checkpoint__every=5, checkpoint__keep=9, log__every=4)
    keys |= dict(train__spike__factor=50.0, train__spike__window=6)
    return tiny(**(keys | overrides))

  return make


def train(c, folder, **asked):
  return loop.train(c, folder, config.flatten(c), **asked)


def result(folder):
  """The metrics that no clock made, and the digests of the last arrays."""
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  metrics = [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]
  (meta,) = (json.loads(p.read_text()) for p in folder.glob("checkpoints/18/meta/metadata"))
  return metrics, meta["digests"]


def rewinds(folder):
  return [(x.first, x.end) for x in rewinds_lib.of(run_folder.read_starts(folder))]


@pytest.mark.slow
def test_a_run_goes_back_and_equals_one_that_never_took_the_batches(spiking, tmp_path, capsys):
  c = spiking()
  run, straight, stopped = (tmp_path / name for name in ("run", "straight", "stopped"))
  assert train(c, run).step == 18
  out = capsys.readouterr().out
  assert "the loss of step 13 is " in out and "leaves out the batches of steps 12 to 13 " in out
  assert "(rewind 1 of at most 3)" in out and "resumes at step 10 of 18" in out
  assert rewinds(run) == [(12, 14)]
  metrics, arrays = result(run)
  trained = [x for x in metrics if x["kind"] == "train"]
  assert [x.get("skipped_steps") for x in trained] == [None, None, None, 2.0, None]
  assert [x.get("rewinds") for x in trained] == [None, None, None, 1, 1]
  assert all(x["loss"] < 6 for x in trained)
  given = rewinds_lib.of(run_folder.read_starts(run))
  train(c, straight, rewinds=given)  # it never takes step 12
  assert len(run_folder.read_starts(straight)) == 1
  assert result(straight) == (metrics, arrays)
  # Stopped after the weights were destroyed, and saved then; the loss shows it in the next start.
  train(c, stopped, until=13)
  assert 13 in checkpoints_lib.complete_steps(stopped / "checkpoints")
  train(c, stopped)
  assert result(stopped) == (metrics, arrays) and rewinds(stopped) == [(12, 14)]
  # A repetition and a replay leave out the same steps.
  found = reproduce.reproduce(epath.Path(run), tmp_path / "again")
  assert found.is_identical and len(run_folder.read_starts(tmp_path / "again")) == 1
  assert any("both leave out the batches of steps 12 to 13" in note for note in found.notes)
  assert replay.replay(run, 15).unequal() == []
  with pytest.raises(UserError, match="--step=12: the run left this step out"):
    replay.replay(run, 12)


@pytest.mark.slow
def test_a_run_ends_after_the_last_rewind(spiking, tmp_path):
  c = spiking(at=(8, 12, 15), train__spike__rewinds=1)
  with pytest.raises(spikes.SpikeError, match=r"step 13 is .*train.spike.rewinds=1 times already"):
    train(c, tmp_path / "run")
  assert rewinds(tmp_path / "run") == [(8, 10)]
  assert max(checkpoints_lib.complete_steps(tmp_path / "run" / "checkpoints")) == 10


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_a_spike(spiking, tmp_path, capsys):
  c = spiking(at=(3,), high="jnp.inf")
  assert train(c, tmp_path / "run").step == 18
  assert "step 3 is not finite: goes back and leaves" in capsys.readouterr().out
  assert rewinds(tmp_path / "run") == [(2, 4)], "from the beginning: there was no checkpoint yet"


@pytest.mark.slow
def test_without_a_checkpoint_before_it_the_run_ends(spiking, tmp_path):
  c = spiking(checkpoint__keep=1, checkpoint__every=1)
  with pytest.raises(spikes.SpikeError, match="no checkpoint before it is left to go back to"):
    train(c, tmp_path / "run")
  assert checkpoints_lib.complete_steps(tmp_path / "run" / "checkpoints") == [13]


@pytest.mark.slow
def test_several_processes_go_back_together(tmp_path, corpus):
  text = several.CONFIG.replace("c.train.steps = 8", "c.train.steps = 18")
  text = text.replace("c.schedule.warmup_steps = 2", "c.schedule.warmup_steps = 0")
  spike = 'c.schedule.name = "broken.py:Broken"; c.train.spike.update(dict(factor=50.0, window=6))'
  (tmp_path / "c.py").write_text(text.replace("  c.eval.update", f"  {spike}\n  c.eval.update"))
  (tmp_path / "broken.py").write_text(SCHEDULE.format(at=[12], high="1e3"))
  (tmp_path / "data").symlink_to(corpus)
  done = several.train(tmp_path, "run", 2)
  assert [code for code, _, _ in done] == [0, 0], done
  assert rewinds(tmp_path / "run") == [(12, 14)]
  losses = [line.get("loss") for line in several.lines(tmp_path, "run", "train")]
  assert losses[12:14] == [None, None] and max(losses[:12] + losses[14:]) < 6


def limit(losses, factor):
  losses = np.array(losses)
  median = np.median(losses)
  deviation = 1.4826 * np.median(np.abs(losses - median))
  return median + factor * max(deviation, 0.01 * abs(median))


def spike_keys(**keys):
  c = config.base().train.spike
  c.update(dict(factor=4.0, window=10, patience=3, before=2) | keys)
  return c


def test_a_spike_is_a_run_of_losses_far_above_the_median():
  c = spike_keys()
  rng = np.random.default_rng(0)
  losses = [*(3 + 0.1 * rng.normal(size=20)), 9.0, 9.0, *(3 + 0.1 * rng.normal(size=8)), 8.0, 7.0]
  detector = spikes.Detector(c)
  for step, loss in enumerate(losses):
    assert detector.add(step, loss) is None
    if step == 8:
      assert detector.limit() is None
    if step == 19:
      assert detector.limit() == pytest.approx(limit(losses[10:20], 4.0), rel=1e-12)
    if step == 22:  # the two were no spike: they count
      assert detector.limit() == pytest.approx(limit(losses[13:23], 4.0), rel=1e-12)
  again = spikes.Detector(c, json.loads(json.dumps(detector.state())))
  for each in (detector, again):
    found = each.add(len(losses), 9.5)
    assert (found.first, found.end, found.loss) == (30 - 2, 33, 9.5)
    assert found.limit == pytest.approx(limit(losses[20:30], 4.0), rel=1e-12)


def test_losses_that_are_almost_constant_have_a_least_deviation():
  detector = spikes.Detector(spike_keys(patience=1))
  for step in range(10):
    detector.add(step, 2.0)
  assert detector.limit() == pytest.approx(2.0 + 4 * 0.02)


def test_keys_without_effect_are_refused(tiny):
  with pytest.raises(UserError, match=r"train.spike.window=8: train.steps=8 has no step after"):
    config.resolve(tiny(train__spike__factor=5.0, train__spike__window=8))
