"""Initial weights from another model: a run, or any other source of weights that the caller passes.

`run` knows only run folders. Sources of other formats implement `WeightSource` in their own
package, such as `jaxgpt.hf.weight_source`, and commands pass them down to the training loop.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections
import numpy as np
from etils import epath

from jaxgpt import tree
from jaxgpt.config.architecture import architecture, same_value
from jaxgpt.errors import UserError
from jaxgpt.model.quantization import quantized_base
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import run_folder, source_heads
from jaxgpt.run.compression import quantized_weights
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.text.tokenizers.base import Tokenizer

REPORT = "init.json"  # file in the run folder with the report of `load`
# Text of several scripts and kinds, by which two tokenizers are compared.
_SPELLED = 64  # tokens of a text that spells a part of a vocabulary
_PROBE = "The year 2024, näher: 東京 🙂\n\tdef f(x):  return x**2\n"


class Weights(NamedTuple):
  """The weights that a source holds for a new run."""

  params: dict[str, jax.Array]  # {path: array}, with the shardings of the new run
  left: Collection[str]  # names of the source's parameters that the new run does not use


class Inspected(NamedTuple):
  """A source without its weights.

  Attributes:
    c_model: The source's resolved `model` section.
    tokenizer: Its tokenizer, or None if it has none.
  """

  c_model: ml_collections.ConfigDict
  tokenizer: Tokenizer | None


class WeightSource(Protocol):
  """A format in which models are stored."""

  def recognizes(self, folder: epath.Path) -> bool:
    """Whether a folder, which holds a config.json, is in this format."""

  def inspect(self, folder: epath.Path) -> Inspected:
    """Reads everything but the weights.

    Raises:
      UserError: The folder's model is not supported.
    """

  def load(
    self, folder: epath.Path, c_model: ml_collections.ConfigDict, abstract: tree.PyTree
  ) -> Weights:
    """Reads the weights that a new run can use.

    Args:
      folder: A folder that `recognizes` accepts.
      c_model: The new run's resolved `model` section.
      abstract: Shapes and shardings of the new run's parameters.

    Raises:
      UserError: The model is not supported, or a parameter has another shape.
    """


class InitialWeights(NamedTuple):
  """The result of `load`."""

  params: dict[str, jax.Array]  # {path: array}, with the shardings of the new run
  report: dict[str, Any]  # see `load`


def load(
  folder: epath.PathLike,
  c_model: ml_collections.ConfigDict,
  abstract: tree.PyTree,
  sources: Sequence[WeightSource] = (),
) -> InitialWeights:
  """Reads the weights that a run starts from onto its mesh.

  Args:
    folder: A run folder, or a folder that one of `sources` recognizes.
    c_model: The new run's resolved `model` section.
    abstract: Shapes and shardings of the new run's parameters.
    sources: Formats besides run folders.

  Returns:
    `InitialWeights`. The report has the keys 'source', 'loaded' (parameters), 'initialized'
    (parameters that the source lacks), 'left' (parameters that the new run lacks) and 'changed',
    {key of the architecture: [source's value, new value]}.

  Raises:
    UserError: There is no model in the folder, or a parameter has another shape.
  """
  source = _source_of(folder, sources)
  inspected = source.inspect(epath.Path(folder))
  weights = source.load(epath.Path(folder), c_model, abstract)
  _check_codes(folder, abstract, weights.params)
  old, new = architecture(inspected.c_model), architecture(c_model)
  report = {
    "source": str(folder),
    "loaded": sorted(weights.params),
    "initialized": sorted(tree.flatten(abstract).keys() - weights.params.keys()),
    "left": sorted(weights.left),
    "changed": {
      key: [old.get(key), new.get(key)]
      for key in sorted(old.keys() | new.keys())
      if not same_value(old.get(key), new.get(key))
    },
  }
  return InitialWeights(weights.params, report)


def inspect(folder: epath.PathLike, sources: Sequence[WeightSource] = ()) -> Inspected:
  """Reads the config and the tokenizer of a source, without its weights.

  Raises:
    UserError: There is no supported model in the folder.
  """
  return _source_of(folder, sources).inspect(epath.Path(folder))


def _source_of(folder: epath.PathLike, sources: Sequence[WeightSource]) -> WeightSource:
  path = epath.Path(folder)
  if not (path / "config.json").exists():
    raise UserError(
      f"init_from={str(folder)!r} holds no config.json: name a run folder, or a folder in "
      "Hugging Face's format"
    )
  for source in (RunFolderSource(), *sources):
    if source.recognizes(path):
      return source
  raise UserError(
    f"init_from={str(folder)!r} is not a run folder; to read another format, call train with its "
    "source, such as weight_sources=jaxgpt.hf.weight_source.WEIGHT_SOURCES"
  )


def read_config_json(folder: epath.Path) -> dict[str, Any]:
  """The config.json of a folder.

  Raises:
    UserError: The file does not hold a JSON object.
  """
  path = folder / "config.json"
  try:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
      raise ValueError("not an object")
    return value
  except ValueError as e:
    raise UserError(f"{path} is not valid JSON ({e}); fetch it again") from e


def is_run(folder: epath.Path) -> bool:
  """Whether a folder's config.json is that of a run, which has a key 'config'."""
  return "config" in read_config_json(folder)


class RunFolderSource:
  """Weights from the newest checkpoint of another run: its moving average, if it has one."""

  def recognizes(self, folder: epath.Path) -> bool:
    return is_run(folder)

  def inspect(self, folder: epath.Path) -> Inspected:
    """See `WeightSource`."""
    tokenizer = tokenizer_lib.load(run_folder.tokenizer_folder(folder))
    c = run_folder.read_config(folder)
    return Inspected(c.model, tokenizer)

  def load(
    self, folder: epath.Path, c_model: ml_collections.ConfigDict, abstract: tree.PyTree
  ) -> Weights:
    old = run_folder.read_config(folder)
    checkpoints = checkpoints_lib.Checkpoints(folder / run_folder.CHECKPOINTS, read_only=True)
    name = "ema" if old.optim.ema else "params"
    forms = quantized_weights.of_run(folder)
    trained = quantized_weights.shapes(forms, checkpoints.shapes(name))
    frozen = checkpoints_lib.frozen_shapes(folder)
    wanted = {
      path: leaf
      for path, leaf in tree.flatten(abstract).items()
      if not source_heads.passed_over(path, old.model, c_model)
    }
    _check_shapes(folder, trained | frozen, wanted)
    as_codes = {path for path in forms if path + quantized_base.CODES in wanted}
    _check_forms(folder, {path: forms[path] for path in as_codes}, c_model.lora)
    # Checkpoints are read whole. Parameters that the new run does not have go to one device.
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {
      path: wanted.get(
        path,
        jax.ShapeDtypeStruct(shape, quantized_base.dtype_of(path, old.model.lora), sharding=one),
      )
      for path, shape in (trained | frozen).items()
    }
    for path in as_codes:
      of_codes = wanted[path + quantized_base.CODES].sharding
      like[path] = jax.ShapeDtypeStruct(trained[path], "float32", sharding=of_codes)
    select = lambda paths: tree.unflatten({path: like[path] for path in paths})
    weights = select(trained)
    state, _ = checkpoints.restore({name: quantized_weights.stored_like(forms, weights)})
    checkpoints.close()
    codes = _codes(as_codes, tree.flatten(state[name]), wanted)
    weights = select(trained.keys() - as_codes)
    state[name] = quantized_weights.dequantized(forms, state[name], weights)
    if frozen:
      state |= checkpoints_lib.load_frozen(folder, {"frozen": select(frozen)})
    found = codes | tree.flatten(tree.merge(state[name], state.get("frozen")))
    found = _as_numbers(found, wanted)
    return Weights(
      {path: array for path, array in found.items() if path in wanted},
      found.keys() - wanted.keys(),
    )


def _codes(
  paths: Collection[str], stored: Mapping[str, jax.Array], wanted: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Codes and scales of a quantized run in the shapes of a run whose base they are."""
  out = {}
  for path in paths:
    for name, suffix in zip(
      (quantized_weights.CODES, quantized_weights.SCALES), quantized_base.SUFFIXES, strict=True
    ):
      like = wanted[path + suffix]
      shaped = jax.jit(lambda x, like=like: x.reshape(like.shape), out_shardings=like.sharding)
      out[path + suffix] = shaped(stored[f"{path}/{name}"])
  return out


def _as_numbers(found: Mapping[str, jax.Array], wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Weights, with those that the source keeps as codes and the new run as numbers multiplied."""
  out = dict(found)
  for path in found:
    name = path.removesuffix(quantized_base.CODES)
    if name != path and name in wanted and path not in wanted:
      # On the host: these codes are on one device, and the weight may be on all.
      pair = {p: np.asarray(out.pop(p)) for p in (path, name + quantized_base.SCALES)}
      with jax.set_mesh(jax.sharding.Mesh(jax.local_devices()[:1], "one")):
        weight = np.asarray(tree.flatten(quantized_base.numbers(pair))[name])
      out[name] = jax.device_put(weight, wanted[name].sharding)
  return out


def _check_forms(
  folder: epath.Path, forms: quantized_weights.Forms, c_lora: ml_collections.ConfigDict
) -> None:
  """Raises a UserError if codes of a run are not those that the new run wants."""
  for path, form in forms.items():
    group = form.matrix.inputs // form.groups if form.groups > 1 else 0
    wanted = (quantized_base.bits_of(c_lora), c_lora.base_group % form.matrix.inputs)
    if (form.bits, group) != wanted:
      raise UserError(
        f"init_from={str(folder)!r}: {path} has codes of {form.bits} bits with a scale for "
        f"{f'{group} inputs' if group else 'all inputs of an output'}; set "
        f"model.lora.base='int{form.bits}' and model.lora.base_group={group}"
      )


def _check_codes(folder: epath.PathLike, abstract: tree.PyTree, given: Collection[str]) -> None:
  """Raises a UserError if a run wants codes that its source does not have."""
  lacking = [p for p in tree.flatten(abstract) if quantized_base.is_code(p) and p not in given]
  if lacking:
    path = lacking[0].removesuffix(quantized_base.CODES).removesuffix(quantized_base.SCALES)
    raise UserError(
      f"init_from={str(folder)!r} has no codes of {path}, which model.lora.base needs: quantize "
      "all matrices of the layers with jaxgpt quantize first, or set model.lora.base='float32'"
    )


def _check_shapes(
  folder: epath.Path, stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Any]
) -> None:
  wrong = [
    f"{path} is {list(shape)}, the config makes it {list(wanted[path].shape)}"
    for path, shape in stored.items()
    if path in wanted and shape != wanted[path].shape
  ]
  if wrong:
    raise UserError(
      f"init_from={str(folder)!r}: {'; '.join(wrong[:5])}; take the model section of that run "
      "(configs/finetune.py does)"
    )


def check_tokenizer(
  c: ml_collections.ConfigDict, tokenizer: Tokenizer, sources: Sequence[WeightSource] = ()
) -> list[str]:
  """Checks that the data was tokenized with the tokenizer of `init_from`.

  Args:
    c: The new run's config.
    tokenizer: The tokenizer of the data.
    sources: Formats besides run folders.

  Returns:
    Sentences for the user if the source has no tokenizer, so that nothing can be compared.

  Raises:
    UserError: It was tokenized with another one, or there is no supported model in `init_from`.
  """
  theirs = inspect(c.init_from, sources).tokenizer
  if theirs is None:
    return [
      f"init_from={c.init_from!r} holds no tokenizer that can be read, so jaxgpt can't check that "
      f"data.path={c.data.path!r} has the tokens that its weights were trained with"
    ]
  if not same_tokens(theirs, tokenizer):
    folder = tokenizer_lib.folder_of(c.init_from)
    raise UserError(
      f"data.path={c.data.path!r} was tokenized with another tokenizer than the weights in "
      f"init_from={c.init_from!r} were trained with; prepare it with "
      f"jaxgpt data --tokenizer={folder}"
    )
  return []


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
  """Whether two tokenizers give text the same ids. Their special tokens may differ.

  Tokenizers with different files are compared on a probe, and on texts that spell every token of
  both vocabularies. Two libraries may disagree on a few of these, which are no natural text.
  """
  if a.digest == b.digest:
    return True
  if a.encode(_PROBE) != b.encode(_PROBE):
    return False
  texts = [
    tokenizer.decode(range(start, min(start + _SPELLED, tokenizer.vocab_size)))
    for tokenizer in (a, b)
    for start in range(0, tokenizer.vocab_size, _SPELLED)
  ]
  pairs = zip(a.encode_batch(texts), b.encode_batch(texts), strict=True)
  different = sum(not np.array_equal(x, y) for x, y in pairs)
  return different <= (0 if a.kind == b.kind else len(texts) // 10)


def describe(report: Mapping[str, Any]) -> list[str]:
  """The report of `load` in lines of text."""
  lines = [f"started from {report['source']}: {len(report['loaded'])} parameters loaded"]
  for key, words in (
    ("initialized", "initialized, because it has none"),
    ("left", "not used"),
  ):
    if report[key]:
      lines.append(f"  {len(report[key])} {words}: {', '.join(report[key])}")
  for key, (old, new) in report["changed"].items():
    lines.append(f"  model.{key} was {old!r} there, is {new!r}")
  return lines
