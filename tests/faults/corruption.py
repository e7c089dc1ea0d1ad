"""Random damage to the files of a run and of its data, and what a start then does about it.

  python -m tests.faults.corruption --cases=400 --seed=0

Each case copies a run of 8 steps, two starts and two checkpoints, and the data that it was trained
on. It damages one file, and does what `jaxgpt train` does until the first step. The case ends as

  refused    a UserError
  said       the start goes on, from the newest whole checkpoint, and says what is wrong
  verify     the start reads nothing that changed, and `checkpoint verify` or `data verify` name it
  no effect  nothing that is read differs from before, and no command names it
  SILENT     something that is read differs, and nothing was said
  CRASH      another exception than a UserError
"""

import argparse
import collections
import contextlib
import io
import logging
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import config, tree
from jaxgpt.analysis import curves, verify_run
from jaxgpt.data import verify as verify_data
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import generation, resume, run_folder
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build, loop

KINDS = ("flip", "truncate", "delete", "swap", "stale")
REFUSED, SAID, VERIFY, NO_EFFECT = "refused", "said", "verify", "no effect"
SILENT, CRASH = "SILENT", "CRASH"


class Case(NamedTuple):
  """A damage and its outcome."""

  kind: str
  file: str
  outcome: str
  text: str


class Site:
  """A run and its data, from which each case starts."""

  def __init__(self, folder: pathlib.Path, c: Any, data: pathlib.Path, other_data: pathlib.Path):
    """Trains the run.

    Args:
      folder: A new folder for it all.
      c: The config of a small model, whose `data.path` is replaced.
      data: A prepared folder.
      other_data: Another prepared folder, whose files are the stale copies.
    """
    self.folder, self._count = folder, 0
    (folder / "whole").mkdir(parents=True)
    shutil.copytree(data, folder / "whole" / "data")
    shutil.copytree(other_data, folder / "stale" / "data")
    self._c = c.copy_and_resolve_references()
    self._c.data.path = str(folder / "case" / "data")
    self._c.checkpoint.every = 4
    self._origin = dict.fromkeys(config.flatten(self._c), "file")
    # The run is trained where the cases will lie, so that its config names that folder.
    shutil.copytree(folder / "whole" / "data", folder / "case" / "data")
    with contextlib.redirect_stdout(io.StringIO()):
      loop.train(self._c, folder / "case" / "run", self._origin, until=4)
      shutil.copytree(folder / "case" / "run", folder / "stale" / "run")
      loop.train(self._c, folder / "case" / "run", self._origin)
    shutil.copytree(folder / "case" / "run", folder / "whole" / "run")
    self._mesh = mesh_lib.make(self._c.mesh)
    _, resolved = batches_lib.load_tokenizer_and_config(self._c)
    self._parts = build.build(resolved, self._mesh)
    self.expected, said = self.start()
    assert not said, said
    shutil.rmtree(folder / "case")

  def files(self) -> list[str]:
    """All files of the run and of the data, relative to the folder of a case."""
    whole = self.folder / "whole"
    return sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())

  def start(self) -> tuple[dict[str, Any], list[str]]:
    """What `train` does until the first step: (everything that it read, lines that it said)."""
    run = self.folder / "case" / "run"
    tokenizer, c = batches_lib.load_tokenizer_and_config(self._c)
    data, held_out = batches_lib.training_data(c), batches_lib.validation(c)
    found = resume.find(run)
    lines = run_folder.enter(
      run, c, self._origin, self._mesh, data.digest, tokenizer, found.step or 0
    )
    checkpoints = checkpoints_lib.Checkpoints(run / "checkpoints", keep=2)
    try:
      with jax.set_mesh(self._mesh):
        state, extra, damaged = checkpoints.restore_newest(self._parts.state)
    finally:
      checkpoints.close()
    read = {
      "state": {path: np.asarray(x) for path, x in tree.flatten(state).items()},
      "extra": extra,
      "step": found.step,
      "config": run_folder.read_config(run).to_json(),
      "tokenizer": tokenizer_lib.load(run / "tokenizer").digest,
      "generation": generation.read(run, tokenizer),
      "metrics": list(curves.read(run).items()),
      "data": [data.batch(n) for n in range(data.steps_per_epoch)],
      "held out": [held_out.batch(n) for n in range(held_out.steps_per_epoch)],
    }
    return read, [*lines, *damaged]

  def case(self, kind: str, file: str, draw: random.Random) -> Case | None:
    """Damages a file in a fresh copy. None if this file cannot be damaged in this way."""
    case = self.folder / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(self.folder / "whole", case)
    if not self._damage(kind, case / file, file, draw):
      return None
    shutil.rmtree(self.folder / "damaged", ignore_errors=True)
    shutil.copytree(case, self.folder / "damaged")  # a start writes into the folder
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      outcome, text = self._outcome()
    return Case(kind, file, outcome, text)

  def _outcome(self) -> tuple[str, str]:
    try:
      read, said = self.start()
    except UserError as e:
      return REFUSED, str(e)
    except Exception as e:
      return CRASH, f"{type(e).__name__}: {e}"
    if said:
      return SAID, said[0]
    if differs := unequal(read, self.expected):
      return SILENT, f"{differs} differs"
    try:
      problems = verify_data.verify(self.folder / "damaged" / "data").problems
      for report in verify_run.verify(self.folder / "damaged" / "run"):
        if problems := problems + report.problems:
          break
    except UserError as e:
      return VERIFY, str(e)
    return (VERIFY, problems[0]) if problems else (NO_EFFECT, "")

  def _damage(self, kind: str, path: pathlib.Path, file: str, draw: random.Random) -> bool:
    data = path.read_bytes()
    if kind == "flip" and data:
      at = draw.randrange(len(data))
      path.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
    elif kind == "truncate" and data:
      path.write_bytes(data[: draw.randrange(len(data))])
    elif kind == "delete":
      path.unlink()
    elif kind == "swap":
      others = [p for p in path.parent.iterdir() if p.is_file() and p.read_bytes() != data]
      if not others:
        return False
      other = draw.choice(sorted(others))
      content = other.read_bytes()
      other.write_bytes(data)
      path.write_bytes(content)
    elif kind == "stale":
      return self._stale(path, file, data, draw)
    else:
      return False
    return True

  def _stale(self, path: pathlib.Path, file: str, data: bytes, draw: random.Random) -> bool:
    """Puts in a copy from before, of another checkpoint, or of other data."""
    found = [self.folder / "stale" / file]
    if "/checkpoints/8/" in file:
      found.append(self.folder / "whole" / file.replace("/checkpoints/8/", "/checkpoints/4/"))
    found = [p for p in found if p.is_file() and p.read_bytes() != data]
    if found:
      path.write_bytes(draw.choice(found).read_bytes())
    return bool(found)


def unequal(a: Any, b: Any) -> str:
  """Where two nested values differ, or ''."""
  if isinstance(a, dict) and isinstance(b, dict):
    for key in sorted(a.keys() | b.keys(), key=str):
      if key not in a or key not in b:
        return str(key)
      if inner := unequal(a[key], b[key]):
        return f"{key}/{inner}"
    return ""
  if isinstance(a, list | tuple) and isinstance(b, list | tuple):
    if len(a) != len(b):
      return "length"
    return next(
      (f"{i}/{found}" for i, (x, y) in enumerate(zip(a, b)) if (found := unequal(x, y))), ""
    )
  if isinstance(a, np.ndarray):
    return "" if a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True) else "array"
  return "" if a == b else "value"


def cases(
  site: Site, count: int, seed: int, report: Callable[[list[Case]], None] = lambda found: None
) -> list[Case]:
  """Random cases: each takes a file at random, and the kinds of damage in turn.

  Args:
    site: The run and its data.
    count: Number of cases.
    seed: Seed of the draws.
    report: Called with the cases so far after each hundred.
  """
  draw, files, out = random.Random(seed), site.files(), list[Case]()
  while len(out) < count:
    kind = KINDS[len(out) % len(KINDS)]
    if found := site.case(kind, draw.choice(files), draw):
      out.append(found)
      if len(out) % 100 == 0:
        report(out)
  return out


def part(file: str) -> str:
  """The part of the site that a file belongs to."""
  if "/checkpoints/" in file:
    return "checkpoint"
  return "data" if file.startswith("data/") else "run folder"


def summary(found: list[Case]) -> list[str]:
  """A table of outcomes by part, and the cases that went wrong."""
  outcomes = (REFUSED, SAID, VERIFY, NO_EFFECT, SILENT, CRASH)
  lines = ["| part | cases | " + " | ".join(outcomes) + " |", "|---" * (len(outcomes) + 2) + "|"]
  for name in ("checkpoint", "run folder", "data"):
    here = collections.Counter(case.outcome for case in found if part(case.file) == name)
    lines.append(
      f"| {name} | {here.total()} | " + " | ".join(str(here[o]) for o in outcomes) + " |"
    )
  bad = [case for case in found if case.outcome in (SILENT, CRASH)]
  quiet = collections.Counter(case.file for case in found if case.outcome == NO_EFFECT)
  lines += [f"no effect: {', '.join(f'{name} ({n})' for name, n in quiet.items()) or 'none'}"]
  return lines + [f"{c.outcome}: {c.kind} of {c.file}: {c.text}" for c in bad]


def make_site(folder: pathlib.Path) -> Site:
  """A site of its own texts, for the script."""
  from jaxgpt.text.prepare import prepare

  words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs"]
  for name, shift in (("data", 0), ("other", 3)):
    texts = folder / f"{name}-texts"
    texts.mkdir(parents=True)
    for i in range(60):
      text = " ".join(words[(i * j + j // 3 + shift) % 10] for j in range(10 + 3 * i))
      (texts / f"{i:02}.txt").write_text(text + "\n")
    prepare.prepare(
      [texts], folder / name, tokenizer="sentencepiece:290", validation=0.15, cut_chars=0
    )
  c = config.base()
  c.model.update(dict(num_layers=2, width=32, num_heads=4))
  c.data.update(dict(seq_len=32, batch_size=8))
  c.schedule.warmup_steps = 2
  c.train.steps = 8
  c.log.every = 1
  c.eval.every = 4
  return Site(folder / "site", c, folder / "data", folder / "other")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--cases", type=int, default=400)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  logging.disable(logging.CRITICAL)  # of Orbax, on files that are no JSON
  with tempfile.TemporaryDirectory() as folder:
    show = lambda found: print("\n".join([f"{len(found)} cases", *summary(found)]), flush=True)
    found = cases(make_site(pathlib.Path(folder)), args.cases, args.seed, show)
  show(found)
  return any(case.outcome in (SILENT, CRASH) for case in found)


if __name__ == "__main__":
  sys.exit(main())
