"""Traces of some steps."""

import gzip
import json

import jax
import jax.numpy as jnp

from jaxgpt.run.process import profile


def run(profiled, steps):
  waits = []
  for step in range(1, steps + 1):
    profiled.before(step, lambda step=step: waits.append(step))
    jax.block_until_ready(jnp.ones(8) * step)
  profiled.close()
  return waits


def test_a_trace_of_two_steps(tmp_path, capsys):
  assert run(profile.Profile((2, 3), tmp_path), 5) == [2, 4]  # waits before and after
  (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
  assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  assert "the trace is written" in capsys.readouterr().out


def test_a_run_that_ends_before_the_last_step_has_its_trace(tmp_path):
  assert run(profile.Profile((2, 9), tmp_path), 3) == [2]
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_no_trace_unless_asked_for(tmp_path):
  assert run(profile.Profile((), tmp_path), 3) == [] and not list(tmp_path.iterdir())


def test_a_trace_that_fails_is_said_once(tmp_path, capsys):
  (tmp_path / "profile").write_text("a file is in the way")
  run(profile.Profile((2, 2), tmp_path), 4)
  assert capsys.readouterr().err.count("log.profile_steps: no trace is written") == 1
