"""Conversion of config.json to the `model` section and back, and the tensors a model publishes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import ml_collections
import numpy as np

from jaxgpt import config, tree
from jaxgpt.config.architecture import architecture, same_value
from jaxgpt.errors import UserError, first_line, nearest
from jaxgpt.hf import config_map, families, labels
from jaxgpt.hf.config_map import Fields, HfConfig
from jaxgpt.hf.families import Family
from jaxgpt.hf.layout import Layout
from jaxgpt.hf.tensor_map import TensorTemplate
from jaxgpt.model import stacks
from jaxgpt.tree import PyTree


class Piece(NamedTuple):
  """One of our parameters, or one layer and expert of it, within a published tensor."""

  path: str
  lead: tuple[int, ...]  # index into the parameter's leading axes: layer, expert
  layout: Layout
  start: int  # offset along the tensor's axis
  plus: float  # ours = theirs + plus
  interleaved: int  # entries at the end of our last axis that are stored as x0 y0 x1 y1 ...


# Fields of a model whose config.json promises a pooler that its files lack.
WITHOUT_POOLER: Fields = {"head": "none", "head_transform": "none"}


class Published(NamedTuple):
  """A published tensor."""

  name: str
  shape: tuple[int, ...]  # in the file
  view: tuple[int, ...]  # the shape in which the pieces lie along `axis`
  axis: int
  pieces: tuple[Piece, ...]
  instead: str = ""  # name that is read in place of `name` where the files have it
  copies: str = ""  # name under which the tensor is written a second time


class Reading(NamedTuple):
  """A config.json in our terms."""

  family: Family
  fields: Fields  # {flat field of `model`: value}
  notes: list[str]  # sentences on keys that have no effect


def read(hf: HfConfig) -> Reading:
  """Reads a config.json.

  Args:
    hf: The parsed config.json.

  Returns:
    The family, the fields, and notes for the user.

  Raises:
    UserError: The family or a value is not supported. The message names the first one.
  """
  kind = hf.get("model_type")
  if kind not in families.FAMILIES:
    raise UserError(
      f"config.json: model_type={kind!r} is not supported; "
      f"{_meant(str(kind))}supported are: {', '.join(families.FAMILIES)}"
    )
  family = families.FAMILIES[kind]
  recorded = config_map.ConfigJson(hf)
  found: Fields = {}
  try:
    for entry in (*config_map.EVERYWHERE, *family.config):
      found |= entry.read(recorded)
    config_map.check_layer_types(recorded, found)
  except UserError:
    raise
  except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
    raise UserError(
      f"config.json: a value of this {kind} model has the wrong form "
      f"({type(e).__name__}: {first_line(e)}); download the model's folder again"
    ) from e
  unread = config_map.unread(recorded)
  if unread:
    recorded.notes.append(f"keys of config.json without a meaning here: {', '.join(unread)}")
  return Reading(family, found, recorded.notes)


def _meant(name: str) -> str:
  """The hint of `nearest` if a name is a misspelt family, '' if it is another architecture."""
  digits = re.findall(r"\d+", name)
  known = [kind for kind in families.FAMILIES if re.findall(r"\d+", kind) == digits]
  return "" if name.lower() in families.OTHERS else nearest(name, known, cutoff=0.8)


def write(family: Family, c_model: ml_collections.ConfigDict) -> HfConfig:
  """Returns the config.json of a model.

  Args:
    family: A family without `differences` from the model.
    c_model: The resolved `model` section.
  """
  out, flat = {"model_type": family.model_type}, config.flatten(c_model)
  for entry in family.config:
    out |= entry.write(flat)
  return out


def configured(found: Fields, **more: Any) -> ml_collections.ConfigDict:
  """Returns a resolved config with the fields that `read` found and an objective that fits them.

  Args:
    found: {flat field of `model`: value}.
    **more: Further flat keys, with '__' for '.'.
  """
  c = config.base()
  try:
    c.update_from_flattened_dict({f"model.{key}": value for key, value in found.items()})
  except TypeError as e:
    raise UserError(f"config.json: a value has the wrong type ({first_line(e)})") from e
  if c.model.head == "classifier":
    c.objective.name = "classification"
  elif c.model.head == "token_classifier":
    answers = labels.finds_answers(c.model)
    c.objective.name = "question_answering" if answers else "token_classification"
  elif not c.model.causal:
    c.objective.name = "masked_lm"
  c.data.seq_len = 4 if c.objective.name == "question_answering" else 1  # the least that it takes
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in more.items()})
  return config.resolve(c)


def differences(family: Family, c_model: ml_collections.ConfigDict) -> list[str]:
  """Returns the reasons why a model cannot be published as a member of a family.

  The model is written as a config.json of the family and read back. Each field that does not come
  back is one reason, with its name and both values. [] means that the model is a member.
  """
  try:
    found = read(write(family, c_model)).fields
    if c_model.head == "none" and found["head"] == "pooler":  # the tensors tell them apart
      found |= WITHOUT_POOLER
    back = architecture(configured(found).model)
  except UserError as e:
    return [str(e).removeprefix("config.json: ")]
  mine = architecture(c_model)
  return [
    f"model.{key}={mine[key]!r}, where the family has {back.get(key)!r}"
    for key in mine
    if key not in back or not same_value(back[key], mine[key])
  ]


def family_of(c_model: ml_collections.ConfigDict, name: str | None = None) -> Family:
  """Finds the family that a model can be published as.

  Args:
    c_model: The resolved `model` section.
    name: The family. None: the family of `model.preset` if the model still has its fields, else the
      first family that has them.

  Raises:
    UserError: No family has the model's fields (the message names the closest families and what
      differs), or there is no family of this name.
  """
  if name is not None and name not in families.FAMILIES:
    raise UserError(
      f"family={name!r} is unknown; {_meant(name)}known are: {', '.join(families.FAMILIES)}"
    )
  against = {}
  likely = lambda family: (
    c_model.preset == family.model_type,
    c_model.preset.startswith(family.model_type),
  )
  for family in sorted(families.FAMILIES.values(), key=likely, reverse=True):
    if name in (None, family.model_type):
      against[family.model_type] = differences(family, c_model)
      if not against[family.model_type]:
        return family
  closest = sorted(against.items(), key=lambda item: len(item[1]))[:3]
  raise UserError(
    "no published family has this model's fields; closest are "
    + "; ".join(f"{kind}: {', '.join(found[:4])}" for kind, found in closest)
  )


class _Layer(NamedTuple):
  """The place of a layer in our parameters, or of the parameters outside of the layers."""

  prefix: str  # of its parameters: 'layers', or 'layers/1' in a stack with several kinds of layers
  repeat: int  # index along their leading axis
  facts: set[str]  # compared with `TensorTemplate.when`


def _layers(c_model: ml_collections.ConfigDict) -> tuple[list[_Layer], _Layer]:
  """Returns the layers in order, and an entry for the parameters outside of them."""
  facts = {c_model.head, "q_rank" if c_model.latent.q_rank else "no q_rank"}
  if c_model.head == "lm":
    facts.add("tied lm" if c_model.tie_embeddings else "untied lm")
  elif c_model.head == "token_classifier":
    facts.add("answers" if labels.finds_answers(c_model) else "tags")
  layers: list[_Layer] = []
  for stack in stacks.of(c_model):
    for repeat in range(stack.repeats):
      for i, (_, mlp) in enumerate(stack.kinds):
        prefix = stack.name + (f"/{i}" if len(stack.kinds) > 1 else "")
        normed = {"normed"} if c_model.first_norm or layers else set()
        layers.append(_Layer(prefix, repeat, facts | {mlp} | normed))
  return layers, _Layer("", 0, facts)


def publish(
  family: Family, c_model: ml_collections.ConfigDict, shapes: PyTree, partly: bool = False
) -> list[Published]:
  """Lists every tensor that a model of a family publishes.

  Args:
    family: The family.
    c_model: The resolved `model` section.
    shapes: Tree of arrays or ShapeDtypeStructs: the model's parameters.
    partly: Leave out parameters without a name in the family.

  Returns:
    The tensors in the order of the family's table, layer by layer.

  Raises:
    UserError: A parameter has no name in the family.
  """
  shape_of = {path: leaf.shape for path, leaf in tree.flatten(shapes).items()}
  layers, outside = _layers(c_model)
  out = []
  for group in _by_layer(family.tensors):
    for i, layer in enumerate(layers) if "{i}" in group[0].name else [(None, outside)]:
      for t in group:
        experts = range(c_model.moe.experts) if "{e}" in t.name else [None]
        out += [p for e in experts if (p := _published(t, layer, i, e, shape_of, c_model))]
  covered = {piece.path for p in out for piece in p.pieces}
  if not c_model.first_norm:  # stacked with the other layers, the first has an unused scale
    covered.add(f"{layers[0].prefix}/attn_norm/scale")
  lost = [path for path in shape_of if path not in covered]
  if lost and not partly:
    raise UserError(
      f"family={family.model_type!r} has no name for parameter {lost[0]} {shape_of[lost[0]]}; "
      "export it as another family"
    )
  return out


def _by_layer(templates: Iterable[TensorTemplate]) -> list[list[TensorTemplate]]:
  """Groups neighbouring templates into those of a layer and those outside of the layers."""
  groups: list[list[TensorTemplate]] = []
  for t in templates:
    if not groups or ("{i}" in groups[-1][0].name) != ("{i}" in t.name):
      groups.append([])
    groups[-1].append(t)
  return groups


def _published(
  t: TensorTemplate,
  layer: _Layer,
  i: int | None,
  expert: int | None,
  shape_of: Mapping[str, tuple[int, ...]],
  c_model: ml_collections.ConfigDict,
) -> Published | None:
  """Fills in a template for a layer and an expert. None if the model lacks the parameters."""
  if t.when and not layer.facts & set(t.when):
    return None
  paths = [
    piece.path.replace("layers/", layer.prefix + "/", 1) if i is not None else piece.path
    for piece in t.pieces
  ]
  if any(path not in shape_of for path in paths):
    return None
  lead = tuple(x for x in (layer.repeat if i is not None else None, expert) if x is not None)
  pieces, start = [], t.skip
  for piece, path in zip(t.pieces, paths, strict=True):
    layout = Layout(piece.layout, shape_of[path][len(lead) :])
    interleaved = c_model.latent.rope_dim if piece.interleaved else 0
    pieces.append(Piece(path, lead, layout, start, piece.plus, interleaved))
    start += layout.their_shape[t.axis]
  view = list(pieces[0].layout.their_shape)
  view[t.axis] = start
  shape = (view[0] * view[1], *view[2:]) if t.merged else tuple(view)
  name = t.name.format(i=i, e=expert)
  return Published(name, shape, tuple(view), t.axis, tuple(pieces), t.instead, t.copies)


class HasShape(Protocol):
  """Anything with a shape and a dtype, such as a tensor of a safetensors file."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...


class Found(NamedTuple):
  """The outcome of looking for published tensors in files."""

  matched: list[tuple[Published, Any]]  # with the tensor of the files
  missing: list[Published]
  wrong: list[str]  # messages on tensors of another shape or dtype
  extra: list[str]  # names in the files that the model does not have
  passed_over: list[str]  # names in the files that are not read on purpose, buffers excepted


def find(
  family: Family,
  c_model: ml_collections.ConfigDict,
  published: Sequence[Published],
  tensors: Mapping[str, HasShape],
  says_tied: bool,
) -> Found:
  """Finds each tensor of a model in its files, by name and shape.

  Args:
    family: The family.
    c_model: The resolved `model` section.
    published: The model's tensors, from `publish`.
    tensors: {name: tensor of the files}, from `safetensors.scan`.
    says_tied: Whether config.json says that embeddings are tied, even if the head's values differ.

  Raises:
    UserError: Two tensors of the files are the same tensor of the model.
  """
  there = full_names(family, {p.name for p in published}, tensors)
  matched, missing, wrong = [], [], []
  for p in published:
    names = [p.instead, p.name, p.copies if says_tied else ""]
    name = next((there[x] for x in names if x in there), None)
    for x in (p.instead, p.name, p.copies):
      there.pop(x, None)
    if name is None:
      missing.append(p)
    elif tuple(tensors[name].shape) != p.shape:
      wrong.append(f"{name} is {list(tensors[name].shape)}, {_ours(p)} needs {list(p.shape)}")
    elif not is_real(tensors[name].dtype):
      wrong.append(f"{name} is {tensors[name].dtype}, a quantized weight: convert it to bfloat16")
    else:
      matched.append((p, tensors[name]))
  ignored = [pattern.replace("{last}", str(c_model.num_layers)) for pattern in family.ignored]
  if c_model.tie_embeddings:
    ignored += [re.escape(name) for name in head_names(family)]
  extra, passed_over = [], []
  for full, name in there.items():
    if not any(re.fullmatch(pattern, full) for pattern in ignored):
      extra.append(name)
    elif not re.fullmatch(families.BUFFERS, full) and full not in head_names(family):
      passed_over.append(name)
  return Found(matched, missing, wrong, extra, passed_over)


def is_real(dtype: np.dtype) -> bool:
  """Whether numbers of a dtype are weights themselves, and not codes to be multiplied by scales."""
  return dtype.name in ("float64", "float32", "float16", "bfloat16")


def head_names(family: Family) -> list[str]:
  """Names of the tensor with the weight of an LM head."""
  return [t.name for t in family.tensors if t.pieces[0].path == "head" and "lm" in t.when]


def full_names(family: Family, names: set[str], tensors: Iterable[str]) -> dict[str, str]:
  """Returns {name in today's spelling, with the prefix that bare models omit: name in the files}.

  Raises:
    UserError: Two names in the files stand for the same tensor.
  """
  there: dict[str, str] = {}
  for name in tensors:
    full = _full_name(name, family, names)
    if full in there:
      raise UserError(
        f"the files hold both {there[full]} and {name}, which are the same tensor; remove one"
      )
    there[full] = name
  return there


def check(found: Found, tensors: Mapping[str, HasShape], folder: Any) -> None:
  """Raises a UserError that names the tensors which prevent a folder from being read.

  Args:
    found: From `find`.
    tensors: As in `find`.
    folder: The folder's name for the message.
  """
  missing = [f"{p.name} {list(p.shape)} ({_ours(p)})" for p in found.missing]
  extra = [f"{name} {list(tensors[name].shape)}" for name in found.extra]
  problems = [
    f"{len(names)} {problem}: {'; '.join(names[:8])}{' …' if len(names) > 8 else ''}"
    for problem, names in (
      ("missing", missing),
      ("of the wrong shape or dtype", found.wrong),
      ("that this model does not have", extra),
    )
    if names
  ]
  if problems:
    raise UserError(
      f"{folder} does not hold the tensors of its config.json: " + ". ".join(problems)
    )


def _full_name(name: str, family: Family, names: set[str]) -> str:
  """Returns a tensor's name in today's spelling, with the family's prefix."""
  name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
  name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
  full = family.prefix + name.removeprefix(family.answers_prefix)
  return full if name not in names and full in names else name


def named(
  family: Family, c_model: ml_collections.ConfigDict, published: Sequence[Published]
) -> list[Published]:
  """Tensors under the names that the class of a model gives them.

  Args:
    family: The family.
    c_model: The resolved `model` section.
    published: From `publish`.
  """
  if c_model.head in ("pooler", "none"):
    prefix = ""
  elif family.answers_prefix and labels.finds_answers(c_model):
    prefix = family.answers_prefix
  else:
    return [*published]
  own = lambda name: (
    prefix + name.removeprefix(family.prefix) if name.startswith(family.prefix) else name
  )
  return [p._replace(name=own(p.name)) for p in published]


def _ours(p: Published) -> str:
  return " + ".join(dict.fromkeys(piece.path for piece in p.pieces))
