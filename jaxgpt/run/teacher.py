"""The teacher of a distillation: its architecture in the config, and its weights.

`objective.teacher` names a run folder, or a folder of another format that the caller passes a
source for. A run records the teacher's architecture in `objective.teacher_config` and its weights
in RUN/teacher, so that it goes on and is evaluated without the folder.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
from etils import epath

from jaxgpt import config, tree
from jaxgpt.config.architecture import architecture
from jaxgpt.data import stages
from jaxgpt.errors import UserError
from jaxgpt.run import init_from, run_folder
from jaxgpt.storage import strict_json
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.text.tokenizers.base import Tokenizer

_LORA = "lora."  # keys of the `model` section that a teacher with adapters needs besides


class Settled(NamedTuple):
  """A config whose `objective.teacher_config` is settled.

  Attributes:
    c: The config.
    notes: Sentences for the user on what could not be checked.
  """

  c: ml_collections.ConfigDict
  notes: list[str]


def settle(
  c: ml_collections.ConfigDict,
  sources: Sequence[init_from.WeightSource] = (),
  *,
  tokenizer: Tokenizer | None = None,
  folder: epath.PathLike | None = None,
) -> Settled:
  """Fills in `objective.teacher_config`, if the config names a teacher.

  Args:
    c: A resolved config. It stays unchanged.
    sources: Formats of the teacher besides run folders.
    tokenizer: The tokenizer of the data, to compare with the teacher's. None: it is not known.
    folder: The run folder. If it holds a run, that run's record is taken.

  Raises:
    UserError: There is no such model, it is no causal language model, or its vocabulary or context
      does not fit.
  """
  name = c.objective.teacher
  if not name:
    return Settled(c, [])
  c = c.copy_and_resolve_references()
  if folder is not None and run_folder.is_run(epath.Path(folder)):
    c.objective.teacher_config = run_folder.read_config(folder).objective.teacher_config
    return Settled(c, [])
  try:
    found = init_from.inspect(name, sources)
  except UserError as e:
    raise _named(e) from e
  m, where = found.c_model, f"objective.teacher={name!r}"
  if m.head != "lm" or not m.causal:
    raise UserError(
      f"{where} has model.head={m.head!r} and model.causal={m.causal}: a teacher must be a causal "
      "language model"
    )
  if m.vocab_size != c.model.vocab_size:
    raise UserError(
      f"{where} has {m.vocab_size} tokens in its vocabulary, but model.vocab_size="
      f"{c.model.vocab_size}; set model.vocab_size={m.vocab_size}, with data in the teacher's "
      "tokens"
    )
  longest = max(stage.seq_len for stage in stages.of(c.data))
  if m.max_len < longest:
    own = f"data.seq_len={longest}"
    rows = own if longest == c.data.seq_len else f"data.stages has rows of {longest}"
    raise UserError(
      f"{where} has a context of {m.max_len} tokens, but {rows}; shorten the rows to {m.max_len}, "
      "or choose another teacher"
    )
  notes = []
  if tokenizer and found.tokenizer is None:
    notes.append(
      f"{where} holds no tokenizer that can be read, so jaxgpt can't check that data.path="
      f"{c.data.path!r} has the tokens that it was trained with"
    )
  if tokenizer and found.tokenizer and not init_from.same_tokens(found.tokenizer, tokenizer):
    raise UserError(
      f"data.path={c.data.path!r} was tokenized with another tokenizer than the one of {where}; "
      f"prepare it with jaxgpt data --tokenizer={tokenizer_lib.folder_of(name)}"
    )
  keys = architecture(m)
  if m.lora.rank:
    keys |= {key: value for key, value in config.flatten(m).items() if key.startswith(_LORA)}
  c.objective.teacher_config = strict_json.dumps(keys)
  return Settled(c, notes)


def config_of(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The resolved config with which the teacher is built: its architecture, the student's batches.

  Args:
    c: The student's config, from `settle`.
  """
  t = config.from_dict({"model": json.loads(c.objective.teacher_config)})
  t.model.dtype = c.model.dtype
  t.model.materialize, t.model.scan_unroll = c.model.materialize, c.model.scan_unroll
  t.data.update(dict(seq_len=c.data.seq_len, batch_size=c.data.batch_size))
  t.optim.accumulate = c.optim.accumulate
  t.mesh.update(c.mesh)
  return config.resolve(t)


def load(
  c: ml_collections.ConfigDict,
  abstract: tree.PyTree,
  sources: Sequence[init_from.WeightSource] = (),
) -> tree.PyTree:
  """Reads the teacher's weights onto the mesh.

  Args:
    c: The student's config, from `settle`.
    abstract: Shapes and shardings of the teacher's weights.
    sources: Formats besides run folders.

  Raises:
    UserError: The weights are not those of `objective.teacher_config`.
  """
  try:
    given = init_from.load(c.objective.teacher, config_of(c).model, abstract, sources)
  except UserError as e:
    raise _named(e) from e
  if lacking := given.report["initialized"]:
    raise UserError(
      f"objective.teacher={c.objective.teacher!r} lacks {', '.join(lacking[:5])}; name a whole "
      "model"
    )
  return tree.unflatten(given.params)


def _named(e: UserError) -> UserError:
  """The error of `init_from` with the teacher's key."""
  return UserError(str(e).replace("init_from=", "objective.teacher=", 1))
