"""Several real processes on this machine: the same numbers as one, and the same end for all."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxgpt.parallel import distributed
from jaxgpt.run import metric_writers, run_folder
from tests import xla_flags

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """import os, signal
from jaxgpt import config
from jaxgpt.parallel import distributed
from jaxgpt.training import batches as batches_lib

distributed.Agreement.seconds = 0  # asked at each step, for runs of a few

def get_config():
  c = config.base()
  c.model.update(dict(num_layers=1, width=32, num_heads=2, mlp_width=64, norm="rmsnorm",
                      position="rotary", bias=False))
  c.data.update(dict(seq_len=32, batch_size=8, threads=1))
  c.optim.lr = 1e-2
  c.train.steps = 8
  c.schedule.warmup_steps = 2
  c.log.every = 1
  c.eval.update(dict(every=4, batches=2))
  c.checkpoint.every = 4
  return c

# Process WHO gets signal NUMBER before it hands over the batch of its Nth step.
who, number, at = (int(x) for x in os.environ.get("TEST_SIGNAL", "-1 0 0").split())
if who == int(os.environ.get("JAX_PROCESS_ID", 0)):
  original, seen = batches_lib.to_devices, []
  def to_devices(batch, mesh):
    seen.append(1)
    if len(seen) == at:
      os.kill(os.getpid(), number)
    return original(batch, mesh)
  batches_lib.to_devices = to_devices
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory, corpus):
  """A folder with a config and data."""
  folder = tmp_path_factory.mktemp("site")
  (folder / "c.py").write_text(CONFIG)
  (folder / "data").symlink_to(corpus)
  return folder


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as s:
    return s.getsockname()[1]


def start(
  site, name, count, devices=1, env=(), args=lambda i: (), port=None, which=None, command=None
):
  """`count` processes of one run (or `which` of them), on `devices` fake devices each.

  `command` are the words of another command than `train`.
  """
  port = port or free_port()
  out = []
  for i in which or range(count):
    several = (
      {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(i),
      }
      if count > 1
      else {}
    )
    base = os.environ | {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {xla_flags.COMPILE_QUICKLY}",
    }
    out.append(
      subprocess.Popen(
        [
          sys.executable,
          "-m",
          "jaxgpt",
          *(
            command
            or (
              "train",
              f"--config={site}/c.py",
              f"--config.data.path={site}/data",
              f"--workdir={site}/{name}",
            )
          ),
          *args(i),
        ],
        env=base | several | dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return out


def finish(processes, seconds=120):
  """[(exit code, standard output, standard error)] of each."""
  out = []
  try:
    for p in processes:
      stdout, stderr = p.communicate(timeout=seconds)
      out.append((p.returncode, stdout, stderr))
  finally:
    for p in processes:
      p.kill()
  return out


def train(*args, **kwargs):
  return finish(start(*args, **kwargs))


def lines(site, name, kind):
  records = map(json.loads, (site / name / metric_writers.JSONL).read_text().splitlines())
  return [r for r in records if r["kind"] == kind]


def column(site, name, key, kind="train"):
  return [r[key] for r in lines(site, name, kind)]


@pytest.fixture(scope="module")
def alone(site):
  """The run folder of one process with two devices, and of two processes with one each."""
  one = start(site, "one", 1, devices=2)
  by_time = ["--config.checkpoint.every_minutes=1e-6", "--config.checkpoint.keep=100"]
  two = start(site, "two", 2, args=lambda i: by_time)
  assert [code for code, _, _ in finish(one)] == [0]
  results = finish(two)
  assert [code for code, _, _ in results] == [0, 0], results
  return results


def assert_same(site, got, want="one", steps=8):
  assert column(site, got, "step") == list(range(1, steps + 1))
  for key in ("loss", "grad_norm", "param_norm", "tokens"):
    np.testing.assert_allclose(column(site, got, key), column(site, want, key), rtol=2e-5)
  np.testing.assert_allclose(
    column(site, got, "loss", "validation"), column(site, want, "loss", "validation"), rtol=2e-5
  )


@pytest.mark.slow
def test_two_processes_compute_what_one_does(site, alone):
  assert_same(site, "two")


@pytest.mark.slow
def test_two_processes_save_by_the_clock_of_the_first_at_the_same_steps(site, alone):
  saved = sorted(int(path.name) for path in (site / "two" / "checkpoints").iterdir())
  assert len(saved) > 4 and saved[-1] == 8, saved


@pytest.mark.slow
def test_only_the_first_process_writes_and_prints(site, alone):
  (_, first, _), (_, second, _) = alone
  assert "done:" in first and "step 8/8" in first
  assert "done" not in second and "step" not in second
  (start,) = run_folder.read_starts(site / "two")
  assert start["processes"] == 2 and start["mesh"]["fsdp"] == 2


@pytest.mark.slow
def test_sigterm_on_one_process_stops_all_after_the_same_step_and_the_rerun_is_exact(site, alone):
  stopped = train(site, "stopped", 2, env={"TEST_SIGNAL": f"1 {signal.SIGTERM:d} 3"})
  assert [code for code, _, _ in stopped] == [128 + signal.SIGTERM] * 2, stopped
  assert "stopped by SIGTERM after step" in stopped[0][1] and "stopped by" not in stopped[1][1]
  steps = column(site, "stopped", "step")
  assert steps == list(range(1, len(steps) + 1)) and 3 <= len(steps) <= 5
  assert (site / "stopped" / "checkpoints" / str(len(steps))).exists()
  assert [code for code, _, _ in train(site, "stopped", 2)] == [0, 0]
  for key in ("loss", "grad_norm"):
    assert column(site, "stopped", key) == column(site, "two", key)
  assert lines(site, "stopped", "validation") == lines(site, "two", "validation")


@pytest.mark.slow
def test_an_error_that_all_have_is_printed_once_and_one_that_one_has_is_named(site):
  wrong = start(site, "x", 2, args=lambda i: ["--config.data.batch_size=7"])
  other = start(site, "y", 2, args=lambda i: [f"--config.seed={i}"])
  wrong, other = finish(wrong), finish(other)
  assert [code for code, _, _ in wrong + other] == [2] * 4
  assert wrong[0][2].count("data.batch_size=7 is not a multiple of") == 1
  assert "error" not in wrong[1][2]
  assert "process 1 of 2 (" in other[0][2] and "the resolved config is" in other[0][2]
  assert "Traceback" not in "".join(err for _, _, err in wrong + other)


def test_a_coordinator_that_does_not_answer_is_named(site):
  port = free_port()
  ((code, _, err),) = train(site, "x", 2, args=lambda i: ["--join-timeout=3"], port=port, which=[1])
  assert code == 75
  assert f"no start within 3 s at the coordinator 127.0.0.1:{port}: nobody answers there" in err


@pytest.mark.parametrize(
  "hosts, words",
  [
    ("", "not all processes came: connected are, with this one, 127.0.0.1;"),
    pytest.param("node-7.invalid", "node-7.invalid did not come;", marks=pytest.mark.slow),
  ],
)
def test_a_process_that_does_not_come_is_named(site, hosts, words):
  ((code, _, err),) = train(
    site,
    "x",
    2,
    args=lambda i: ["--join-timeout=3"],
    which=[0],
    env={"TPU_WORKER_HOSTNAMES": hosts},
  )
  assert code == 75 and words in err


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_others_at_once_and_the_rerun_is_exact(
  site, alone, killed
):
  name = f"killed{killed}"
  processes = start(site, name, 2, env={"TEST_SIGNAL": f"{killed} {signal.SIGKILL:d} 7"})
  processes[killed].wait(120)
  before = time.monotonic()
  results = finish(processes)
  assert time.monotonic() - before < 10
  assert results[killed][0] == -signal.SIGKILL and results[1 - killed][0] == 75, results
  assert f"process {killed} of 2 (" in results[1 - killed][2]
  assert (
    results[1 - killed][2].count("was lost") == 1 and "Check failure" not in results[1 - killed][2]
  )
  assert [code for code, _, _ in train(site, name, 2)] == [0, 0]
  assert column(site, name, "loss") == column(site, "two", "loss")


@pytest.mark.slow
def test_four_processes_and_a_run_that_moves_between_numbers_of_processes(site, alone):
  """Four at first; two with two devices each go on; one process with one device ends it."""
  term = {"TEST_SIGNAL": f"0 {signal.SIGTERM:d} 2"}
  assert {r[0] for r in train(site, "moved", 4, env=term)} == {143}
  assert {r[0] for r in train(site, "moved", 2, devices=2, env=term)} == {143}
  assert {r[0] for r in train(site, "moved", 1)} == {0}
  assert_same(site, "moved")
  assert [s["processes"] for s in run_folder.read_starts(site / "moved")] == [4, 2, 1]


@pytest.mark.slow
def test_copies_on_two_processes_with_two_devices_each(site, alone):
  mesh = lambda i: ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.optim.accumulate=2"]
  assert {r[0] for r in train(site, "copies", 2, devices=2, args=mesh)} == {0}
  assert_same(site, "copies")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_leaves_its_evidence_once(site):
  bad = lambda i: [
    "--config.optim.lr=1e16",
    "--config.optim.clip_norm=0",
    "--config.schedule.warmup_steps=0",
  ]
  first, second = train(site, "nonfinite", 2, args=bad)
  assert first[0] == second[0] == 2 and "is not finite: loss" in first[2]
  assert "not finite" not in second[2]
  (where,) = (site / "nonfinite").glob("nonfinite_*")
  assert np.load(where / "batch.npz")["tokens"].shape == (8, 32)
  assert (where / "state").exists() and (where / "metrics.json").exists()


BARRIER = """import sys, time
from jaxgpt.parallel import cluster, distributed
with distributed.joined(cluster.find()):
  if not distributed.is_first():
    time.sleep(4)
  distributed.barrier("the data", 1)
"""


def several(program, count=2):
  """Processes that run a text of Python and find each other."""
  port, out = free_port(), []
  for i in range(count):
    env = os.environ | {
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
      "PYTHONPATH": str(ROOT),
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(i),
      "XLA_FLAGS": "",
    }
    out.append(
      subprocess.Popen(
        [sys.executable, "-c", program],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
    )
  return out


def test_a_barrier_names_who_did_not_come(site):
  (code, _, err), (other_code, _, _) = finish(several(BARRIER))
  assert code == other_code == 75
  assert f"process 1 of 2 ({socket.gethostname()}) did not come to 'the data' within 1 s" in err


def test_agreement_of_one_process_is_its_own_number():
  agreement = distributed.Agreement(jax.make_mesh((8,), ("data",)))
  assert [agreement.soon(n) for n in (0, 15, 0)] == [0, 15, 15] and agreement.now(2) == 15


AGREEMENT = """import time
from jaxgpt.parallel import cluster, distributed
with distributed.joined(cluster.find()):
  import jax
  agreement = distributed.Agreement(jax.make_mesh((2,), ("data",)))
  asked, ask = [], agreement._ask
  agreement._ask = lambda number: (asked.append(1), ask(number))
  first = None
  for call in range(300):
    number = 15 if call >= 50 and not distributed.is_first() else 0
    if first is None and agreement.soon(number):
      first = call
    time.sleep(0.005 if distributed.is_first() else 0.01)
  print("seen", first, "asked", len(asked), "now", agreement.now(2))
"""


def test_processes_see_a_number_at_the_same_call_and_ask_about_once_a_second(site):
  """The second process raises it at call 50; calls take 10 ms, so 100 of them are a second."""
  first, second = finish(several(AGREEMENT))
  assert first[0] == second[0] == 0, first
  (line,) = [line for line in first[1].splitlines() if line.startswith("seen")]
  assert line in second[1].splitlines()
  _, seen, _, asked, _, now = line.split()
  assert 50 < int(seen) < 299 and 4 <= int(asked) <= 20 and now == "15"


@pytest.mark.slow
def test_a_stream_is_read_by_each_process_and_goes_on_exactly_on_fewer_too(site):
  raw = site / "raw"
  raw.mkdir()
  for name in "abcde":
    (raw / f"{name}.txt").write_text("".join(f"{name}{i} " for i in range(2000)))
  of_stream = lambda i: [f"--config.data.stream={raw}", "--config.data.stream_window=24"]
  whole = train(site, "stream", 2, args=of_stream)
  assert [code for code, _, _ in whole] == [0, 0], whole
  assert "read and tokenized while training, by 2 hosts" in whole[0][1]
  assert "data.stream" not in whole[1][1]
  term = {"TEST_SIGNAL": f"0 {signal.SIGTERM:d} 3"}
  assert {r[0] for r in train(site, "stream_cut", 2, env=term, args=of_stream)} == {143}
  assert {r[0] for r in train(site, "stream_cut", 4, 1, args=of_stream)} == {2}
  assert (
    "data.stream_readers=2 does not split evenly over 4 hosts"
    in (train(site, "stream_cut", 4, 1, args=of_stream)[0][2])
  )
  shutil.copytree(site / "stream_cut", site / "stream_fewer")
  assert [r[0] for r in train(site, "stream_cut", 2, args=of_stream)] == [0, 0]
  for key in ("loss", "grad_norm", "epochs/stream"):
    assert column(site, "stream_cut", key) == column(site, "stream", key)
  assert [r[0] for r in train(site, "stream_fewer", 1, 2, args=of_stream)] == [0]
  np.testing.assert_allclose(
    column(site, "stream_fewer", "loss"), column(site, "stream", "loss"), rtol=2e-4
  )
