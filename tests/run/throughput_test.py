"""Throughput between two log lines."""

import time as real_time

import pytest

from jaxgpt.run import throughput


class Clock:
  """A clock that the test sets."""

  now = 0.0

  def monotonic(self):
    return self.now

  def time(self):
    return self.now

  gmtime, strftime = staticmethod(real_time.gmtime), staticmethod(real_time.strftime)


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(throughput, "time", clock)
  return clock


def test_rates_leave_out_pauses_and_report_input_wait(clock):
  timer = throughput.Timer(flops_per_token=10.0, peak_flops=1000.0)
  timer.turn_to(throughput.STEPS)
  with timer.waiting():
    clock.now += 1
  clock.now += 3
  timer.step_done(tokens=40)
  timer.step_done(tokens=40)
  with timer.paused(throughput.SAVING):
    clock.now += 100
  assert timer.take() == {
    "tokens_per_second": 20.0,
    "step_time": 2.0,
    "input_wait": 0.25,
    "mfu": 0.2,
  }


def test_taking_resets_and_unknown_peaks_give_no_mfu(clock):
  timer = throughput.Timer(flops_per_token=10.0, peak_flops=None)
  timer.turn_to(throughput.STEPS)
  timer.step_done(tokens=8)
  clock.now += 2
  assert timer.take() == {"tokens_per_second": 4.0, "step_time": 2.0, "input_wait": 0.0}
  clock.now += 4
  timer.step_done(tokens=8)
  assert timer.take()["tokens_per_second"] == 2.0


def test_the_account_has_all_of_the_time(clock):
  clock.now = 60.0
  timer = throughput.Timer(began=52.5)
  clock.now += 2
  with timer.paused(throughput.RESTORE):
    clock.now += 3
  timer.turn_to(throughput.STEPS)
  with timer.paused(throughput.COMPILE):
    clock.now += 30
  timer.start()
  with timer.waiting():
    clock.now += 1
  clock.now += 5
  timer.take()
  with timer.paused(throughput.EVALUATION):
    clock.now += 4
    with timer.paused(throughput.SAVING):
      clock.now += 0.25
      assert timer.account()["seconds"]["saving"] == 0.25, "of a context that goes on"
  times = {"steps": 5.0, "input": 1.0, "compile": 30.0, "evaluation": 4.0, "saving": 0.25}
  assert timer.account() == {
    "began": "1970-01-01T00:00:52.500Z",
    "seconds": {**times, "sampling": 0.0, "restore": 3.0, "startup": 9.5},
  }
