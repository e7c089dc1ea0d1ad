"""A run folder put to use: its weights are evaluated and sampled."""

from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from jaxgpt import config, tree
from jaxgpt.errors import UserError
from jaxgpt.inference import sampling as sampling_lib
from jaxgpt.model.attention import choose
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import init_from, run_folder
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import evaluation


class Run(NamedTuple):
  """What is needed to use a trained model."""

  c: ml_collections.ConfigDict
  parts: build_lib.Parts
  mesh: jax.sharding.Mesh
  params: Any
  step: int
  tokenizer: Any
  data_digest: str


def load(folder, step=None):
  """Opens a run on the devices at hand, sharded over all of them.

  Args:
    folder: the run folder.
    step: which checkpoint; None: the newest.

  Returns:
    A `Run`. Its weights are the moving average where the run keeps one.

  Raises:
    UserError: no run, or no checkpoint of that step.
  """
  folder = epath.Path(folder)
  c = run_folder.read_config(folder)
  tokenizer = tokenizer_lib.load(run_folder.tokenizer_folder(folder))
  mesh, parts = place(c)
  name = "ema" if c.optim.ema else "params"
  checkpoints = checkpoints_lib.Checkpoints(folder / run_folder.CHECKPOINTS, read_only=True)
  wanted = {name: parts.state[name], "step": parts.state["step"]}
  state, _ = checkpoints.restore(wanted, step)
  checkpoints.close()
  params = tree.merge(state[name], checkpoints_lib.load_frozen(folder, parts.state).get("frozen"))
  return Run(
    c,
    parts,
    mesh,
    params,
    int(state["step"]),
    tokenizer,
    run_folder.read_starts(folder)[0]["data_digest"],
  )


def place(c):
  """(mesh, parts) on the devices at hand: sharded where they divide the model, copies if not.

  Without stages, which one token after the other could not keep busy.
  """
  copies = config.base().mesh
  copies.update(dict(data=-1, fsdp=1))
  own = [c.mesh] if c.mesh.stage == 1 else []
  for section in (*own, config.base().mesh, copies):
    try:
      mesh = mesh_lib.make(section)
      here = c.copy_and_resolve_references()
      here.mesh.update(section)
      if here.model.attention in choose.KERNELS:  # perhaps not of these devices
        here.model.attention = "auto"
      return mesh, build_lib.build(here, mesh)
    except UserError:
      if section is copies:
        raise


def evaluate_run(run, split="validation", limit=0, batch_size=None, data=None):
  """The loss of a run on a split of the data it was trained on.

  Args:
    run: from `load`.
    data: where that data is now; None: where it was.
    split: 'validation' or 'test'; 'train' works too.
    limit: batches; 0: the whole split.
    batch_size: rows a batch; None: the config's, rounded up to what the devices divide.

  Returns:
    See `evaluate.evaluate`.

  Raises:
    UserError: the data is not there, or is not what the run was trained on.
  """
  c = run.c.copy_and_resolve_references()
  c.data.path = data or c.data.path
  if not c.data.path:
    raise UserError(
      "an imported model has no data of its own; say where prepared text is with --data=DIR"
    )
  rows = batch_size or run.c.eval.batch_size
  batches = batches_lib.split_batches(c, split, -(-rows // run.mesh.size) * run.mesh.size)
  if not run.data_digest:  # an imported model has no data of its own
    if not init_from.same_tokens(batches_lib.load_tokenizer_and_config(c)[0], run.tokenizer):
      raise UserError(
        f"{c.data.path} was tokenized with another tokenizer than the imported "
        "model's; prepare it with jaxgpt data --tokenizer=RUN/tokenizer"
      )
  else:
    check_data(batches, run.data_digest, c.data.path)
  with jax.set_mesh(run.mesh):
    return evaluation.evaluate_on(
      batches, run.mesh, c.data, evaluation.make_step(run.parts.objective), run.params, limit
    )


def check_data(batches, digest, path):
  """Raises a UserError where batches are not of the data that a run's digest names."""
  if batches.digest != digest:
    raise UserError(
      f"{path} is not the data of this run: its manifest's digest is "
      f"{batches.digest[:12]}, the run's was {digest[:12]}; say where the run's data "
      "is with --data=DIR"
    )


class Sampling(NamedTuple):
  """How tokens are drawn; see `generate.filter_logits`."""

  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def check(self):
    """Raises a UserError that names a value out of range."""
    for name, ok, what in (
      ("temperature", self.temperature >= 0, "at least 0"),
      ("top_k", self.top_k >= 0, "at least 0"),
      ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
      ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
    ):
      if not ok:
        raise UserError(f"--{name}={getattr(self, name)} must be {what}")


_DEFAULT_SAMPLING = Sampling()


class Sampler:
  """Text from a run; compiled once for all prompts and settings."""

  def __init__(self, run, num_samples=1):
    """Args: run: from `load`. num_samples: texts a call."""
    self._run, self._num_samples = run, num_samples
    self._context = run.c.data.seq_len
    self._generate = sampling_lib.make(
      run.parts.model, self._context, run.tokenizer.eos_id, run.tokenizer.vocab_size
    )

  def __call__(self, prompt, max_new=200, sampling=_DEFAULT_SAMPLING, seed=0):
    """Continues a prompt.

    Args:
      prompt: text; may be empty.
      max_new: tokens at most; the context is the other limit.
      sampling: a `Sampling`.
      seed: of the draws.

    Returns:
      A list of `num_samples` texts, without the prompt.

    Raises:
      UserError: the prompt leaves no room for a new token, or a setting is out of range.
    """
    sampling.check()
    run, tokenizer = self._run, self._run.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(ids) >= self._context:
      raise UserError(
        f"the prompt has {len(ids)} tokens, the model's context {self._context} "
        f"(data.seq_len): shorten it by at least {len(ids) - self._context + 1}"
      )
    tokens = np.zeros((self._num_samples, self._context), np.int32)
    tokens[:, : len(ids)] = ids
    with jax.set_mesh(run.mesh):
      out, lengths = jax.device_get(
        self._generate(
          run.params,
          tokens,
          len(ids),
          min(max_new, self._context - len(ids)),
          jax.random.key(seed),
          sampling._replace(top_k=min(sampling.top_k, tokenizer.vocab_size)),
        )
      )
    return [
      tokenizer.decode([int(i) for i in row[len(ids) : n]])
      for row, n in zip(out, lengths, strict=True)
    ]
