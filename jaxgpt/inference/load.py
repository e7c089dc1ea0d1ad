"""A trained model in use: loads a run folder and evaluates its weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from etils import epath

from jaxgpt import config, tree
from jaxgpt.config import user_code
from jaxgpt.data import pipeline
from jaxgpt.errors import UserError
from jaxgpt.inference.sampling import Sampling
from jaxgpt.model import fixed_models
from jaxgpt.model.attention import choose
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import best, init_from, run_folder
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import generation as generation_lib
from jaxgpt.run.compression import quantized_weights
from jaxgpt.text.prepare import shards
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import evaluation, stored, uses
from jaxgpt.tree import PyTree


class Run(NamedTuple):
  """A trained model, ready for use.

  Attributes:
    c: The run's config.
    parts: The model and its objective, from `build.build`.
    mesh: The device mesh.
    params: All weights, on the mesh.
    step: Step of the checkpoint.
    tokenizer: The run's tokenizer.
    data_digest: Digest of the data that it was trained on, or '' for an imported model.
    generation: How its texts end and are drawn.
    fixed: Weights of the fixed models that its objective compares it with, by name.
  """

  c: ml_collections.ConfigDict
  parts: build_lib.Parts
  mesh: jax.sharding.Mesh
  params: PyTree
  step: int
  tokenizer: tokenizer_lib.Tokenizer
  data_digest: str
  generation: generation_lib.Generation
  fixed: PyTree | None = None

  @property
  def weights(self) -> PyTree:
    """All weights that the loss function reads: the model's and those of fixed models."""
    return tree.merge(self.params, self.fixed)

  @property
  def identity(self) -> dict[str, Any]:
    """What its answers depend on besides the request, as plain JSON: its config and its step."""
    c = self.c.copy_and_resolve_references()
    c.code_folder = ""  # depends on how the run folder is named
    return {"config": user_code.digest(c.to_json()), "step": self.step}


def load(
  folder: epath.PathLike,
  step: int | str | None = None,
  use: str = "export",
  devices: Sequence[jax.Device] | None = None,
  weights: str | None = None,
) -> Run:
  """Loads a run on the devices, sharded over all of them.

  Args:
    folder: The run folder.
    step: Step of the checkpoint, or 'best' for the one that `checkpoint.best` kept. None: the
      newest.
    use: What the caller wants to do with the model, one of `uses.USES`.
    devices: The devices. None: all.
    weights: 'ema', the moving average of the weights, or 'raw', the weights of the step. None: the
      moving average if the run keeps one.

  Returns:
    The run.

  Raises:
    UserError: There is no run, no checkpoint of that step, the run keeps no moving average, or the
      model lacks the use.
  """
  folder = epath.Path(folder)
  c = run_folder.read_config(folder)
  uses.check(c, use)  # before the weights are read
  if use == "evaluate" and c.objective.stored and stored.needed_to_evaluate(c):
    stored.check_of_run(c, folder)
  tokenizer = tokenizer_lib.load(run_folder.tokenizer_folder(folder))
  mesh, parts = place(c, devices)
  if weights == "ema" and not c.optim.ema:
    raise UserError(
      "--weights=ema: this run keeps no moving average of its weights (optim.ema=0); leave "
      "--weights out"
    )
  if weights == "raw" and c.optim.ema and isinstance(step, str):
    raise UserError(
      f"--weights=raw: --step={step} holds the moving average alone, with which the run was "
      "evaluated; leave --weights out"
    )
  name = "ema" if c.optim.ema and weights != "raw" else "params"
  where = folder / run_folder.CHECKPOINTS
  if isinstance(step, str):
    where, step = best.check(folder, step), None
  checkpoints = checkpoints_lib.Checkpoints(where, read_only=True)
  forms = quantized_weights.of_run(folder)
  stored_params = quantized_weights.stored_like(forms, parts.state[name])
  state, _ = checkpoints.restore({name: stored_params, "step": parts.state["step"]}, step)
  checkpoints.close()
  state[name] = quantized_weights.dequantized(forms, state[name], parts.state[name])
  frozen, fixed = fixed_models.split(parts.state.get("frozen"))
  if use != "generate":
    frozen |= fixed
  unchanging = checkpoints_lib.load_frozen(folder, {"frozen": frozen}).get("frozen")
  frozen, fixed = fixed_models.split(unchanging)
  return Run(
    c=c,
    parts=parts,
    mesh=mesh,
    params=tree.merge(state[name], frozen),
    step=int(state["step"]),
    tokenizer=tokenizer,
    data_digest=run_folder.read_starts(folder)[0]["data_digest"],
    generation=generation_lib.of_run(folder, c, tokenizer),
    fixed=fixed,
  )


def place(
  c: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.sharding.Mesh, build_lib.Parts]:
  """Builds a model on the devices: sharded if they divide it, replicated otherwise.

  Tries the run's own mesh, then the default mesh, then copies. A mesh with stages is skipped, since
  decoding, one token after the other, would leave most stages idle.

  Args:
    c: The resolved config of a run.
    devices: The devices. None: all.

  Returns:
    (mesh, parts of `build.build`).

  Raises:
    UserError: The model cannot be built on these devices at all.
  """
  copies = config.base().mesh
  copies.update(dict(data=-1, fsdp=1))
  own = [c.mesh] if c.mesh.stage == 1 else []
  for section in (*own, config.base().mesh):
    try:
      return _place_on(c, section, devices)
    except UserError:
      continue
  return _place_on(c, copies, devices)


def _place_on(
  c: ml_collections.ConfigDict,
  section: ml_collections.ConfigDict,
  devices: Sequence[jax.Device] | None,
) -> tuple[jax.sharding.Mesh, build_lib.Parts]:
  """Builds a model on the mesh of one `mesh` section."""
  mesh = mesh_lib.make(section, devices)
  here = c.copy_and_resolve_references()
  here.mesh.update(section)
  if here.model.attention in choose.KERNELS:  # these devices may not run the run's kernel
    here.model.attention = "auto"
  return mesh, build_lib.build(here, mesh, for_training=False)


def evaluate_run(
  run: Run,
  split: str = "validation",
  limit: int = 0,
  batch_size: int | None = None,
  data: str | None = None,
) -> dict[str, Any]:
  """Evaluates a run on a split of its own data, or of other data in the same tokens.

  Args:
    run: From `load`.
    split: See `open_split`.
    limit: Number of batches, 0: the whole split.
    batch_size: See `open_split`.
    data: See `open_split`.

  Returns:
    The metrics of `evaluation.evaluate`, and 'data_digest', the digest of the data's manifest.

  Raises:
    UserError: See `open_split`.
  """
  c, batches = open_split(run, split, batch_size, data)
  step = evaluation.make_step(run.parts.objective, run.mesh)
  with jax.set_mesh(run.mesh):
    result = evaluation.evaluate_on(batches, run.mesh, c.data, step, run.weights, limit)
  return {**result, "data_digest": batches.digest}


def open_split(
  run: Run, split: str = "validation", batch_size: int | None = None, data: str | None = None
) -> tuple[ml_collections.ConfigDict, pipeline.Batches]:
  """Opens a split of a run's own data, or of other data in the same tokens.

  Args:
    run: From `load`.
    split: 'validation', 'test' or 'train'.
    batch_size: Rows of a batch. None: that of the config, rounded up to a multiple of the devices.
    data: Folder of prepared data. None: the one that the run was trained on.

  Returns:
    (the run's config with this data, its batches).

  Raises:
    UserError: The data does not exist, lacks the split, or was tokenized with another tokenizer.
      Also raised if `data` is None and the run's data folder has changed, and if the model has no
      head.
  """
  c = run.c.copy_and_resolve_references()
  uses.check(c, "evaluate")
  if data:  # training weights are for the folders of the run's own data
    c.data.update(dict(path=data, weights=(), weight_changes=()))
  if not c.data.path:
    raise UserError(
      "an imported model has no data of its own; say where prepared text is with --data=DIR"
    )
  if not data and not all(map(shards.exists, pipeline.folders(c.data.path))):
    raise UserError(
      f"the run's data folder {c.data.path!r} holds no {shards.MANIFEST}; if it was moved, say "
      "where it is with --data=DIR"
    )
  m = c.model
  if not run.data_digest and m.head == "classifier" and m.num_labels > 1 and not m.label_names:
    raise UserError(
      "this run was imported by a version that did not record the names of its classes; import it "
      "again with jaxgpt import"
    )
  _check_split(c.data.path, split)
  rows = batch_size or run.c.eval.batch_size
  batches = batches_lib.split_batches(c, split, -(-rows // run.mesh.size) * run.mesh.size)
  if not data:
    check_data(batches, run.data_digest, c.data.path)
  elif batches.digest != run.data_digest:
    tokenizer = tokenizer_lib.load(epath.Path(pipeline.folders(data)[0]) / "tokenizer")
    if not init_from.same_tokens(tokenizer, run.tokenizer):
      raise UserError(
        f"--data={data} is in the tokens of another tokenizer ({tokenizer.digest[:12]}) than the "
        f"run ({run.tokenizer.digest[:12]}); prepare it with jaxgpt data --tokenizer=RUN/tokenizer"
      )
  if c.objective.stored and stored.needed_to_evaluate(c):
    if batches.digest != run.data_digest:
      raise UserError(
        f"--data={data}: objective.stored={c.objective.stored!r} has no numbers of the reference "
        "for other data than the run's; evaluate a split of the run's own"
      )
    batches = stored.annotated(c, batches, split)
  return c, batches


def _check_split(path: str, split: str) -> None:
  """Raises a UserError that names the splits there are, if the data has no document in this one."""
  there = pipeline.splits_with_documents(path)
  if split not in there:
    raise UserError(
      f"--split={split}: {path} has no {split} split; choose one of {', '.join(there)}, or name "
      "other data in the same tokens with --data=DIR"
    )


def check_data(batches: pipeline.Batches, digest: str, path: str) -> None:
  """Checks that batches are of the data with a run's digest.

  Args:
    batches: The batches.
    digest: Digest of the run's data.
    path: Folder of the batches, for the error message.

  Raises:
    UserError: They are not.
  """
  if batches.digest != digest:
    raise UserError(
      f"{path} is not the data of this run: its manifest's digest is "
      f"{batches.digest[:12]}, the run's was {digest[:12]}; say where the run's data "
      "is with --data=DIR"
    )


def sampling_defaults(run: Run) -> tuple[Sampling, list[str]]:
  """How a run's text is drawn where nothing else is said.

  Args:
    run: From `load`.

  Returns:
    (`Sampling()` with what the run's generation_config.json sets, keys of that file that are not
    followed).

  Raises:
    UserError: The file sets a value that is out of range.
  """
  found, ignored = generation_lib.sampling_defaults(run.generation.values, Sampling._fields)
  if "top_k" in found:
    found["top_k"] = int(found["top_k"])
  settings = Sampling()._replace(**found)
  settings.check()
  return settings, ignored
