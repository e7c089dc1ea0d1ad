"""A run that is struck in any phase goes on as if nothing had happened."""

import os
import subprocess
import sys

import pytest

from tests.faults import crashes


def strike(count, seed):
  """Runs the script, since only a process that has not started JAX may be forked."""
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  words = [sys.executable, "-m", "tests.faults.crashes", f"--strikes={count}", f"--seed={seed}"]
  return subprocess.run(words, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_struck_runs_continue_to_the_bit():
  done = strike(len(crashes.PHASES), seed=0)
  assert done.returncode == 0, done.stdout + done.stderr
  assert f"{len(crashes.PHASES)} strikes, {len(crashes.PHASES)} continued" in done.stdout


def test_what_differs_is_told():
  found = [
    crashes.Strike("step", "SIGKILL", False, [-9, 0], ""),
    crashes.Strike("step", "error", True, [1, 0], "before call 3: metrics differ"),
  ]
  lines = crashes.summary(found)
  assert "| step | 2 | SIGKILL, error | 1 |" in lines
  assert "2 strikes, 1 continued as if nothing had happened" in lines
  assert lines[-1].startswith("DIFFERS: error in 'step', resumed=True, exit codes [1, 0]: before")
