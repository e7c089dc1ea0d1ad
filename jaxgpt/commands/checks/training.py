"""Checks of a config: its data, its mesh, and one training step on zeros."""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxgpt.commands.checks.finding import (
  OK,
  PROBLEM,
  WARNING,
  Finding,
  Known,
  tried,
)
from jaxgpt.data import pipeline, verify
from jaxgpt.errors import UserError, first_line
from jaxgpt.hf.weight_source import WEIGHT_SOURCES
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import init_from, teacher
from jaxgpt.run.process import text_table
from jaxgpt.text.prepare import shards
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import compiled_step, train_step
from jaxgpt.tree import PyTree

_READ_BYTES = 1 << 30  # of a prepared folder, that are read to verify it


def data(c: ml_collections.ConfigDict, known: Known) -> Iterator[Finding]:
  """Checks each prepared folder of the config, its shards, and the first batch of each split.

  Args:
    c: The config.
    known: Gets the resolved `c` and the `batch` of the first step, if they can be read.
  """
  for folder in pipeline.folders(c.data.path):
    manifest, finding = tried("data", functools.partial(shards.read_manifest, folder))
    if manifest is None:
      yield from filter(None, [finding])
      return
    total = manifest["total"]
    found = verify.verify(folder, _READ_BYTES)
    unread = f" and the sizes of {found.unread} large ones" if found.unread else ""
    yield Finding(
      OK,
      "data",
      f"{folder}: {total['documents']:,} documents, {total['tokens']:,} tokens; its manifest is "
      f"whole, digest {manifest['digest'][:12]}; {found.read} files{unread} were compared with it",
    )
    for problem in found.problems:
      yield Finding(PROBLEM, "data", f"{problem}; run `jaxgpt data` again")
  both, finding = tried("data", lambda: batches_lib.load_tokenizer_and_config(c))
  if both is None:
    yield from filter(None, [finding])
    return
  tokenizer, known.c = both
  settled, finding = tried(
    "data", lambda: teacher.settle(known.c, WEIGHT_SOURCES, tokenizer=tokenizer)
  )
  if settled is None:
    yield from filter(None, [finding])
    return
  known.c = settled.c
  for split in ("validation", "train"):
    if split == "train" or split in pipeline.splits_with_documents(known.c.data.path):
      yield _first_batch(known.c, split, known)
    else:
      yield Finding(
        WARNING,
        "data",
        "there is no validation split, so the run would not be evaluated: give jaxgpt data "
        "--validation a share or files",
      )


def _first_batch(c: ml_collections.ConfigDict, split: str, known: Known) -> Finding:
  """Reads the first batch of a split, and keeps that of the training split in `known`."""
  before = time.monotonic()
  batches, finding = tried(
    "data",
    lambda: (
      batches_lib.training_data(c) if split == "train" else batches_lib.split_batches(c, split)
    ),
  )
  if finding:
    return finding
  assert batches is not None
  try:
    with contextlib.closing(batches.iterate(prefetch=1)) as iterator:
      batch = next(iterator)
  except UserError as e:
    return Finding(PROBLEM, "data", str(e))
  except Exception as e:  # ArrayRecord, zstd and the file system share no class
    return Finding(
      PROBLEM,
      "data",
      f"the first batch of {split} cannot be read ({type(e).__name__}: {first_line(e)}): the "
      "prepared folder is damaged; run `jaxgpt data` again",
    )
  if split == "train":
    known.batch = batch
  return Finding(
    OK,
    "data",
    f"{split}: index and first batch took {time.monotonic() - before:.1f} s; {batches.summary()}",
  )


def model(known: Known, step: bool) -> Iterator[Finding]:
  """Checks that the devices divide the batch and the parameters, and runs one step.

  Args:
    known: As `data` left it. Gets `mesh` and `parts`.
    step: Whether to run the step.
  """
  c = known.c
  assert c is not None

  def build() -> tuple[jax.sharding.Mesh, build_lib.Parts]:
    mesh = mesh_lib.make(c.mesh)
    return mesh, build_lib.build(c, mesh, resumed=known.resumed)

  both, finding = tried("mesh", build)
  if both is None:
    yield from filter(None, [finding])
    return
  known.mesh, known.parts = both
  state = known.parts.state
  axes = " x ".join(f"{axis}={size}" for axis, size in known.mesh.shape.items() if size > 1)
  total = text_table.size(state_bytes(state))
  num = sum(x.size for x in jax.tree.leaves(train_step.own_weights(state)))
  yield Finding(
    OK,
    "mesh",
    f"{axes or 'one device'}; {num:,} parameters, {total} of state in total"
    + (f"; {pipe}" if (pipe := known.parts.model.pipeline) else ""),
  )
  if c.init_from:
    _, finding = tried("init_from", lambda: init_from.inspect(c.init_from, WEIGHT_SOURCES))
    yield finding or Finding(OK, "init_from", f"{c.init_from} holds a model")
  if step and known.batch is not None:
    yield from dry_step(known)


def state_bytes(state: PyTree) -> int:
  """Bytes of a tree of arrays or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def dry_step(known: Known) -> Iterator[Finding]:
  """Compiles the train step, or loads `mesh.compiled_step`, and runs it on a batch of zeros.

  Args:
    known: As `model` left it.
  """
  loaded: list[Finding] = []
  try:
    compiled, compiling, seconds = _run_on_zeros(known, loaded)
  except jax.errors.JaxRuntimeError as e:
    cure = (
      "it does not fit: a smaller data.batch_size, more optim.accumulate, model.remat=full "
      "or more devices under mesh.fsdp"
      if "RESOURCE_EXHAUSTED" in str(e)
      else "see the versions above"
    )
    yield Finding(PROBLEM, "step", f"a step on zeros fails: {first_line(e, 300)}; {cure}")
    return
  except UserError as e:
    yield Finding(PROBLEM, "step", str(e))
    return
  except Exception as e:  # errors of tracing, of JAX and of kernel libraries share no class
    yield Finding(
      PROBLEM, "step", f"the step cannot be made: {type(e).__name__}: {first_line(e, 300)}"
    )
    return
  yield from loaded
  used = ""
  if memory := compiled.memory_analysis():
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used = f", {text_table.size(total)} per device"
  yield Finding(
    OK,
    "step",
    f"compiled in {compiling:.1f} s; the first step, on zeros, took {seconds * 1e3:.0f} ms{used}",
  )


def _run_on_zeros(known: Known, loaded: list[Finding]) -> tuple[Any, float, float]:
  """Compiles and runs one step.

  Args:
    known: As `model` left it.
    loaded: Gets a finding on `mesh.compiled_step`, if it is set.

  Returns:
    (the compiled step, seconds of compiling, seconds of the step).
  """
  c, mesh, parts = known.c, known.mesh, known.parts
  assert c is not None
  zeros = jax.tree.map(np.zeros_like, known.batch)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), zeros)

  def instead(lowered: Any) -> Any:
    if not c.mesh.compiled_step:
      return None
    compiled, why = compiled_step.load(c.mesh.compiled_step, lowered, mesh, c.mesh.compiler_options)
    text = " is this step" if compiled else f" is not used: {why}"
    loaded.append(Finding(OK if compiled else WARNING, "step", c.mesh.compiled_step + text))
    return compiled

  with jax.set_mesh(mesh):
    before = time.monotonic()
    step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
    compiled = train_step.compile(step, parts.state, shapes, mesh, c.mesh.compiler_options, instead)
    compiling = time.monotonic() - before
    state = train_step.first_state(parts.model, parts.tx, c.seed, parts.state)
    jax.block_until_ready(state)
    before = time.monotonic()
    jax.block_until_ready(compiled(state, batches_lib.to_devices(zeros, mesh)))
    return compiled, compiling, time.monotonic() - before
