"""What would go wrong with a run, found before it is started: each finding in a line for people."""

import contextlib
import errno
import os
import shutil
import time
import uuid

import jax
import numpy as np
from etils import epath

from jaxgpt import config
from jaxgpt.commands.checks import environment as environment_checks
from jaxgpt.commands.checks.environment import (
  OK,
  PROBLEM,
  WARNING,
  Finding,
  size_text,
  tried,
  within,
)
from jaxgpt.data import pipeline
from jaxgpt.errors import UserError
from jaxgpt.hf.weight_source import WEIGHT_SOURCES
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import init_from
from jaxgpt.run import run_folder as run_folder_lib
from jaxgpt.text.prepare import shards
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import compiled_step, train_step

_PROBE_SECONDS = 60  # clients of buckets try again for minutes


def examine(load=None, folder=None, step=True):
  """Looks at the machine and, as far as they are given, at a config, its data and a run folder.

  Args:
    load: a function that returns a config, see `config.load`; or None.
    folder: the run folder, or None.
    step: whether to compile a step and run it once.

  Yields:
    `Finding`s, as soon as each is known.
  """
  yield from environment_checks.versions()
  yield from environment_checks.cluster()
  started = False
  for finding in environment_checks.devices():
    started = started or (finding.topic == "devices" and finding.status == OK)
    yield finding
  c = None
  if load is not None:
    c, finding = tried("config", load)
    yield finding or Finding(OK, "config", "every key and value is known")
  found = {}
  if c is not None:
    yield from data(c, found)
    if started and "tokenizer" in found:
      yield from model(found, step)
  if folder is not None:
    yield from run_folder(folder, found)


def data(c, found):
  """Each prepared folder of the config, its shards, and a batch.

  Args:
    c: the config.
    found: gets 'c' (resolved), 'tokenizer' and 'batch' of the first step, where they can be read.
  """
  for folder in pipeline.folders(c.data.path):
    manifest, finding = tried("data", lambda folder=folder: shards.read_manifest(folder))
    if finding:
      yield finding
      return
    total = manifest["total"]
    yield Finding(
      OK,
      "data",
      f"{folder}: {total['documents']:,} documents, {total['tokens']:,} "
      f"tokens; its manifest is whole, digest {manifest['digest'][:12]}",
    )
  both, finding = tried("data", lambda: batches_lib.load_tokenizer_and_config(c))
  if finding:
    yield finding
    return
  found["tokenizer"], found["c"] = both
  for split in ("validation", "train"):
    yield _first_batch(split, found)


def _first_batch(split, found):
  """Reads it; keeps that of the training split in `found`."""
  before, c = time.monotonic(), found["c"]
  batches, finding = tried(
    "data",
    lambda: (
      batches_lib.training_data(c) if split == "train" else batches_lib.split_batches(c, split)
    ),
  )
  if finding:
    return finding
  try:
    with contextlib.closing(batches.iterate(prefetch=1)) as iterator:
      batch = next(iterator)
  except UserError as e:
    return Finding(PROBLEM, "data", str(e))
  except Exception as e:  # ArrayRecord, zstd and the file system share no class
    return Finding(
      PROBLEM,
      "data",
      f"the first batch of {split} can't be read "
      f"({type(e).__name__}: {(str(e).splitlines() or ['?'])[0]}): the prepared "
      "folder is damaged; run `jaxgpt data` again",
    )
  if split == "train":
    found["batch"] = batch
  return Finding(
    OK,
    "data",
    f"{split}: index and first batch took {time.monotonic() - before:.1f} s; {batches.summary()}",
  )


def model(found, step):
  """Whether the devices divide the batch and the parameters; then one step, on zeros.

  Args:
    found: see `data`; gets 'mesh' and 'parts'.
    step: whether to run the step.
  """
  c = found["c"]

  def build():
    mesh = mesh_lib.make(c.mesh)
    mesh_lib.check_batch(mesh.shape, c.data.batch_size, c.optim.accumulate)
    mesh_lib.check_batch(mesh.shape, c.eval.batch_size, key="eval.batch_size")
    return mesh, build_lib.build(c, mesh)

  both, finding = tried("mesh", build)
  if finding:
    yield finding
    return
  found["mesh"], found["parts"] = both
  axes = " x ".join(f"{axis}={size}" for axis, size in found["mesh"].shape.items() if size > 1)
  num = sum(x.size for x in jax.tree.leaves(train_step.weights(found["parts"].state)))
  yield Finding(
    OK,
    "mesh",
    f"{axes or 'one device'}; {num:,} parameters, "
    f"{size_text(state_bytes(found['parts'].state))} of state in all"
    + (f"; {pipe}" if (pipe := found["parts"].model.pipeline) else ""),
  )
  if c.init_from:
    _, finding = tried("init_from", lambda: init_from.check_source(c.init_from, WEIGHT_SOURCES))
    yield finding or Finding(OK, "init_from", f"{c.init_from} holds a model")
  if step and "batch" in found:
    yield from dry_step(found)


def state_bytes(state):
  """Bytes of a tree of arrays or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def dry_step(found):
  """Compiles the train step, or takes `mesh.compiled_step`, and runs it once on a batch of zeros."""
  c, mesh, parts = found["c"], found["mesh"], found["parts"]
  zeros = jax.tree.map(np.zeros_like, found["batch"])
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), zeros)
  loaded = []

  def instead(lowered):
    if not c.mesh.compiled_step:
      return None
    compiled, why = compiled_step.load(c.mesh.compiled_step, lowered, mesh, c.mesh.compiler_options)
    loaded.append(
      Finding(
        OK if compiled else WARNING,
        "step",
        c.mesh.compiled_step + (" is this step" if compiled else f" is not used: {why}"),
      )
    )
    return compiled

  try:
    with jax.set_mesh(mesh):
      before = time.monotonic()
      step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
      compiled = train_step.compile(
        step, parts.state, shapes, mesh, c.mesh.compiler_options, instead
      )
      compiling = time.monotonic() - before
      state = train_step.first_state(parts.model, parts.tx, c.seed, parts.state)
      jax.block_until_ready(state)
      before = time.monotonic()
      jax.block_until_ready(compiled(state, batches_lib.to_devices(zeros, mesh)))
      seconds = time.monotonic() - before
  except jax.errors.JaxRuntimeError as e:
    reason = (str(e).splitlines() or ["?"])[0][:300]
    cure = (
      "it does not fit: a smaller data.batch_size, more optim.accumulate, model.remat=full "
      "or more devices under mesh.fsdp"
      if "RESOURCE_EXHAUSTED" in str(e)
      else "see the versions above"
    )
    yield Finding(PROBLEM, "step", f"a step on zeros fails: {reason}; {cure}")
    return
  except UserError as e:
    yield Finding(PROBLEM, "step", str(e))
    return
  except (
    Exception
  ) as e:  # what tracing raises, of JAX and of libraries for kernels, shares no class
    yield Finding(
      PROBLEM,
      "step",
      f"the step can't be made: {type(e).__name__}: {(str(e).splitlines() or ['?'])[0][:300]}",
    )
    return
  yield from loaded
  memory = compiled.memory_analysis()
  used = (
    f", {size_text(memory.argument_size_in_bytes + memory.temp_size_in_bytes)} a device"
    if (memory)
    else ""
  )
  yield Finding(
    OK,
    "step",
    f"compiled in {compiling:.1f} s; the first step, on zeros, took {seconds * 1e3:.0f} ms{used}",
  )


def run_folder(folder, found):
  """Whether the run folder can be written, holds this run or none, and has room.

  Args:
    folder: `--workdir`.
    found: see `model`.
  """
  folder = epath.Path(folder)
  where, error = within(_PROBE_SECONDS, lambda: probe(folder))
  if error:
    yield Finding(
      PROBLEM,
      "workdir",
      f"{folder} can't be written ({type(error).__name__}: "
      f"{error}); choose another --workdir, or change its permissions or your "
      "credentials",
    )
    return
  yield Finding(OK, "workdir", f"{where} takes files: written, renamed, read and deleted")
  if run_folder_lib.is_run(folder):
    yield _same_run(folder, found)
  elif run_folder_lib.holds_something_else(folder):
    yield Finding(
      PROBLEM, "workdir", f"{folder} is not empty and holds no run; choose a new folder"
    )
  if "://" not in str(folder):
    yield from room(shutil.disk_usage(where).free, found)


def _same_run(folder, found):
  old, finding = tried("workdir", lambda: run_folder_lib.read_config(folder))
  if finding:
    return finding
  changed = config.difference(old, found["c"]) if "c" in found else []
  if not changed:
    what = "this run, and it would go on" if "c" in found else "a run"
    return Finding(OK, "workdir", f"{folder} holds {what}")
  lines = "; ".join(f"{key} was {a!r}, is {b!r}" for key, a, b in changed[:5])
  return Finding(
    PROBLEM,
    "workdir",
    f"{folder} holds a run of another config ({lines}): give the "
    "old values to go on with it, or another --workdir to start anew",
  )


def probe(folder):
  """Writes, syncs, renames, reads and deletes a file in a folder, or where it would be made.

  Returns:
    The folder that was tried: the nearest one that exists, of a local path; a bucket's as it is.

  Raises:
    Whatever the file system raises; OSError where what was read is not what was written.
  """
  remote = "://" in str(folder)
  where = folder if remote else next(p for p in (folder, *folder.absolute().parents) if p.exists())
  if not where.is_dir() and not remote:
    raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(where))
  first, second = (where / f".jaxgpt-doctor-{uuid.uuid4().hex}{end}" for end in ("", ".renamed"))
  text = "a probe of jaxgpt doctor; it may be deleted\n"
  try:
    with first.open("w") as f:
      f.write(text)
      f.flush()
      if not remote:
        os.fsync(f.fileno())
    first.replace(second)
    if second.read_text() != text:
      raise OSError(errno.EIO, "what was read back is not what was written", str(second))
  finally:
    for path in (first, second):
      with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
  return where


def room(free, found):
  """Whether the checkpoints fit on a disk with so many free bytes."""
  if "parts" not in found:
    yield Finding(OK, "room", f"{size_text(free)} free")
    return
  one, keep = state_bytes(found["parts"].state), found["c"].checkpoint.keep or 1
  need = one * (keep + 1)  # the new one is whole before the oldest goes
  text = (
    f"{size_text(free)} free; a checkpoint takes {size_text(one)}, and checkpoint.keep="
    f"{keep} needs {size_text(need)} while one is saved"
  )
  if free < 2 * one:
    yield Finding(PROBLEM, "room", f"{text}: make room, or choose another --workdir")
  elif free < need:
    yield Finding(WARNING, "room", f"{text}: make room, or lower checkpoint.keep")
  else:
    yield Finding(OK, "room", text)
