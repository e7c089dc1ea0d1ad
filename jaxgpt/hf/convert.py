"""config.json to the `model` section and back, and the list of tensors that a model publishes."""

import math
import re
from typing import NamedTuple

from jaxgpt import checks, config, tree
from jaxgpt.errors import UserError
from jaxgpt.hf import families, fields
from jaxgpt.hf.layout import Layout

# Fields of `model` that say how it is trained or computed, and not what it is.
FREE = ("preset", "dropout", "init_std", "dtype", "attention", "scan_unroll", "remat")


class Piece(NamedTuple):
  """One of our parameters, or one layer of it, within a published tensor."""
  path: str
  lead: tuple  # index into our leading dimensions
  layout: Layout
  plus: float
  start: int  # where it begins along the tensor's axis


class Published(NamedTuple):
  """A tensor as it is published."""
  name: str
  shape: tuple
  axis: int
  pieces: tuple


def read(hf):
  """The family of a config.json, and the fields of `model` that it says.

  Args:
    hf: config.json as a dict.

  Returns:
    (Family, {field: value}).

  Raises:
    UserError: the first thing in it that is not supported.
  """
  kind = hf.get("model_type")
  if kind not in families.FAMILIES:
    raise UserError(f"config.json: model_type={kind!r} is not supported; "
                    f"{checks.nearest(str(kind), families.FAMILIES)}supported are: "
                    f"{', '.join(families.FAMILIES)}")
  family = families.FAMILIES[kind]
  if hf.get("quantization_config"):
    fields.refuse("quantization_config", hf["quantization_config"], "convert it to bfloat16 first")
  found = {}
  for entry in family.config:
    found |= entry.read(hf)
  return family, found


def write(family, c_model):
  """config.json of a model.

  Args:
    family: a Family that `difference` finds nothing against.
    c_model: the resolved `model` section.
  """
  out = {"architectures": [family.architecture], "model_type": family.model_type}
  for entry in family.config:
    out |= entry.write(c_model)
  return out


def resolved(found):
  """The resolved `model` section of what `read` found."""
  c = config.base()
  c.model.update(found)
  c.data.seq_len = 1
  return config.resolve(c).model


def difference(family, c_model):
  """What keeps a model from being of a family: the first field's name, value and demand, or None."""
  try:
    _, found = read(write(family, c_model))
  except UserError as e:
    return str(e).removeprefix("config.json: ")
  back = resolved(found)
  for key in back:
    if key not in FREE and not fields.close(back[key], c_model[key]):
      return f"model.{key}={c_model[key]!r}, where the family has {back[key]!r}"
  return None


def family_of(c_model, name=None):
  """The family that a model can be published as.

  Args:
    c_model: the resolved `model` section.
    name: which family; None: the first that has the model's fields.

  Raises:
    UserError: none has, with what each lacks; or there is no such family.
  """
  if name is not None and name not in families.FAMILIES:
    raise UserError(f"no family {name!r}; {checks.nearest(name, families.FAMILIES)}there are: "
                    f"{', '.join(families.FAMILIES)}")
  against = {}
  for family in families.FAMILIES.values():
    if name in (None, family.model_type):
      against[family.model_type] = difference(family, c_model)
      if against[family.model_type] is None:
        return family
  raise UserError("no published family has this model's fields: " +
                  "; ".join(f"{k}: {v}" for k, v in against.items()))


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
  sizes = {"H": c_model.head_dim}
  out, covered = [], {}
  rows = [(r, i) for group in _by_layer(family.rows)
          for i in range(c_model.num_layers if "{i}" in group[0].name else 1) for r in group]
  for r, i in rows:
    pieces = _pieces(r, i if "{i}" in r.name else None, shapes, sizes)
    if pieces is None:
      continue
    for p in pieces:
      covered.setdefault(p.path, set()).add(p.lead)
    last = pieces[-1]
    shape = list(last.layout.their_shape)
    shape[r.axis] += last.start
    out.append(Published(r.name.format(i=i), tuple(shape), r.axis, tuple(pieces)))
  for path, shape in shapes.items():
    lead = len(next(iter(covered.get(path, [()]))))
    if not partly and len(covered.get(path, ())) != math.prod(shape[:lead]):
      raise UserError(f"family {family.model_type} has no name for parameter {path} {shape}")
  return out


def _by_layer(rows):
  """The rows in groups of neighbours that belong to a layer, or do not."""
  groups = []
  for r in rows:
    if not groups or ("{i}" in groups[-1][0].name) != ("{i}" in r.name):
      groups.append([])
    groups[-1].append(r)
  return groups


def _pieces(r, layer, shapes, sizes):
  """Pieces of a row for a layer, or None where the model does not have its parameters."""
  if any(part.path not in shapes for part in r.parts):
    return None
  pieces, start = [], 0
  for part in r.parts:
    lead = () if layer is None else (layer,)
    layout = Layout(part.layout, shapes[part.path][len(lead):], **sizes)
    pieces.append(Piece(part.path, lead, layout, part.plus, start))
    start += layout.their_shape[r.axis]
  return pieces


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
  patterns = [*family.ignored, *([r"lm_head\.weight"] if tied else [])]
  extra = [name for full, name in there.items()
           if not any(re.fullmatch(pattern, full) for pattern in patterns)]
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
  problems = [f"{len(names)} {what}: {'; '.join(names[:8])}{' …' if len(names) > 8 else ''}"
              for what, names in (("missing", missing), ("of the wrong shape", found.wrong),
                                  ("that this model does not have", extra)) if names]
  if problems:
    raise UserError(f"{folder} does not hold the tensors that its config.json asks for. "
                    + ". ".join(problems))


def _full_name(name, prefix, names):
  """A tensor's name with the prefix that files of a bare model leave out, and in today's spelling."""
  name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
  name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
  return prefix + name if name not in names and prefix + name in names else name


def _ours(p):
  return " + ".join(dict.fromkeys(piece.path for piece in p.pieces))
