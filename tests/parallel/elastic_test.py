"""A run that moves between numbers of processes and devices: the same batches, the same losses.

One run goes through all topologies of 1, 2, 4 or 8 devices in 1, 2 or 4 processes, and back in the
opposite order, so that each move is made both ways. At each of them a signal stops it after some
steps. All rows that any process hands to its devices are compared with those of the data by their
digests, and the losses with those of a run that never moved.
"""

import hashlib
import itertools
import json
import signal

import numpy as np
import pytest

from jaxgpt.run import run_folder
from jaxgpt.training import batches as batches_lib
from tests.parallel import distributed_test as several

STEPS = 80
TOLERANCE = 2e-4  # relative, of the loss of any step: on other devices, sums run in another order
# (processes, devices of each)
TOPOLOGIES = [(1, 1), (4, 2), (1, 2), (2, 1), (1, 8), (2, 4), (4, 1), (1, 4), (2, 2)]
ROWS = """
import hashlib, json
from jax import config as _jax_config

handed = batches_lib.to_devices
def to_devices(batch, mesh):
  if _jax_config.jax_transfer_guard == "disallow":  # else it is a batch of an evaluation
    rows = [hashlib.sha256(b"".join(batch[k][i].tobytes() for k in sorted(batch))).hexdigest()
            for i in range(len(batch["tokens"]))]
    with open(f"{os.environ['TEST_ROWS']}.{os.environ.get('JAX_PROCESS_ID', 0)}", "a") as f:
      print(json.dumps(rows), file=f)
  return handed(batch, mesh)
batches_lib.to_devices = to_devices
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory, corpus):
  folder = tmp_path_factory.mktemp("elastic")
  text = several.CONFIG.replace("c.train.steps = 8", f"c.train.steps = {STEPS}")
  text = text.replace("c.optim.lr = 1e-2", "c.optim.lr = 1e-3").replace("every=4", "every=0")
  (folder / "c.py").write_text(text + ROWS)
  (folder / "data").symlink_to(corpus)
  raw = folder / "raw"
  raw.mkdir()
  for name in "abcdefgh":
    (raw / f"{name}.txt").write_text("".join(f"{name}{i} " for i in range(2000)))
  return folder


def train(site, name, number, topology, stop, args):
  """One start: the exit codes, and the digests of the rows of each of its steps."""
  processes, devices = topology
  rows = site / f"rows-{name}-{number}"
  env = {"TEST_ROWS": str(rows)} | ({"TEST_SIGNAL": f"0 {signal.SIGTERM:d} 2"} if stop else {})
  done = several.train(site, name, processes, devices, env=env, args=lambda i: args)
  parts = [
    [json.loads(line) for line in (site / f"{rows.name}.{i}").read_text().splitlines()]
    for i in range(processes)
  ]
  assert len({len(part) for part in parts}) == 1, "all processes do the same steps"
  return [code for code, _, _ in done], [[*itertools.chain(*step)] for step in zip(*parts)], done


def moved(site, name, path, args=()):
  """Digests of the rows of all steps of a run that moves along a path of topologies."""
  rows = []
  for number, topology in enumerate(path):
    last = number == len(path) - 1
    codes, new, done = train(site, name, number, topology, not last, args)
    assert set(codes) == ({0} if last else {128 + signal.SIGTERM}), (topology, done)
    start = run_folder.read_starts(site / name)[-1]
    assert start["processes"] == topology[0] and start["step"] == len(rows)
    assert np.prod(list(start["mesh"].values())) == np.prod(topology)
    rows += new
  assert len(rows) == STEPS
  return rows


def largest_gap(site, name, want):
  a, b = (np.array(several.column(site, run, "loss")) for run in (name, want))
  assert len(a) == len(b) == STEPS
  gap = float(np.max(np.abs(a - b) / b))
  print(f"{name}: losses of {STEPS} steps are at most {gap:.1e} apart")
  return gap


def row_digests(batch):
  digest = lambda i: hashlib.sha256(b"".join(batch[k][i].tobytes() for k in sorted(batch)))
  return [digest(i).hexdigest() for i in range(len(batch["tokens"]))]


@pytest.mark.slow
def test_prepared_data_on_all_topologies_both_ways(site):
  moved(site, "still", [(1, 1)])
  rows = moved(site, "moved", [*TOPOLOGIES, *TOPOLOGIES[::-1][1:]])
  data = batches_lib.training_data(run_folder.read_config(site / "moved"))
  assert rows == [row_digests(data.batch(step)) for step in range(STEPS)]
  assert largest_gap(site, "moved", "still") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("start", [(1, 1), (4, 2)])
def test_streams_on_all_topologies_both_ways(site, start):
  """Four readers: from the config, or since the run begins on four processes."""
  readers = 4 if start == (1, 1) else 0
  args = [f"--config.data.stream={site}/raw", "--config.data.stream_window=24"]
  args += [f"--config.data.stream_readers={readers}"] * bool(readers)
  first = TOPOLOGIES.index(start)
  path = [*TOPOLOGIES[first:], *TOPOLOGIES[:first]]
  still, name = f"stream-still-{start[0]}", f"stream-{start[0]}"
  want = moved(site, still, [start], args)
  assert moved(site, name, [*path, *path[::-1][1:]], args) == want
  assert largest_gap(site, name, still) < TOLERANCE
