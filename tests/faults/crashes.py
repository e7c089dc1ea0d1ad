"""Strikes at `jaxgpt train` in every phase; then the same command, until the run is done.

  python -m tests.faults.crashes --strikes=200 --seed=0

Each strike starts a process that trains a small model, new or from the middle, and does a fault to
itself at one moment of one phase: a signal, an error, a disk that takes no more, a stall, a clock
that jumps. The command is then given again until it ends well. The metrics and the digests of the
last checkpoint must be those of a run that nothing disturbed, to the bit. If one of several
processes is struck, the run ends on fewer devices than it began with, and the metrics must be equal
up to rounding.

Processes are forked from this one, which has imported the packages and not started JAX.
"""

import argparse
import collections
import contextlib
import functools
import importlib
import inspect
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxgpt.commands import main as commands
from jaxgpt.run import throughput
from jaxgpt.run.process import memory
from tests import xla_flags

STEPS, EVERY, MIDDLE = 12, 4, 6  # steps, between checkpoints, where the run "from the middle" is
LIMIT = 300  # seconds of a process
JOIN = 60  # seconds that a process waits for the others at its start
STARTS = 5  # after which a run that is not done counts as stuck
MEASURED = (*throughput.METRICS, *memory.METRICS)  # of a metric line: by the machine

CONFIG = {
  "model.num_layers": 2,
  "model.width": 32,
  "model.num_heads": 4,
  "model.dropout": 0.1,
  "data.seq_len": 32,
  "data.batch_size": 8,
  "data.threads": 1,
  "mesh.data": -1,
  "mesh.fsdp": 1,
  "schedule.warmup_steps": 2,
  "train.steps": STEPS,
  "log.every": 1,
  "eval.every": 3,
  "eval.batches": 2,
  "checkpoint.every": EVERY,
  "checkpoint.keep": 2,
  "checkpoint.best": "loss",
}
_ORBAX = "orbax.checkpoint._src.path"

# Phase -> the function in which it happens. A strike comes before or after one of its calls.
PHASES = {
  "config is read": "jaxgpt.config:load",
  "config is checked": "jaxgpt.training.build:check",
  "data are opened": "jaxgpt.training.batches:training_data",
  "run folder is made": "jaxgpt.run.run_folder:enter",
  "files are sealed": "jaxgpt.run.provenance.seal:_write",
  "state is made": "jaxgpt.training.train_step:first_state",
  "state is restored": "jaxgpt.run.checkpoints:Checkpoints.restore",
  "compilation": "jaxgpt.training.train_step:compile",
  "step": "jaxgpt.training.batches:to_devices",
  "metrics are written": "jaxgpt.run.metric_writers:Jsonl._append",
  "metrics are flushed": "jaxgpt.run.metric_writers:Jsonl.flush",
  "save begins": "jaxgpt.run.checkpoints:Checkpoints._save",
  "digests, in the background": "jaxgpt.run.digests:sums",
  "save commits, in the background": f"{_ORBAX}.atomicity:AtomicRenameTemporaryPath.finalize",
  "save is recorded": "jaxgpt.run.run_folder:note_saved",
  "old checkpoint is deleted": f"{_ORBAX}.deleter:StandardCheckpointDeleter.delete",
  "evaluation": "jaxgpt.training.evaluation:evaluate_on",
  "best weights are kept": "jaxgpt.training.loop.steps:Run._keep_best",
  "small file is replaced": "jaxgpt.storage.atomic:write",
  "last save": "jaxgpt.training.loop.saving:Saver.finish",
  "end": "jaxgpt.training.loop.steps:Run.close",
}
ANY_MOMENT = "any moment"  # struck from outside, at a random time
PEER = "a peer of {}, at any moment"  # the same, at one of several processes
PEERS = (2, 2, 4)
PEER_TOLERANCE = 1e-3  # relative: on another number of devices, sums run in another order


def _signal(*numbers: signal.Signals) -> Callable[[], None]:
  def strike() -> None:
    for number in numbers:
      os.kill(os.getpid(), number)
      time.sleep(0.05)

  return strike


def _error() -> None:
  raise RuntimeError("struck")


def _io_error() -> None:
  raise OSError(5, "Input/output error")


def _full_disk() -> None:
  """From now on the system refuses to make any file of this process longer than 3 kB."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))


def _clock_jump() -> None:
  now = time.time
  time.time = lambda: now() + 86_400


FAULTS: dict[str, Callable[[], None]] = {
  "SIGKILL": _signal(signal.SIGKILL),
  "SIGTERM": _signal(signal.SIGTERM),
  "SIGINT": _signal(signal.SIGINT),
  "SIGINT twice": _signal(signal.SIGINT, signal.SIGINT),
  "SIGHUP": _signal(signal.SIGHUP),
  "error": _error,
  "I/O error": _io_error,
  "full disk": _full_disk,
  "stall": lambda: time.sleep(2),
  "clock jump": _clock_jump,
}


class Strike(NamedTuple):
  """One strike and what came of it.

  Attributes:
    phase: A key of PHASES, ANY_MOMENT or PEER.
    fault: A key of FAULTS.
    resumed: Whether the struck run goes on from the middle.
    codes: Exit code of each start, the struck one first. Of several processes, the worst.
    problem: What differs from the undisturbed run, or ''.
  """

  phase: str
  fault: str
  resumed: bool
  codes: list[int]
  problem: str


class Site:
  """A folder with data, a config, and the run that nothing disturbed."""

  def __init__(self, folder: pathlib.Path):
    """Makes it all, and counts the calls of each phase."""
    self.folder = folder
    self._write(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    self.counts: dict[bool, collections.Counter[str]] = {}
    self.seconds: dict[bool, float] = {}
    for resumed in (False, True):
      run = folder / "whole" if not resumed else folder / "gone on"
      if resumed:
        code = self.train(run, lambda: _hook("step", "before", MIDDLE, FAULTS["SIGTERM"]))
        assert code == 128 + signal.SIGTERM, f"exit code {code}: {self.log(run)}"
        shutil.copytree(run, folder / "middle")
      before = time.monotonic()
      counts = folder / f"counts-{resumed}"
      code = self.train(run, lambda counts=counts: _count(counts))
      assert code == 0, f"exit code {code}: {self.log(run)}"
      self.seconds[resumed] = time.monotonic() - before
      self.counts[resumed] = collections.Counter(counts.read_text().split("\n"))
    assert not (found := self.differs(folder / "gone on")), found
    seen = self.counts[False] + self.counts[True]
    missing = [phase for phase in PHASES if not seen[phase]]
    assert not missing, f"no call of {missing}: the functions of PHASES have other names now"

  def _write(self, folder: pathlib.Path) -> None:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs"]
    (folder / "texts").mkdir(parents=True)
    for i in range(60):
      text = " ".join(words[(i * j + j // 3) % 10] for j in range(10 + 3 * i))
      (folder / "texts" / f"{i:02}.txt").write_text(text + "\n")
    # In a process of its own: the library that writes shards starts threads, and a process with
    # threads can't be forked.
    words = ["data", f"{folder}/texts", f"--out={folder}/data", "--tokenizer=bytes"]
    words += ["--validation=0.2", "--cut-chars=0"]
    subprocess.run([sys.executable, "-m", "jaxgpt", *words], check=True, capture_output=True)
    values = CONFIG | {"data.path": str(folder / "data")}
    (folder / "config.py").write_text(
      "from jaxgpt import config\n\n\ndef get_config():\n  c = config.base()\n"
      f"  c.update_from_flattened_dict({values!r})\n  return c\n"
    )

  def start(self, run: pathlib.Path, prepared: Callable[[], Any] = lambda: None, **env: str) -> int:
    """Starts `jaxgpt train` in a process of its own, and returns its id."""
    # A peer that is struck before all have joined leaves the others waiting for that long.
    join = f"--join-timeout={JOIN}"
    words = ["train", f"--config={self.folder}/config.py", f"--workdir={run}", join]
    sys.stdout.flush()
    child = os.fork()
    if child:
      return child
    code = 99
    try:
      os.setpgid(0, 0)
      os.environ.update(env)
      with open(f"{run}.log", "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
      prepared()
      code = commands.main(words)
      sys.stdout.flush()
    except SystemExit as e:
      code = e.code if isinstance(e.code, int) else 1
    except BaseException:
      traceback.print_exc()
      code = 1
    finally:
      os._exit(code)

  def train(self, run: pathlib.Path, prepared: Callable[[], Any] = lambda: None) -> int:
    """Runs `jaxgpt train` to its end: its exit code, or minus the signal that ended it."""
    return self.finish([self.start(run, prepared)])[0]

  def finish(self, children: list[int]) -> list[int]:
    """The exit codes of processes. After LIMIT seconds they are killed, with code -1000."""
    codes: dict[int, int] = {}
    end = time.monotonic() + LIMIT
    while len(codes) < len(children):
      for child in [c for c in children if c not in codes]:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
          codes[child] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
          os.kill(child, signal.SIGKILL)
          os.waitpid(child, 0)
          codes[child] = -1000
      time.sleep(0.02)
    return [codes[child] for child in children]

  def log(self, run: pathlib.Path) -> str:
    """The end of what the starts of a run printed."""
    return pathlib.Path(f"{run}.log").read_text()[-3000:]

  def differs(self, run: pathlib.Path, to_the_bit: bool = True) -> str:
    """What of a run is not as in the undisturbed one, or ''.

    Args:
      run: A run that is done.
      to_the_bit: Else metrics may differ by PEER_TOLERANCE, and arrays are not compared.
    """
    if not to_the_bit:
      return _apart(_metrics(run), _metrics(self.folder / "whole"))
    for name, of in (("metrics", _metrics), ("arrays of the last checkpoint", _digests)):
      try:
        found = of(run)
      except (OSError, ValueError, KeyError) as e:
        return f"{name} can't be read: {e}"
      if found != of(self.folder / "whole"):
        return f"{name} differ"
    return ""


def _metrics(run: pathlib.Path) -> list[dict[str, Any]]:
  lines = (run / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def _apart(found: list[dict[str, Any]], want: list[dict[str, Any]]) -> str:
  """Which metrics of two runs differ by more than rounding, or ''."""
  if [(x["step"], x["kind"]) for x in found] != [(x["step"], x["kind"]) for x in want]:
    return "the lines of the metrics differ"
  for a, b in zip(found, want):
    for key in a.keys() & b.keys() - {"step", "kind"}:
      if abs(a[key] - b[key]) > PEER_TOLERANCE * abs(b[key]):
        return f"{key} of step {a['step']} is {a[key]} and not {b[key]}"
  return ""


def _digests(run: pathlib.Path) -> Any:
  return json.loads((run / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())["digests"]


def _target(phase: str) -> tuple[Any, str]:
  module, path = PHASES[phase].split(":")
  *owners, name = path.split(".")
  return functools.reduce(getattr, owners, importlib.import_module(module)), name


def _wrap(phase: str, before: Callable[[], None], after: Callable[[], None]) -> None:
  """Calls functions around each call of a phase's function."""
  owner, name = _target(phase)
  original = getattr(owner, name)

  @functools.wraps(original)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    before()
    out = original(*args, **kwargs)
    after()
    return out

  @functools.wraps(original)
  async def awaited(*args: Any, **kwargs: Any) -> Any:
    before()
    out = await original(*args, **kwargs)
    after()
    return out

  setattr(owner, name, awaited if inspect.iscoroutinefunction(original) else wrapped)


def _hook(phase: str, when: str, number: int, strike: Callable[[], None]) -> None:
  """Strikes before or after a call of a phase, counted from 1. Once."""
  calls = {"before": 0, "after": 0}

  def called(moment: str) -> None:
    calls[moment] += 1
    if moment == when and calls[moment] == number:
      strike()

  _wrap(phase, lambda: called("before"), lambda: called("after"))


def _count(path: pathlib.Path) -> None:
  """Writes a line with the phase at each call."""
  file = path.open("a", buffering=1)
  for phase in PHASES:
    _wrap(phase, lambda phase=phase: print(phase, file=file), lambda: None)


def _prepare_run(site: Site, resumed: bool) -> pathlib.Path:
  run = site.folder / "struck"
  shutil.rmtree(run, ignore_errors=True)
  pathlib.Path(f"{run}.log").unlink(missing_ok=True)
  if resumed:
    shutil.copytree(site.folder / "middle", run)
  return run


def _until_done(site: Site, run: pathlib.Path, codes: list[int], to_the_bit: bool = True) -> str:
  """Gives the command again until the run is done: what differs then, or ''."""
  while codes[-1] != 0 and len(codes) <= STARTS:
    codes.append(site.train(run))
  if -1000 in codes:
    return f"a process was still there after {LIMIT} s"
  return f"not done after {len(codes)} starts" if codes[-1] else site.differs(run, to_the_bit)


def strike_in_phase(site: Site, phase: str, fault: str, draw: random.Random) -> Strike:
  """Strikes at a random call of a phase, in a new run or one from the middle."""
  resumed = draw.choice([r for r in (False, True) if site.counts[r][phase]])
  number = draw.randint(1, site.counts[resumed][phase])
  when = draw.choice(["before", "after"])
  run = _prepare_run(site, resumed)
  codes = [site.train(run, lambda: _hook(phase, when, number, FAULTS[fault]))]
  problem = _until_done(site, run, codes)
  where = f"{when} call {number} of {PHASES[phase]}"
  return Strike(phase, fault, resumed, codes, problem and f"{where}: {problem}\n{site.log(run)}")


def strike_at_any_moment(site: Site, fault: str, draw: random.Random) -> Strike:
  """Sends a signal at a random time of the process."""
  resumed = draw.random() < 0.5
  run = _prepare_run(site, resumed)
  child = site.start(run)
  seconds = draw.uniform(0, site.seconds[resumed])
  time.sleep(seconds)
  with contextlib.suppress(ProcessLookupError):
    os.kill(child, signal.Signals[fault])
  codes = site.finish([child])
  problem = _until_done(site, run, codes)
  return Strike(
    ANY_MOMENT,
    fault,
    resumed,
    codes,
    problem and f"after {seconds:.2f} s: {problem}\n{site.log(run)}",
  )


def strike_a_peer(site: Site, count: int, fault: str, draw: random.Random) -> Strike:
  """Sends a signal to one of several processes of a run. Then one process goes on alone."""
  run = _prepare_run(site, resumed=True)
  with socket.create_server(("127.0.0.1", 0)) as s:
    port = s.getsockname()[1]
  several = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
  children = [site.start(run, **several, JAX_PROCESS_ID=str(i)) for i in range(count)]
  time.sleep(draw.uniform(0, 2 * site.seconds[True]))
  with contextlib.suppress(ProcessLookupError):
    os.kill(draw.choice(children), signal.Signals[fault])
  ended = site.finish(children)
  codes = [max(ended, key=abs)]
  problem = _until_done(site, run, codes, to_the_bit=False)
  return Strike(
    PEER.format(count), fault, True, codes, problem and f"{ended}: {problem}\n{site.log(run)}"
  )


def strikes(
  site: Site, count: int, seed: int, report: Callable[[list[Strike]], None] = lambda found: None
) -> Iterator[Strike]:
  """Random strikes: the phases in turn, each with the faults in turn.

  Args:
    site: Where they are done.
    count: How many.
    seed: Seed of the draws.
    report: Called with the strikes so far after each twenty.
  """
  draw, out = random.Random(seed), list[Strike]()
  signals = [name for name in FAULTS if name in signal.Signals.__members__]
  places: list[str | int] = [*PHASES, ANY_MOMENT, ANY_MOMENT, *PEERS]
  offset = draw.randrange(len(FAULTS))
  for n in range(count):
    round_, at = divmod(n, len(places))
    place = places[at]
    fault = list(FAULTS)[(offset + at + round_) % len(FAULTS)]
    if isinstance(place, int):
      found = strike_a_peer(site, place, draw.choice(signals), draw)
    elif place == ANY_MOMENT:
      found = strike_at_any_moment(site, draw.choice(signals), draw)
    else:
      found = strike_in_phase(site, place, fault, draw)
    out.append(found)
    if len(out) % 20 == 0:
      report(out)
    yield found


def summary(found: list[Strike]) -> list[str]:
  """A table of strikes by phase and fault, and those after which something differed."""
  lines = ["| phase | strikes | by | continued |", "|---|---|---|---|"]
  for phase in dict.fromkeys(s.phase for s in found):
    here = [s for s in found if s.phase == phase]
    faults = collections.Counter(s.fault for s in here)
    by = ", ".join(name if n == 1 else f"{name} x {n}" for name, n in sorted(faults.items()))
    lines.append(f"| {phase} | {len(here)} | {by} | {sum(not s.problem for s in here)} |")
  good = sum(not s.problem for s in found)
  lines.append(f"{len(found)} strikes, {good} continued as if nothing had happened")
  return lines + [
    f"DIFFERS: {s.fault} in {s.phase!r}, resumed={s.resumed}, exit codes {s.codes}: {s.problem}"
    for s in found
    if s.problem
  ]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--strikes", type=int, default=200)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  flags = f"--xla_cpu_multi_thread_eigen=false {xla_flags.COMPILE_QUICKLY}"
  os.environ["XLA_FLAGS"] = flags  # of every process, as the last bits depend on it
  for phase in PHASES:
    _target(phase)  # imports it
  show = lambda found: print("\n".join(summary(found)), flush=True)
  with tempfile.TemporaryDirectory() as folder:
    found = list(strikes(Site(pathlib.Path(folder) / "site"), args.strikes, args.seed, show))
  show(found)
  return any(s.problem for s in found)


if __name__ == "__main__":
  sys.exit(main())
