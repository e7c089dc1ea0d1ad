"""The queue: runs that fail are recorded, processes that die are replaced, and the others go on."""

import os
import signal
import sys
import threading
import time

import pytest

from jaxgpt.analysis.sweep import Sweep, queue, state
from jaxgpt.analysis.sweep.members import Member, Plan

# Does what the name of the run says. 'dies once' leaves a file to know the second time by.
WORKER = """
import json, os, signal, sys, time
for line in sys.stdin:
  request = json.loads(line)
  name = os.path.basename(request["folder"])
  end, message = "done", ""
  if name == "diverges":
    end, message = "diverged", "step 3 is not finite"
  if name == "is stopped":
    end = "stopped"
  if name == "dies" or (name == "dies once" and not os.path.exists(request["log"])):
    open(request["log"], "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
  if name == "waits":
    open(request["log"], "w").close()
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pause()
    end = "stopped"
  print(json.dumps({"end": end, "message": message}), flush=True)
"""


@pytest.fixture
def trains(tmp_path):
  """A function (names, number of workers) -> ([(name, how it ended)], the queue)."""

  def train(names, workers=1):
    runs = [Member(name, {}, i, 0, (), 8) for i, name in enumerate(names)]
    ends = []
    found = queue.Queue(
      Plan(Sweep(), "base.py", runs, []),
      tmp_path,
      [sys.executable, "-S", "-c", WORKER],
      workers,
      lambda job, how: ends.append((job.member.name, how)),
    )
    found.run([queue.Job(run, 8) for run in runs])
    found.close()
    return ends, found

  return train


def failure(tmp_path, name):
  return state.read(tmp_path, Member(name, {}, 0, 0, (), 8), "loss").failure


def test_a_run_that_fails_is_named_and_the_others_go_on(trains, tmp_path):
  ends, found = trains(["a", "diverges", "dies", "dies once", "is stopped", "b"])
  ends = dict(ends)
  assert ends["a"] == ends["b"] == ends["dies once"] == "done" and found.stopped is None
  assert ends["diverges"] == "diverged: step 3 is not finite"
  assert failure(tmp_path, "diverges") == ("diverged", "step 3 is not finite")
  assert failure(tmp_path, "dies").kind == "failed"
  assert "SIGKILL" in failure(tmp_path, "dies").message and "3 times" in ends["dies"]
  assert "else than the sweep stopped it, 3 times" in ends["is stopped"]
  assert failure(tmp_path, "a") is None
  state.forget_failure(tmp_path, Member("dies", {}, 0, 0, (), 8))
  assert failure(tmp_path, "dies") is None


def test_a_signal_lets_the_runs_save_and_ends_the_queue(trains, tmp_path):
  def strike():
    log = tmp_path / "logs" / "waits.txt"
    while not log.exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=strike).start()
  ends, found = trains(["waits", "never"])
  assert found.stopped == signal.SIGTERM and ends == []
  assert failure(tmp_path, "waits") is None  # it goes on with the next start


def test_several_workers_share_the_runs(trains):
  ends, _ = trains([str(i) for i in range(7)], workers=3)
  assert sorted(ends) == [(str(i), "done") for i in range(7)]
