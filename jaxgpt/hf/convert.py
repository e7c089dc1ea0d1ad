"""config.json to the `model` section and back, and the list of tensors that a model publishes."""

import re
from typing import NamedTuple

from jaxgpt import config, tree
from jaxgpt.config.architecture import architecture, same_value
from jaxgpt.errors import UserError, nearest
from jaxgpt.hf import config_map, families
from jaxgpt.hf.layout import Layout
from jaxgpt.model import stacks


class Piece(NamedTuple):
  """One of our parameters, or one layer of it, within a published tensor."""

  path: str
  lead: tuple  # index into our leading dimensions
  layout: Layout
  start: int  # where it begins along the tensor's axis
  plus: float  # ours = theirs + plus
  pairs: int  # as many entries at the end of our last axis lie in pairs


class Published(NamedTuple):
  """A tensor as it is published."""

  name: str
  shape: tuple  # in the file
  view: tuple  # the shape in which the pieces lie along `axis`
  axis: int
  pieces: tuple


def read(hf):
  """The family of a config.json, and the fields of `model` that it says.

  Args:
    hf: config.json as a dict.

  Returns:
    (Family, {flat field: value}).

  Raises:
    UserError: the first thing in it that is not supported.
  """
  kind = hf.get("model_type")
  if kind not in families.FAMILIES:
    raise UserError(
      f"config.json: model_type={kind!r} is not supported; "
      f"{nearest(str(kind), families.FAMILIES)}supported are: "
      f"{', '.join(families.FAMILIES)}"
    )
  family = families.FAMILIES[kind]
  if hf.get("quantization_config"):
    config_map.refuse(
      "quantization_config", hf["quantization_config"], "convert it to bfloat16 first"
    )
  found = {}
  for entry in family.config:
    found |= entry.read(hf)
  return family, found


def write(family, c_model):
  """config.json of a model.

  Args:
    family: a Family that `differences` finds nothing against.
    c_model: the resolved `model` section.
  """
  out, flat = {"model_type": family.model_type}, config.flatten(c_model)
  for entry in family.config:
    out |= entry.write(flat)
  return out


def configured(found, **more):
  """A resolved config whose `model` section has what `read` found, and an objective that fits it.

  Args:
    found: {flat field: value}.
    **more: further flat keys, with '__' for '.'.
  """
  c = config.base()
  c.update_from_flattened_dict({f"model.{key}": value for key, value in found.items()})
  if c.model.head == "classifier":
    c.objective.name = "classification"
  elif not c.model.causal:
    c.objective.name = "masked_lm"
  c.data.seq_len = 1
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in more.items()})
  return config.resolve(c)


def differences(family, c_model):
  """What keeps a model from being of a family: each field's name, value and demand, as text."""
  try:
    _, found = read(write(family, c_model))
    back = architecture(configured(found).model)
  except UserError as e:
    return [str(e).removeprefix("config.json: ")]
  mine = architecture(c_model)
  return [
    f"model.{key}={mine[key]!r}, where the family has {back.get(key)!r}"
    for key in mine
    if key not in back or not same_value(back[key], mine[key])
  ]


def family_of(c_model, name=None):
  """The family that a model can be published as.

  Args:
    c_model: the resolved `model` section.
    name: which family; None: the one that `preset` names, if it still has its fields, else the
      first that has.

  Raises:
    UserError: none has, with what the closest lack; or there is no such family.
  """
  if name is not None and name not in families.FAMILIES:
    raise UserError(
      f"no family {name!r}; {nearest(name, families.FAMILIES)}there are: "
      f"{', '.join(families.FAMILIES)}"
    )
  against = {}
  likely = lambda family: c_model.preset.startswith(family.model_type)
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


class _Place(NamedTuple):
  """Where a layer's parameters are, and what is true of it."""

  prefix: str
  index: int
  facts: set


def _places(c_model):
  facts = {c_model.head, "q_rank" if c_model.latent.q_rank else "no q_rank"}
  places = []
  for stack in stacks.of(c_model):
    for repeat in range(stack.repeats):
      for i, (_, mlp) in enumerate(stack.kinds):
        prefix = stack.name + (f"/{i}" if len(stack.kinds) > 1 else "")
        normed = {"normed"} if c_model.first_norm or places else set()
        places.append(_Place(prefix, repeat, facts | {mlp} | normed))
  return places, _Place("", 0, facts)


def publish(family, c_model, shapes, partly=False):
  """Every tensor that a model of a family publishes, in the order of its table, layer by layer.

  Args:
    family: a Family.
    c_model: the resolved `model` section.
    shapes: tree of arrays or ShapeDtypeStructs, the model's parameters.
    partly: leave out parameters that the family has no name for.

  Returns:
    List of `Published`.

  Raises:
    UserError: a parameter that the family has no name for.
  """
  shapes = {path: leaf.shape for path, leaf in tree.flatten(shapes).items()}
  layers, top = _places(c_model)
  out = []
  for group in _by_layer(family.rows):
    for i, place in enumerate(layers) if "{i}" in group[0].name else [(None, top)]:
      for r in group:
        experts = range(c_model.moe.experts) if "{e}" in r.name else [None]
        out += [p for e in experts if (p := _published(r, place, i, e, shapes, c_model))]
  covered = {piece.path for p in out for piece in p.pieces}
  if not c_model.first_norm:  # the first layer has one all the same, which nothing reads
    covered.add(f"{layers[0].prefix}/attn_norm/scale")
  lost = [path for path in shapes if path not in covered]
  if lost and not partly:
    raise UserError(
      f"family {family.model_type} has no name for parameter {lost[0]} {shapes[lost[0]]}"
    )
  return out


def _by_layer(rows):
  """The rows in groups of neighbours that belong to a layer, or do not."""
  groups = []
  for r in rows:
    if not groups or ("{i}" in groups[-1][0].name) != ("{i}" in r.name):
      groups.append([])
    groups[-1].append(r)
  return groups


def _published(r, place, layer, expert, shapes, c_model):
  """A row for a layer and an expert, or None where the model does not have its parameters."""
  if r.when and not place.facts & set(r.when):
    return None
  paths = [
    part.path.replace("layers/", place.prefix + "/", 1) if layer is not None else part.path
    for part in r.parts
  ]
  if any(path not in shapes for path in paths):
    return None
  lead = tuple(x for x in (place.index if layer is not None else None, expert) if x is not None)
  pieces, at = [], r.skip
  for part, path in zip(r.parts, paths, strict=True):
    layout = Layout(part.layout, shapes[path][len(lead) :])
    pairs = c_model.latent.rope_dim if part.pairs else 0
    pieces.append(Piece(path, lead, layout, at, part.plus, pairs))
    at += layout.their_shape[r.axis]
  view = list(pieces[0].layout.their_shape)
  view[r.axis] = at
  shape = (view[0] * view[1], *view[2:]) if r.merged else tuple(view)
  return Published(r.name.format(i=layer, e=expert), shape, tuple(view), r.axis, tuple(pieces))


class Found(NamedTuple):
  """Published tensors and where they lie; what does not fit in words."""

  pairs: list  # of (Published, tensor of the files)
  missing: list  # of Published
  wrong: list  # of messages
  extra: list  # names in the files


def find(family, published, tensors, tied):
  """Finds each tensor of a model in its files, by name and shape.

  Args:
    family: a Family.
    published: from `publish`.
    tensors: {name: something with a shape}, from `safetensors.scan`.
    tied: whether the head is the embedding, so that a stored head is a copy.
  """
  names = {p.name for p in published}
  there = {_full_name(name, family.prefix, names): name for name in tensors}
  pairs, missing, wrong = [], [], []
  for p in published:
    name = there.pop(p.name, None)
    if name is None:
      missing.append(p)
    elif tuple(tensors[name].shape) != p.shape:
      wrong.append(f"{name} is {list(tensors[name].shape)}, {_ours(p)} needs {list(p.shape)}")
    else:
      pairs.append((p, tensors[name]))
  heads = [re.escape(r.name) for r in family.rows if r.parts[0].path == "head" and "lm" in r.when]
  patterns = [*family.ignored, *(heads if tied else [])]
  extra = [
    name
    for full, name in there.items()
    if not any(re.fullmatch(pattern, full) for pattern in patterns)
  ]
  return Found(pairs, missing, wrong, extra)


def check(found, tensors, folder):
  """Raises a UserError that names, on both sides, the tensors which keep a folder from being read.

  Args:
    found: from `find`.
    tensors: as there.
    folder: what the message calls the files.
  """
  missing = [f"{p.name} {list(p.shape)} ({_ours(p)})" for p in found.missing]
  extra = [f"{name} {list(tensors[name].shape)}" for name in found.extra]
  problems = [
    f"{len(names)} {what}: {'; '.join(names[:8])}{' …' if len(names) > 8 else ''}"
    for what, names in (
      ("missing", missing),
      ("of the wrong shape", found.wrong),
      ("that this model does not have", extra),
    )
    if names
  ]
  if problems:
    raise UserError(
      f"{folder} does not hold the tensors that its config.json asks for. " + ". ".join(problems)
    )


def _full_name(name, prefix, names):
  """A tensor's name with the prefix that files of a bare model leave out, and in today's spelling."""
  name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
  name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
  return prefix + name if name not in names and prefix + name in names else name


def _ours(p):
  return " + ".join(dict.fromkeys(piece.path for piece in p.pieces))
