"""Import and export of models in Hugging Face's format.

An imported folder becomes a run at step 0, and a run is exported as a folder.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from jaxgpt import config, tree
from jaxgpt.errors import UserError
from jaxgpt.hf import adapters, convert, model_folder, parity, safetensors, weights
from jaxgpt.hf import labels as labels_lib
from jaxgpt.hf import tokenizer as hf_tokenizer
from jaxgpt.hf.families import Family
from jaxgpt.hf.quantized import compressed_tensors
from jaxgpt.inference import load
from jaxgpt.model import lora
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import generation, init_from, label_names, run_folder
from jaxgpt.run.compression import quantized_weights
from jaxgpt.storage import strict_json
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.training import build

# `task_type` of an adapter, by the class of transformers. Others are for features.
_PEFT_TASKS = {
  "causal": "CAUSAL_LM",
  "masked": "CAUSAL_LM",
  "classifier": "SEQ_CLS",
  "tags": "TOKEN_CLS",
  "answers": "QUESTION_ANS",
}
CONTEXT = 2048  # default limit of the rows that an imported run evaluates and samples


class Imported(NamedTuple):
  """A summary of an import.

  Attributes:
    family: The model's family, its `model_type`.
    parameters: Their number.
    bytes: Bytes of the tensors in the files.
    notes: Sentences on what was not read, or not as config.json says.
    certificate: The comparison with transformers, or None if none was asked for.
  """

  family: str
  parameters: int
  bytes: int
  notes: list[str]
  certificate: parity.Certificate | None


class ReadModel(NamedTuple):
  """A published model with its weights on the devices.

  Attributes:
    c: The config of a run with this model.
    mesh: The device mesh.
    parts: The model.
    params: Its weights.
    source: The folder that it was read from.
  """

  c: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  parts: build.Parts
  params: tree.PyTree
  source: model_folder.ModelFolder


def read_model(
  folder: epath.PathLike,
  *,
  dtype: str = "float32",
  seq_len: int | None = None,
  labels: Sequence[str] = (),
) -> ReadModel:
  """Reads a model in Hugging Face's format.

  Checks the architecture and the name and shape of each tensor before it reads any weights.

  Args:
    folder: Holds config.json and safetensors files.
    dtype: The config's `model.dtype`. Parameters are float32.
    seq_len: The config's `data.seq_len`. None: the model's context, at most `CONTEXT`.
    labels: As in `import_model`.

  Raises:
    UserError: Something is not supported, missing or left over.
  """
  source = model_folder.read(epath.Path(folder))
  if labels:
    if not source.fields.get("label_names"):
      raise UserError(f"labels={','.join(labels)}: the model has no classes; leave labels out")
    outputs = source.fields["num_labels"]
    if len(labels) != outputs:  # also (NUMBERS,), since a regression has no names
      raise UserError(
        f"labels={','.join(labels)}: the model has {outputs} outputs, {len(labels)} named; name "
        "each output once, in order"
      )
    source.fields["label_names"] = tuple(labels)
  objective = {}
  if source.fields["head"] == "classifier":
    hf_config = init_from.read_config_json(source.folder)
    objective["objective__name"] = labels_lib.objective(hf_config)
  c = convert.configured(
    source.fields,
    **objective,
    model__preset=source.family.model_type,
    model__dtype=dtype,
    init_from=str(folder),
    data__seq_len=seq_len or min(source.fields["max_len"], CONTEXT),
  )
  mesh, parts = load.place(c)
  abstract = parts.state["params"]
  published = convert.publish(source.family, c.model, abstract)
  match = convert.find(source.family, c.model, published, source.tensors, source.says_tied)
  convert.check(match, source.tensors, source.folder)
  if match.passed_over:
    names = ", ".join(match.passed_over[:3]) + (" …" if len(match.passed_over) > 3 else "")
    source.notes.append(f"{len(match.passed_over)} tensors are not part of the model: {names}")
  params = weights.complete(weights.load(match.matched, abstract), abstract)
  return ReadModel(c, mesh, parts, params, source)


def import_model(
  source: epath.PathLike,
  folder: epath.PathLike,
  *,
  dtype: str = "float32",
  seq_len: int | None = None,
  tokenizer: epath.PathLike | None = None,
  labels: Sequence[str] = (),
  certify: bool = False,
) -> Imported:
  """Makes a run folder at step 0 from a model in Hugging Face's format.

  Args:
    source: Folder with config.json, safetensors files and the tokenizer's files.
    folder: The run folder to make.
    dtype: The run's `model.dtype`. Parameters are float32.
    seq_len: The run's `data.seq_len`. None: the model's context, at most `CONTEXT`.
    tokenizer: File or folder of a tokenizer, if `source` has none.
    labels: Names of a classifier's classes in the order of its outputs, instead of id2label.
    certify: Compare with transformers first, and write the certificate into the run folder.

  Raises:
    UserError: Something is not supported, missing, left over, or in the way. With `certify` also if
      transformers is not installed or gives other outputs. Then there is no run folder.
  """
  folder = epath.Path(folder)
  if certify:
    parity.need()
  model = read_model(source, dtype=dtype, seq_len=seq_len, labels=labels)
  c = model.c
  tokens, notes = load_tokenizer(model.source.folder, tokenizer, c.model.vocab_size)
  certificate = None
  if certify:
    certificate = parity.certify(model.source.folder, c.model, model.params, tokens, "their dtype")
    if problems := parity.problems(certificate):
      raise UserError(f"--from={source}: {problems[0]}; no run was made")
  origin = {
    key: "config.json" if key.removeprefix("model.") in model.source.fields else "base"
    for key in config.flatten(c)
  }
  run_folder.enter(folder, c, origin, model.mesh, "", tokens)
  sizes = [leaf.size * leaf.dtype.itemsize for leaf in tree.flatten(model.params).values()]
  checkpoints = checkpoints_lib.Checkpoints(
    folder / run_folder.CHECKPOINTS, writing_gb=(max(sizes) + 1e6) / 1e9
  )
  if checkpoints.latest() is not None:
    raise UserError(f"--workdir={folder} holds this model already; choose another folder")
  generation.write(folder, generation.read(model.source.folder, tokens))
  checkpoints.save({"step": np.int32(0), "nonfinite_step": np.int32(-1), "params": model.params})
  checkpoints.close()
  if certificate:
    parity.write(folder, certificate)
  return Imported(
    model.source.family.model_type,
    tree.count(model.params),
    sum(t.nbytes for t in model.source.tensors.values()),
    [*model.source.notes, *notes],
    certificate,
  )


def load_tokenizer(
  source: epath.PathLike, other: epath.PathLike | None, vocab_size: int
) -> tuple[tokenizer_lib.Tokenizer, list[str]]:
  """Loads the tokenizer of a published model.

  Args:
    source: The model's folder.
    other: File or folder to load instead, or None.
    vocab_size: Rows of the model's embedding.

  Returns:
    The tokenizer, and a note if it has added tokens without a row.

  Raises:
    UserError: There is none, or ids of its base vocabulary have no row in the embedding.
  """
  try:
    tokens = tokenizer_lib.load(other or source)
  except UserError as e:
    raise UserError(f"{e}; name another with --tokenizer=PATH") from e
  try:
    beyond = tokens.ids_beyond(vocab_size)
  except UserError as e:
    raise UserError(f"{other or source}: {e}; name another with --tokenizer=PATH") from e
  if not beyond:
    return tokens, []
  names = ", ".join(sorted(beyond, key=beyond.__getitem__)[:3])
  return tokens, [
    f"the model has no row for {len(beyond)} added tokens of its tokenizer ({names}): text that "
    "uses them is refused"
  ]


class Exported(NamedTuple):
  """A summary of an export.

  Attributes:
    family: The model's family, its `model_type`.
    files: Names of the files.
    certificate: The result of `parity.certify`.
    notes: Sentences on quantized weights.
  """

  family: str
  files: list[str]
  certificate: dict[str, Any]
  notes: Sequence[str] = ()


class _Tensors(NamedTuple):
  """The tensors of an export.

  Attributes:
    files: Names of the files.
    params: The weights that they stand for, in float32.
    fields: What they add to config.json.
    notes: As in `Exported`.
  """

  files: list[str]
  params: tree.PyTree
  fields: dict[str, Any]
  notes: list[str]


def export_run(
  folder: epath.PathLike,
  out: epath.PathLike,
  *,
  step: int | str | None = None,
  dtype: str = "float32",
  shard_bytes: int = 5 << 30,
  family: str | None = None,
  certify: bool = True,
  packed: bool = False,
) -> Exported:
  """Writes a run's weights as a folder that transformers loads, with a certificate of parity.

  The folder appears complete or not at all.

  Args:
    folder: The run folder.
    out: The folder to make.
    step: Step of the checkpoint, or 'best'. None: the newest.
    dtype: Dtype of the tensors, a key of `weights.DTYPES`.
    shard_bytes: Largest size of a file.
    family: Name of the family. None: the first that has the model's fields.
    certify: Compare with transformers, if it is installed.
    packed: Write the codes of a quantized run, see `hf.quantized.compressed_tensors`.

  Raises:
    UserError: No family has this model's fields, `out` exists, or `packed` and there are no codes.
  """
  out = _free(out)
  found = convert.family_of(_without_adapters(run_folder.read_config(folder)).model, family)
  if packed and not quantized_weights.of_run(folder):
    raise UserError(
      f"--format=compressed-tensors: {folder} has no quantized weights; make a run that has with "
      "jaxgpt quantize, or leave --format out"
    )
  run = _merged(load.load(folder, step))
  codes = quantized_weights.read(folder, run.params, run.step) if packed else {}
  c = run.c.copy_and_resolve_references()
  c.model.label_names = label_names.of_run(c, run.data_digest)
  with _whole(out) as part:
    made = _tensors(part, found, c.model, run, codes, dtype, shard_bytes)
    ids = dict(
      bos_token_id=run.tokenizer.bos_id,
      eos_token_id=run.tokenizer.eos_id,
      pad_token_id=run.tokenizer.pad_id,
    )
    ids = {k: v for k, v in ids.items() if v is not None}
    hf = convert.write(found, c.model) | {"torch_dtype": dtype}
    hf |= labels_lib.problem_type(c.objective.name) | made.fields
    hf = ids | hf if "pad_token_id" in hf else hf | ids
    _write_json(part / "config.json", hf)
    _write_json(part / generation.FILE, generation.published(run.generation, run.tokenizer))
    of_tokenizer, why_not = hf_tokenizer.files(
      run.tokenizer, c.model.max_len, run.generation.template
    )
    for name, data in of_tokenizer.items():
      (part / name).write_bytes(data)
    files = [*made.files, "config.json", generation.FILE, *of_tokenizer]
  # The folder is complete. Whatever happens in the comparison, it stays.
  certificate = parity.certify(out, c.model, made.params, run.tokenizer, dtype, certify)
  certificate["tokenizer"]["why_not"] = why_not
  parity.write(out, certificate)
  files += [parity.JSON, parity.TEXT]
  return Exported(found.model_type, files, certificate, made.notes)


def _tensors(
  folder: epath.Path,
  family: Family,
  c_model: ml_collections.ConfigDict,
  run: load.Run,
  codes: Mapping[str, quantized_weights.Codes],
  dtype: str,
  shard_bytes: int,
) -> _Tensors:
  """Writes the weights of a run, those with `codes` as codes."""
  if not codes:
    files = write_weights(folder, family, c_model, run.params, dtype, shard_bytes)
    return _Tensors(files, weights.rounded(run.params, dtype), {}, [])
  published = convert.named(family, c_model, convert.publish(family, c_model, run.params))
  forms = {path: one.form for path, one in codes.items()}
  plan = compressed_tensors.plan(family, published, forms)
  files = compressed_tensors.save(folder, plan, run.params, codes, dtype, shard_bytes)
  notes = [f"codes of {len(plan.packed)} modules, {len(plan.plain)} tensors in {dtype}"]
  if plan.dequantized:
    notes.append(f"dequantized, since they are no Linear: {', '.join(plan.dequantized)}")
  return _Tensors(
    files,
    compressed_tensors.rounded(run.params, codes, dtype, plan),
    {"quantization_config": compressed_tensors.config(family, plan)},
    notes,
  )


def write_weights(
  folder: epath.Path,
  family: Family,
  c_model: ml_collections.ConfigDict,
  params: tree.PyTree,
  dtype: str = "float32",
  shard_bytes: int = 5 << 30,
) -> list[str]:
  """Writes a model's tensors under the names of a family. Returns the names of the files.

  Args:
    folder: An empty folder.
    family: The family.
    c_model: The resolved `model` section.
    params: The weights, without adapters.
    dtype: Dtype of the tensors, a key of `weights.DTYPES`.
    shard_bytes: Largest size of a file.
  """
  published = convert.named(family, c_model, convert.publish(family, c_model, params))
  return weights.save(folder, published, params, dtype, shard_bytes)


def export_adapter(
  folder: epath.PathLike,
  out: epath.PathLike,
  *,
  step: int | str | None = None,
  base: str | None = None,
  family: str | None = None,
) -> list[str]:
  """Writes a run's adapters as a folder that `peft` loads onto their base model.

  The folder appears complete or not at all.

  Args:
    folder: The folder of a run with model.lora.rank > 0.
    out: The folder to make.
    step: Step of the checkpoint, or 'best'. None: the newest.
    base: Address of the base model in Hugging Face's format, which the adapter refers to. None: the
      run's init_from.
    family: As in `export_run`.

  Returns:
    Names of the files.

  Raises:
    UserError: The run has no adapters or trains other weights too, or as in `export_run`.
  """
  out = _free(out)
  c = run_folder.read_config(folder)
  if not c.model.lora.rank:
    raise UserError(
      f"--workdir={folder} has no adapters (model.lora.rank=0); export the whole "
      "model, without --adapter"
    )
  plain = _without_adapters(c)
  found = convert.family_of(plain.model, family)
  run = load.load(folder, step)
  more = [path for path in tree.flatten(run.parts.state["params"]) if not lora.is_adapter(path)]
  if more:
    raise UserError(
      f"--workdir={folder} trains more than adapters ({', '.join(more[:3])}); export "
      "the merged model, without --adapter"
    )
  published = convert.publish(found, plain.model, lora.merge(run.params, c.model.lora))
  published = convert.named(found, plain.model, published)
  tensors, fields = adapters.publish(published, run.params, c.model)
  task = _PEFT_TASKS.get(parity.auto_class(c.model), "FEATURE_EXTRACTION")
  with _whole(out) as part:
    entries = [safetensors.Entry(name, x.shape, x.dtype) for name, x in tensors.items()]
    safetensors.write_file(part / adapters.WEIGHTS, entries, lambda entry: tensors[entry.name])
    _write_json(
      part / adapters.CONFIG,
      {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base or c.init_from,
        "bias": "none",
        "inference_mode": True,
        **fields,
      },
    )
  return [adapters.CONFIG, adapters.WEIGHTS]


def _without_adapters(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  c = c.copy_and_resolve_references()
  c.model.lora.rank = 0
  return c


def _merged(run: load.Run) -> load.Run:
  """The run with its adapters, if it has any, merged into its weights."""
  if not run.c.model.lora.rank:
    return run
  return run._replace(params=lora.merge(run.params, run.c.model.lora), c=_without_adapters(run.c))


def _free(out: epath.PathLike) -> epath.Path:
  out = epath.Path(out)
  if out.exists():
    raise UserError(f"--to={out} exists; choose another folder, or remove it")
  return out


@contextlib.contextmanager
def _whole(out: epath.Path) -> Iterator[epath.Path]:
  """A folder to write into. It becomes `out` at the end, or is removed after an error."""
  part = out.with_name(out.name + ".part")
  if part.exists():
    part.rmtree()
  part.mkdir(parents=True)
  try:
    yield part
  except BaseException:
    part.rmtree()
    raise
  part.rename(out)


def _write_json(path: epath.Path, value: dict[str, Any]) -> None:
  path.write_text(strict_json.dumps(value, indent=2) + "\n")
