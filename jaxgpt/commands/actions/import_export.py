"""Models in and out of Hugging Face's format: a folder becomes a run at step 0, a run a folder."""

import contextlib
import json

import numpy as np
from etils import epath

from jaxgpt import config, tree
from jaxgpt.errors import UserError
from jaxgpt.hf import adapters, convert, parity, safetensors, weight_source, weights
from jaxgpt.hf import tokenizer as hf_tokenizer
from jaxgpt.inference import load
from jaxgpt.model import lora
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import run_folder
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib

CONTEXT = 2048  # longest rows that an imported run evaluates and samples, unless told otherwise


def import_model(source, folder, *, dtype="float32", seq_len=None, tokenizer=None):
  """Makes a run folder, at step 0, of a model in Hugging Face's format.

  Nothing is read of the weights before the architecture and each tensor's name and shape are found
  to fit.

  Args:
    source: folder with config.json, safetensors files and the tokenizer's files.
    folder: the run folder to make.
    dtype: the run's `model.dtype`; parameters are float32.
    seq_len: the run's `data.seq_len`; None: the model's context, at most `CONTEXT`.
    tokenizer: file or folder, where `source` holds none.

  Returns:
    {'family', 'parameters', 'bytes' (of the files)}.

  Raises:
    UserError: what is not supported, missing, too much, or in the way.
  """
  source, folder = epath.Path(source), epath.Path(folder)
  family, hf = weight_source.read_family(source)
  _, found = convert.read(hf)
  c = convert.configured(
    found,
    model__preset=family.model_type,
    model__dtype=dtype,
    init_from=str(source),
    data__seq_len=seq_len or min(found["max_len"], CONTEXT),
  )
  tensors = safetensors.scan(source)
  device_mesh, parts = load.place(c)
  abstract = parts.state["params"]
  match = convert.find(
    family, convert.publish(family, c.model, abstract), tensors, c.model.tie_embeddings
  )
  convert.check(match, tensors, source)
  tokens = load_tokenizer(source, tokenizer, c.model.vocab_size)
  origin = {
    key: "config.json" if key.removeprefix("model.") in found else "base"
    for key in config.flatten(c)
  }
  run_folder.enter(folder, c, origin, device_mesh, "", tokens)
  largest = max(leaf.size * leaf.dtype.itemsize for leaf in tree.flatten(abstract).values())
  checkpoints = checkpoints_lib.Checkpoints(
    folder / run_folder.CHECKPOINTS, writing_gb=(largest + 1e6) / 1e9
  )
  if checkpoints.latest() is not None:
    raise UserError(f"--workdir={folder} holds this model already; choose another folder")
  params = weights.complete(weights.load(match.pairs, abstract), abstract)
  checkpoints.save({"step": np.int32(0), "nonfinite_step": np.int32(-1), "params": params})
  checkpoints.close()
  return {
    "family": family.model_type,
    "parameters": tree.count(params),
    "bytes": sum(t.nbytes for t in tensors.values()),
  }


def load_tokenizer(source, other, vocab_size):
  """The tokenizer of a published model.

  Args:
    source: the model's folder.
    other: file or folder to take instead, or None.
    vocab_size: rows of the model's embedding.

  Raises:
    UserError: there is none, or it has more ids than the model has rows.
  """
  try:
    tokens = tokenizer_lib.load(other or source)
  except UserError as e:
    raise UserError(f"{e}; name another with --tokenizer=PATH") from e
  if tokens.vocab_size > vocab_size:
    raise UserError(
      f"the tokenizer in {other or source} has {tokens.vocab_size} ids, the model "
      f"{vocab_size} rows of its embedding; name another with --tokenizer=PATH"
    )
  return tokens


def export_run(
  folder, out, *, step=None, dtype="float32", shard_bytes=5 << 30, family=None, certify=True
):
  """Writes a run's weights as a folder that transformers loads, with a certificate of parity.

  The folder appears whole or not at all.

  Args:
    folder: the run folder.
    out: the folder to make.
    step: which checkpoint; None: the newest.
    dtype: of the tensors, a key of `weights.DTYPES`.
    shard_bytes: size of a file at most.
    family: its name; None: the first that has the model's fields.
    certify: compare with transformers, where that is installed.

  Returns:
    (family's name, names of the files, the certificate of `parity.certify`).

  Raises:
    UserError: no family has this model's fields, or `out` is in the way.
  """
  out = _free(out)
  family = convert.family_of(_without_adapters(run_folder.read_config(folder)).model, family)
  run = _merged(load.load(folder, step))
  c = run.c
  with _whole(out) as part:
    published = convert.publish(family, c.model, run.params)
    if c.model.head in ("pooler", "none"):  # the bare model's names have no prefix
      published = [p._replace(name=p.name.removeprefix(family.prefix)) for p in published]
    files = weights.save(part, published, run.params, dtype, shard_bytes)
    ids = dict(
      bos_token_id=run.tokenizer.bos_id,
      eos_token_id=run.tokenizer.eos_id,
      pad_token_id=run.tokenizer.pad_id,
    )
    ids = {k: v for k, v in ids.items() if v is not None}
    hf = convert.write(family, c.model) | {"torch_dtype": dtype}
    hf = ids | hf if "pad_token_id" in hf else hf | ids
    _write_json(part / "config.json", hf)
    _write_json(part / "generation_config.json", {"_from_model_config": True, **ids})
    of_tokenizer, why_not = hf_tokenizer.files(run.tokenizer, c.model.max_len)
    for name, data in of_tokenizer.items():
      (part / name).write_bytes(data)
    files += ["config.json", "generation_config.json", *of_tokenizer]
    certificate = parity.certify(
      part, c.model, weights.rounded(run.params, dtype), run.tokenizer, dtype, certify
    )
    certificate["tokenizer"]["why_not"] = why_not
    parity.write(part, certificate)
  return family.model_type, [*files, parity.JSON, parity.TEXT], certificate


def export_adapter(folder, out, *, step=None, base=None, family=None):
  """Writes a run's adapters as a folder that `peft` loads onto the model they were trained on.

  Args:
    folder: the run folder, of a run with model.lora.rank > 0.
    out: the folder to make; it appears whole or not at all.
    step: which checkpoint; None: the newest.
    base: address of the base model in Hugging Face's format, which the adapter refers to; None: the
      run's init_from.
    family: as in `export_run`.

  Returns:
    Names of the files.

  Raises:
    UserError: the run has no adapters, or trains more than them; as `export_run`.
  """
  out = _free(out)
  c = run_folder.read_config(folder)
  if not c.model.lora.rank:
    raise UserError(
      f"--workdir={folder} has no adapters (model.lora.rank=0); export the whole "
      "model, without --adapter"
    )
  plain = _without_adapters(c)
  family = convert.family_of(plain.model, family)
  run = load.load(folder, step)
  more = [path for path in tree.flatten(run.parts.state["params"]) if not lora.is_adapter(path)]
  if more:
    raise UserError(
      f"--workdir={folder} trains more than adapters ({', '.join(more[:3])}); export "
      "the merged model, without --adapter"
    )
  published = convert.publish(family, plain.model, lora.merge(run.params, c.model.lora))
  tensors, fields = adapters.publish(published, run.params, c.model)
  task = {"lm": "CAUSAL_LM", "classifier": "SEQ_CLS"}.get(c.model.head, "FEATURE_EXTRACTION")
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


def _without_adapters(c):
  c = c.copy_and_resolve_references()
  c.model.lora.rank = 0
  return c


def _merged(run):
  """A run whose adapters, if it has any, are part of its weights."""
  if not run.c.model.lora.rank:
    return run
  return run._replace(params=lora.merge(run.params, run.c.model.lora), c=_without_adapters(run.c))


def _free(out):
  out = epath.Path(out)
  if out.exists():
    raise UserError(f"--to={out} exists; choose another folder, or remove it")
  return out


@contextlib.contextmanager
def _whole(out):
  """A folder to write into, which becomes `out` at the end, or is removed."""
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


def _write_json(path, value):
  path.write_text(json.dumps(value, indent=2) + "\n")
