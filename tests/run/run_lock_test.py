"""The lock of a run folder: one holder, named in the error, gone with its process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxgpt.errors import UserError
from jaxgpt.run import run_lock

HOLD = """
import sys, time
from jaxgpt.run import run_lock
with run_lock.RunLock(sys.argv[1]) as lock:
  lock.take()
  print("held", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
  """(run folder, a process that holds its lock)."""
  folder = tmp_path / "run"
  process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
  assert process.stdout.readline() == b"held\n"
  yield folder, process
  process.kill()
  process.wait()


def test_a_second_process_is_refused_and_told_who_is_at_work(other):
  folder, process = other
  with run_lock.RunLock(folder) as lock, pytest.raises(UserError) as e:
    lock.take()
  assert f"process {process.pid} on host {os.uname().nodename}" in str(e.value)
  assert "another --workdir" in str(e.value) and "\n" not in str(e.value)
  assert str(process.pid) in run_lock.holder(folder)


def test_a_killed_process_leaves_no_lock(other):
  folder, process = other
  process.kill()
  process.wait()
  assert run_lock.holder(folder) is None
  with run_lock.RunLock(folder) as lock:
    lock.take()
    assert str(os.getpid()) in run_lock.holder(folder)
  assert run_lock.holder(folder) is None


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
  with run_lock.RunLock(tmp_path) as lock:
    lock.take()
    is_up, up = os.pipe()
    child = os.fork()
    if not child:
      os.write(up, b".")
      time.sleep(60)
      os._exit(0)
    os.read(is_up, 1)
  try:
    assert run_lock.holder(tmp_path) is None
  finally:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_nothing_is_made_in_a_folder_that_is_not_there(tmp_path):
  with run_lock.RunLock(tmp_path / "run") as lock:
    lock.take(make=False)
    assert not (tmp_path / "run").exists()
    lock.take()
    lock.take()  # by the same object: it has it
  assert (tmp_path / "run" / run_lock.NAME).exists()


def test_a_file_system_without_locks_is_a_problem_that_is_told(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(run_lock.fcntl, "flock", flock)
  with run_lock.RunLock(tmp_path) as lock:
    lock.take()
    assert lock.problem == "Operation not supported"


def test_the_lock_of_a_bucket_is_on_this_machine(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path))
  with run_lock.RunLock("s3://bucket/run") as lock:
    lock.take()
    assert run_lock.holder("s3://bucket/run/") and not run_lock.holder("s3://bucket/other")


def test_the_last_sign_of_life_is_that_of_training(tmp_path, monkeypatch):
  """A start that fails before it trains, and other holders of the lock, leave it as it was."""
  monkeypatch.setattr(run_lock, "_BEAT", 0.01)
  path = tmp_path / run_lock.NAME
  assert run_lock.last_beat(tmp_path) is None
  with run_lock.RunLock(tmp_path) as lock:
    lock.take()
    os.utime(path, (1000.0, 1000.0))
    lock.beat()
    while run_lock.last_beat(tmp_path) == 1000.0:
      time.sleep(0.01)
    before = run_lock.last_beat(tmp_path)
    while run_lock.last_beat(tmp_path) == before:
      time.sleep(0.01)
  os.utime(path, (1000.0, 1000.0))
  with run_lock.RunLock(tmp_path) as lock:
    lock.take()
    time.sleep(0.05)
    assert run_lock.last_beat(tmp_path) == 1000.0
  time.sleep(0.05)
  assert run_lock.last_beat(tmp_path) == 1000.0
