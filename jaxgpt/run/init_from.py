"""Weights that a new run starts from: another run's, or a model published on Hugging Face."""

import json
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.hf import config_map, convert, safetensors, weights
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import run_folder
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib

REPORT = "init.json"
_PROBE = "The year 2024, näher: 東京 🙂\n\tdef f(x):  return x**2\n"


class Given(NamedTuple):
  """What `load` found."""

  params: dict  # {path: array}, on the devices of the new run
  report: dict  # 'source', 'loaded', 'initialized', 'left' (names), 'changed' ({field: [old, new]})
  tokenizer: Any  # of the source, or None


def load(source, c_model, abstract):
  """Reads the weights that a run starts from onto its mesh.

  A parameter that the source lacks is initialised, one that the run lacks is left; each is named in
  the report.

  Args:
    source: a run folder or a folder in Hugging Face's format.
    c_model: the new run's resolved `model` section.
    abstract: its parameters' shapes and shardings.

  Returns:
    A `Given`.

  Raises:
    UserError: no such source, or a parameter of another shape.
  """
  folder = epath.Path(source)
  if is_run(folder):
    old = run_folder.read_config(folder)
    params, left = _from_run(folder, old, abstract)
    model, tokens = old.model, tokenizer_lib.load(run_folder.tokenizer_folder(folder))
  else:
    family, hf = read_config_json(folder)
    model = convert.configured(convert.read(hf)[1]).model
    params, left = _from_published(folder, family, c_model, abstract)
    tokens = None
  paths = tree.flatten(abstract)
  old, new = convert.architecture(model), convert.architecture(c_model)
  changed = {
    key: [old.get(key), new.get(key)]
    for key in sorted(old.keys() | new.keys())
    if not config_map.close(old.get(key), new.get(key))
  }
  report = {
    "source": str(source),
    "loaded": sorted(params),
    "initialized": sorted(paths.keys() - params.keys()),
    "left": sorted(left),
    "changed": changed,
  }
  return Given(params, report, tokens)


def check_source(source):
  """Raises a UserError where `load` finds neither a run there nor a model that is supported."""
  if not is_run(source):
    read_config_json(epath.Path(source))


def is_run(folder):
  """Whether a folder is a run's, and not one in Hugging Face's format.

  Raises:
    UserError: it is neither.
  """
  path = epath.Path(folder) / "config.json"
  if not path.exists():
    raise UserError(
      f"init_from={str(folder)!r} holds no config.json: name a run folder, or a "
      "folder in Hugging Face's format"
    )
  return "config" in _json(path)


def read_config_json(folder):
  """(Family, config.json as a dict) of a folder in Hugging Face's format.

  Raises:
    UserError: no such folder, or a model that is not supported.
  """
  path = epath.Path(folder) / "config.json"
  if not path.exists():
    raise UserError(
      f"{folder} holds no config.json; name a folder as transformers' save_pretrained writes it"
    )
  hf = _json(path)
  return convert.read(hf)[0], hf


def _json(path):
  try:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
      raise ValueError("no object")
    return value
  except ValueError as e:
    raise UserError(f"{path} is no JSON ({e}); fetch it again") from e


def _from_run(folder, old, abstract):
  checkpoints = checkpoints_lib.Checkpoints(folder / run_folder.CHECKPOINTS, read_only=True)
  name = "ema" if old.optim.ema else "params"
  trained, frozen = checkpoints.shapes(name), checkpoints_lib.frozen_shapes(folder)
  there = trained | frozen
  wanted = tree.flatten(abstract)
  wrong = [
    f"{path} is {list(there[path])}, the config makes it {list(wanted[path].shape)}"
    for path in there
    if path in wanted and there[path] != wanted[path].shape
  ]
  if wrong:
    raise UserError(
      f"init_from={str(folder)!r}: {'; '.join(wrong[:5])}; take the model section of "
      "that run (configs/finetune.py does)"
    )
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = {
    path: wanted.get(path, jax.ShapeDtypeStruct(shape, "float32", sharding=one))
    for path, shape in there.items()
  }
  part = lambda paths: tree.unflatten({path: like[path] for path in paths})
  state, _ = checkpoints.restore({name: part(trained)})
  checkpoints.close()
  if frozen:
    state |= checkpoints_lib.load_frozen(folder, {"frozen": part(frozen)})
  flat = tree.flatten(tree.merge(state[name], state.get("frozen")))
  return {k: v for k, v in flat.items() if k in wanted}, flat.keys() - wanted.keys()


def _from_published(folder, family, c_model, abstract):
  tensors = safetensors.scan(folder)
  published = convert.publish(family, c_model, abstract, partly=True)
  found = convert.find(family, published, tensors, c_model.tie_embeddings)
  paths = lambda published: {piece.path for p in published for piece in p.pieces}
  torn = paths(found.missing) & paths(p for p, _ in found.pairs)  # some layers are there, some not
  found = found._replace(missing=[p for p in found.missing if paths([p]) & torn], extra=[])
  convert.check(found, tensors, folder)
  used = {id(tensor) for _, tensor in found.pairs}
  return weights.load(found.pairs, abstract), [n for n, t in tensors.items() if id(t) not in used]


def check_tokenizer(given, tokenizer, c):
  """Raises a UserError where the data's tokens mean something else to the source's weights."""
  if given.tokenizer is not None and not same_tokens(given.tokenizer, tokenizer):
    raise UserError(
      f"data.path={c.data.path!r} was tokenized with another tokenizer than the "
      f"weights in init_from={c.init_from!r} were trained with; prepare it with "
      f"jaxgpt data --tokenizer={c.init_from}/tokenizer"
    )


def same_tokens(a, b):
  """Whether two tokenizers make the same ids of text; they may have other specials."""
  return a.digest == b.digest or a.encode(_PROBE) == b.encode(_PROBE)


def describe(report):
  """The report in lines."""
  lines = [f"started from {report['source']}: {len(report['loaded'])} parameters loaded"]
  for key, what in (("initialized", "initialised, since it has none"), ("left", "left there")):
    if report[key]:
      lines.append(f"  {len(report[key])} {what}: {', '.join(report[key])}")
  for key, (old, new) in report["changed"].items():
    lines.append(f"  model.{key} was {old!r} there, is {new!r}")
  return lines
