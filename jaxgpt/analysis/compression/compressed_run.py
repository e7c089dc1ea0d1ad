"""Run folders of compressed models: complete runs, with a record of how they were made."""

import json
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from jaxgpt import config
from jaxgpt.analysis import token_rows
from jaxgpt.analysis.compression import calibration, masks, methods, prune, quantize, structured
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.model import lora
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import generation, run_folder
from jaxgpt.run.compression import quantized_weights
from jaxgpt.run.compression import record as record_lib
from jaxgpt.training import objectives
from jaxgpt.tree import PyTree


class Sizes(NamedTuple):
  """Bytes of a model's weights as they are stored, and in float32."""

  stored: int
  plain: int


class Calibration(NamedTuple):
  """The text on which a method looks at the inputs of matrices.

  Attributes:
    data: A prepared folder. None: the run's own data.
    split: Split of the data.
    rows: Number of rows of `data.seq_len` tokens.
  """

  data: str | None = None
  split: str = "train"
  rows: int = methods.ROWS


def opened(folder: epath.PathLike, step: int | str | None = None) -> load.Run:
  """Loads a run as a plain model: adapters merged, the average if it keeps one, nothing frozen.

  Its config is that of the runs to be made from it: their models are trained whole and by
  themselves, so an objective that compares the model with a fixed one becomes 'causal_lm'.

  Args:
    folder: The run folder.
    step: Step of the checkpoint, or 'best'. None: the newest.

  Raises:
    UserError: There is no such run or checkpoint.
  """
  run = load.load(folder, step)
  c = run.c.copy_and_resolve_references()
  params = run.params
  if c.model.lora.rank:
    params = lora.merge(params, c.model.lora)
    c.model.lora.rank = 0
  if objectives.find(c).fixed(c):
    c = token_rows.as_causal_lm(c)
  c.optim.update(dict(ema=0.0, trainable=(), frozen=()))
  c.checkpoint.best = ""
  c.init_from = str(folder)
  mesh, parts = load.place(c)
  placed = jax.tree.map(
    lambda x, like: jax.device_put(x, like.sharding), params, parts.state["params"]
  )
  return run._replace(c=c, parts=parts, mesh=mesh, params=placed, fixed=None)


def check_new(folder: epath.PathLike) -> None:
  """Raises a UserError if something is in the way of a new run folder."""
  if epath.Path(folder).exists():
    raise UserError(f"--to={folder} exists; choose another folder, or remove it")


def calibrated(run: load.Run, calibration_text: Calibration) -> tuple[list[PyTree], dict[str, Any]]:
  """The batches of a calibration, and its entry in the record.

  Raises:
    UserError: See `token_rows.open_split`.
  """
  data, split, rows = calibration_text
  batches, digest = calibration.rows(run, data, split, rows)
  read = sum(len(batch["tokens"]) for batch in batches)
  where = data or run.c.data.path
  return batches, {"data": where, "split": split, "rows": read, "digest": digest}


def pruned(
  source: epath.PathLike,
  folder: epath.PathLike,
  settings: prune.Settings,
  calibration_text: Calibration | None = None,
  step: int | str | None = None,
) -> dict[str, tuple[int, int]]:
  """Prunes single weights of a run into a new run folder.

  Args:
    source: The run folder.
    folder: The folder to make.
    settings: What to prune and how.
    calibration_text: For Wanda and SparseGPT.
    step: As for `opened`.

  Returns:
    {path: (zeros, numbers)} of the pruned parameters.

  Raises:
    UserError: Something is in the way, or as in `prune.prune`.
  """
  check_new(folder)
  settings.check()
  run = opened(source, step)
  batches, text = calibrated(run, calibration_text) if calibration_text else ([], None)
  found = prune.prune(run, settings, batches)
  record = {
    "method": settings.method,
    "sparsity": str(settings.sparsity),
    "scope": settings.compared,
    "match": list(settings.match),
    "calibration": text,
    "zeros": {path: list(counts) for path, counts in found.zeros.items()},
  }
  write(run, source, folder, found.params, run.c, {"made_by": "jaxgpt prune", **record})
  return found.zeros


def smaller(
  source: epath.PathLike,
  folder: epath.PathLike,
  method: str,
  count: int,
  calibration_text: Calibration,
  step: int | str | None = None,
) -> structured.Removed:
  """Removes layers, heads or columns of a run into a new run folder.

  Args:
    source: The run folder.
    folder: The folder to make.
    method: One of `methods.STRUCTURED`.
    count: Number of them to remove, of heads and columns in each layer.
    calibration_text: The text that decides.
    step: As for `opened`.

  Returns:
    What was removed.

  Raises:
    UserError: Something is in the way, or as in `structured.remove`.
  """
  check_new(folder)
  run = opened(source, step)
  batches, text = calibrated(run, calibration_text)
  found = structured.remove(run, method, count, batches)
  record = {
    "method": method,
    "changes": {f"model.{key}": [run.c.model[key], value] for key, value in found.changes.items()},
    "calibration": text,
    "removed": found.removed,
    "scores": found.scores,
  }
  run.c.model.update(found.changes)
  write(run, source, folder, found.params, run.c, {"made_by": "jaxgpt prune", **record})
  return found


def quantized(
  source: epath.PathLike,
  folder: epath.PathLike,
  settings: quantize.Settings,
  calibration_text: Calibration | None = None,
  activations: bool = False,
  step: int | str | None = None,
) -> Sizes:
  """Quantizes the weights of a run into a new run folder.

  Args:
    source: The run folder.
    folder: The folder to make.
    settings: What to quantize and how.
    calibration_text: For GPTQ and AWQ.
    activations: Whether the new run computes with activations in 8 bits too (`model.quantize`).
    step: As for `opened`.

  Returns:
    Bytes of the weights as the new run stores them, and in float32.

  Raises:
    UserError: Something is in the way, or as in `quantize.quantize`.
  """
  check_new(folder)
  run = opened(source, step)
  batches, text = calibrated(run, calibration_text) if calibration_text else ([], None)
  found = quantize.quantize(run, settings, batches)
  record = {
    "method": settings.method,
    "bits": settings.bits,
    "group": settings.group,
    "match": list(settings.match),
    "embeddings": settings.outside,
    "activations": "int8" if activations else "",
    "calibration": text,
    **({"exponents": found.exponents} if found.exponents else {}),
    **quantized_weights.to_record(found.forms),
  }
  if activations:
    run.c.model.quantize = "int8"
  write(run, source, folder, found.stored, run.c, {"made_by": "jaxgpt quantize", **record})
  size = lambda params: sum(x.nbytes for x in jax.tree.leaves(params))
  return Sizes(size(found.stored), size(run.params))


def write(
  run: load.Run,
  source: epath.PathLike,
  folder: epath.PathLike,
  params: PyTree,
  c: ml_collections.ConfigDict,
  record: dict[str, Any],
) -> None:
  """Writes the run folder of a model that was made from another run.

  Args:
    run: The other run, from `opened`.
    source: Its folder.
    folder: The folder to make.
    params: The new weights.
    c: The new run's resolved config.
    record: For compression.json, with `made_by`.
  """
  folder = epath.Path(folder)
  before = json.loads(run_folder.config_path(epath.Path(source)).read_text()).get("origin", {})
  old = config.flatten(run_folder.read_config(source))
  origin = {
    key: before.get(key, "base") if old.get(key) == value else record["made_by"]
    for key, value in config.flatten(c).items()
  }
  run_folder.enter(folder, c, origin, run.mesh, run.data_digest, run.tokenizer, run.step)
  generation.write(folder, run.generation)
  record_lib.write(folder, {"source": str(source), "source_step": run.step, **record})
  checkpoints = checkpoints_lib.Checkpoints(folder / run_folder.CHECKPOINTS)
  state = {"step": np.int32(run.step), "nonfinite_step": np.int32(-1), "params": params}
  checkpoints.save(state)
  checkpoints.close()
  run_folder.note_saved(folder, run.step)


def share(zeros: dict[str, tuple[int, int]]) -> float:
  """Share of zeros in pruned parameters."""
  return sum(n for n, _ in zeros.values()) / max(sum(size for _, size in zeros.values()), 1)


def sparsity_of(text: str | None) -> masks.Sparsity:
  """The value of --sparsity.

  Raises:
    UserError: It is missing, or no sparsity.
  """
  if text is None:
    raise UserError("--sparsity is missing: give the share of weights to remove, or N:M")
  return masks.parse(text)
