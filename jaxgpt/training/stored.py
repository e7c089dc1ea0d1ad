"""What a fixed model says of each row of the data, computed once ahead and kept in a folder.

With `objective.stored` = DIR, the reference or the teacher need not stay in memory: before the
first step it reads each row once, and its numbers become arrays of the batches. They belong to a
row of a source, not to a step, so the order of the rows does not matter, nor where a run goes on.

  DIR/stored.json             what the numbers were made with, which `check` compares
  DIR/SPLIT.SOURCE.NAME.npy   an array [rows of the source, …] of numbers, SOURCE counted from 0

A run keeps a copy of stored.json, so that it never goes on with other numbers.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from jaxgpt import config, tree
from jaxgpt.config.architecture import architecture
from jaxgpt.config.keys import KEYS
from jaxgpt.data import pipeline
from jaxgpt.data.batch_source import BatchSource
from jaxgpt.errors import UserError
from jaxgpt.model import lora
from jaxgpt.parallel import distributed
from jaxgpt.run import digests, init_from
from jaxgpt.run import teacher as teacher_lib
from jaxgpt.storage import atomic, buckets, strict_json
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import objectives, xla_options
from jaxgpt.tree import PyTree

_FILE = "stored.json"
Compute = Callable[[PyTree, PyTree], Mapping[str, jax.Array]]  # (weights, batch) -> {name: array}


def splits(c: ml_collections.ConfigDict) -> list[str]:
  """The splits whose rows need stored numbers."""
  there = pipeline.splits_with_documents(c.data.path)
  wanted = ("train", "validation") if needed_to_evaluate(c) else ("train",)
  return [split for split in wanted if split in there]


def needed_to_evaluate(c: ml_collections.ConfigDict) -> bool:
  """Whether the objective cannot be evaluated without stored numbers."""
  entry = objectives.find(c).stored
  return entry is not None and entry.evaluates


def digest(params: PyTree, architecture: str) -> str:
  """A SHA-256 that identifies a model, however its weights are sharded.

  Args:
    params: The model's weights.
    architecture: Its architecture as text.
  """
  lines = [f"{path} {value}" for path, value in digests.of(params).items()]
  return hashlib.sha256("\n".join([architecture, *lines]).encode()).hexdigest()


def before_training(
  c: ml_collections.ConfigDict,
  run: epath.PathLike,
  mesh: jax.sharding.Mesh,
  parts: build_lib.Parts,
  state: PyTree | None,
  weight_sources: Sequence[init_from.WeightSource],
  tell: Callable[[Sequence[str]], None],
) -> None:
  """Fills `objective.stored` for a run, or checks it. All processes must call this.

  Args:
    c: The run's resolved config.
    run: The run folder, which exists.
    mesh: The device mesh.
    parts: From `build.build`.
    state: The state before the first step, or None if the run goes on from a checkpoint.
    weight_sources: Formats of a teacher besides run folders.
    tell: Prints lines in the first process.

  Raises:
    UserError: The folder holds numbers of other data, of other rows or of another model.
  """
  entry, record = objectives.find(c).stored, epath.Path(run) / _FILE
  if not c.objective.stored or entry is None:
    return
  if distributed.share(record.exists()):
    check_of_run(c, run)
    return
  if state is None:
    raise UserError(f"{record} is missing, so jaxgpt cannot check objective.stored; train anew")
  if c.objective.teacher:
    teacher, abstract = build_lib.teacher(c, mesh)
    params = teacher_lib.load(c, abstract, weight_sources)
    model = digest(params, c.objective.teacher_config)
    compute = objectives.make_stored(teacher, c)
  else:
    params = objectives.preference.reference_of(state["params"], state.get("frozen"))
    own = {p: x for p, x in tree.flatten(params).items() if not lora.is_adapter(p)}
    model = digest(own, strict_json.dumps(architecture(c.model)))
    compute = objectives.make_stored(parts.model, c)
  wanted = _prepare(c, mesh, compute, params, model, tell)
  if distributed.is_first():
    atomic.write(record, strict_json.dumps(wanted, indent=1))


def _prepare(
  c: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  compute: Compute,
  params: PyTree,
  model: str,
  tell: Callable[[Sequence[str]], None],
) -> dict[str, Any]:
  """Fills the folder, unless it has these numbers already. Returns the content of stored.json."""
  folder = _folder(c)
  found = {split: batches_lib.split_batches(c, split) for split in splits(c)}
  wanted = _identity(c, found["train"], model)
  exists = distributed.share((folder / _FILE).exists())
  if exists:
    check(c, wanted, "this run")
  else:
    rows = sum(batches.len_rows for batches in found.values())
    tell([f"objective.stored={c.objective.stored!r}: computing the numbers of {rows:,} rows …"])
    for split, batches in found.items():
      _compute(c, mesh, compute, params, batches, folder, split)
    if distributed.is_first():
      atomic.write(epath.Path(folder) / _FILE, strict_json.dumps(wanted, indent=1))
    distributed.barrier("stored numbers")
  return wanted


def check_of_run(c: ml_collections.ConfigDict, run: epath.PathLike) -> None:
  """Checks that the folder still holds the numbers that a run was trained with.

  Args:
    c: The run's resolved config.
    run: The run folder.

  Raises:
    UserError: It does not.
  """
  check(c, json.loads((epath.Path(run) / _FILE).read_text()), f"the run in {run}")


def check(c: ml_collections.ConfigDict, wanted: Mapping[str, Any], whose: str) -> None:
  """Checks that the folder holds certain numbers.

  Args:
    c: A resolved config.
    wanted: The content that stored.json must have.
    whose: Words on where `wanted` is from, such as "this run".

  Raises:
    UserError: It does not.
  """
  path = _folder(c) / _FILE
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(
      f"objective.stored={c.objective.stored!r}: {path} cannot be read ({e}); restore the folder"
    ) from e
  for key in wanted.keys() | found.keys():
    if wanted.get(key) != found.get(key):
      raise UserError(
        f"objective.stored={c.objective.stored!r} has numbers of {key} {found.get(key)!r:.40}, but "
        f"{whose} has {wanted.get(key)!r:.40}; name an empty folder"
      )


def annotated(
  c: ml_collections.ConfigDict, batches: pipeline.Batches, split: str
) -> pipeline.Batches:
  """Batches with the stored numbers of their rows as further arrays.

  Args:
    c: A resolved config.
    batches: Batches of a split in the config's rows, of any batch size.
    split: The split.

  Raises:
    UserError: The folder lacks the split, or has numbers of other rows.
  """
  folder = _folder(c)
  arrays = {}
  for name in shapes(c):
    files = [folder / f"{split}.{i}.{name}.npy" for i in range(len(batches.sources))]
    if not all(file.exists() for file in files):
      raise UserError(
        f"objective.stored={c.objective.stored!r} has no numbers of the {split} split, only of "
        f"{' and '.join(splits(c))}; evaluate one of these"
      )
    arrays[name] = [np.load(file, mmap_mode="r") for file in files]
    rows = [len(a) for a in arrays[name]], [s.pack.num_rows for s in batches.sources]
    if rows[0] != rows[1]:
      raise UserError(
        f"objective.stored={c.objective.stored!r} has numbers of {rows[0]} rows, the {split} split "
        f"has {rows[1]}; name an empty folder"
      )
  return batches.annotated(arrays)


def annotated_splits(
  c: ml_collections.ConfigDict, data: BatchSource, held_out: pipeline.Batches | None
) -> tuple[pipeline.Batches, pipeline.Batches | None]:
  """`annotated` for the training data, and for the validation split if evaluation needs it."""
  assert isinstance(data, pipeline.Batches), "the config's checks refuse streams"
  if held_out and "validation" in splits(c):
    held_out = annotated(c, held_out, "validation")
  return annotated(c, data, "train"), held_out


def shapes(c: ml_collections.ConfigDict) -> dict[str, tuple[tuple[int, ...], Any]]:
  """{array: (its shape without rows, dtype)} of the stored numbers, or {} if none are stored."""
  entry = objectives.find(c).stored
  return entry.shapes(c) if c.objective.stored and entry else {}


def _folder(c: ml_collections.ConfigDict) -> pathlib.Path:
  if buckets.is_remote(c.objective.stored):
    raise UserError(
      f"objective.stored={c.objective.stored!r} must be a folder of a file system that all hosts "
      "see"
    )
  return pathlib.Path(c.objective.stored)


def _identity(
  c: ml_collections.ConfigDict, batches: pipeline.Batches, model: str
) -> dict[str, Any]:
  """The content of stored.json."""
  flat = config.flatten(c)
  values = {name: flat[name] for name, key in KEYS.items() if key.stored}
  return {"format": 1, "data": batches.digest, "model": model, **values}


def _compute(
  c: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  compute: Compute,
  params: PyTree,
  batches: pipeline.Batches,
  folder: pathlib.Path,
  split: str,
) -> None:
  """Computes and writes the numbers of all rows of a split."""
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  options = xla_options.of_mesh(mesh, c.mesh.compiler_options)
  step = jax.jit(compute, out_shardings=everywhere, compiler_options=options)
  files: dict[str, list[np.ndarray]] = {}
  if distributed.is_first():
    folder.mkdir(parents=True, exist_ok=True)
    for name, (shape, dtype) in shapes(c).items():
      files[name] = [
        np.lib.format.open_memmap(
          folder / f"{split}.{i}.{name}.npy", "w+", dtype, (s.pack.num_rows, *shape)
        )
        for i, s in enumerate(batches.sources)
      ]
  ends = np.cumsum([s.pack.num_rows for s in batches.sources])
  at = 0
  share = batches_lib.host_share(mesh)
  for batch in batches.epoch_batches(threads=c.data.threads, prefetch=c.data.prefetch, **share):
    found = jax.device_get(step(params, batches_lib.to_devices(batch, mesh)))
    numbers = np.arange(at, min(at + batches.batch_size, batches.len_rows))
    at += batches.batch_size
    for name, of_sources in files.items():
      chosen = np.searchsorted(ends, numbers, side="right")
      for i in np.unique(chosen):
        here = numbers[chosen == i]
        of_sources[i][here - (ends[i] - len(of_sources[i]))] = found[name][here - numbers[0]]
  for array in (a for of_sources in files.values() for a in of_sources):
    array.flush()  # type: ignore[attr-defined]  # a memmap
