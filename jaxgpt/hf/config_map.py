"""The small vocabulary in which a family's table says how config.json and `model` correspond.

An entry is read in both directions: `read(hf)` gives fields of the config's `model` section, by
flat names such as 'rope.theta', and `write(model)` gives keys of config.json. Both are plain dicts.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from jaxgpt.errors import UserError

_REQUIRED = object()


class Entry(NamedTuple):
  read: Callable
  write: Callable


def get(hf, key, default=_REQUIRED):
  """A value of config.json; null counts as missing.

  Args:
    hf: config.json.
    key: which.
    default: a value, or a function of config.json.

  Raises:
    UserError: it is missing, and has no default.
  """
  value = hf.get(key)
  if value is not None:
    return value
  if default is _REQUIRED:
    raise UserError(f"config.json lacks {key!r}; fetch the model's folder again")
  return default(hf) if callable(default) else default


def refuse(key, value, what):
  """Raises the UserError for a value of config.json that the model does not cover."""
  raise UserError(f"config.json: {key}={value!r} is not supported: {what}")


def same(theirs, ours, default=_REQUIRED):
  """The value is the same under another name; `default` as in `get`."""
  return Entry(lambda hf: {ours: get(hf, theirs, default)}, lambda model: {theirs: model[ours]})


def sames(**names):
  """Several of `same`, theirs=ours, that config.json has to have."""
  entries = [same(theirs, ours) for theirs, ours in names.items()]
  return Entry(
    lambda hf: _union(e.read(hf) for e in entries),
    lambda model: _union(e.write(model) for e in entries),
  )


def _union(dicts):
  return {k: v for d in dicts for k, v in d.items()}


def mapped(theirs, ours, table, default=_REQUIRED):
  """Their value has another spelling: `table` is {theirs: ours}; the first spelling is written."""

  def read(hf):
    value = get(hf, theirs, default)
    if value not in table:
      refuse(theirs, value, f"known are {', '.join(map(repr, table))}")
    return {ours: table[value]}

  def write(model):
    return {theirs: next((k for k, v in table.items() if v == model[ours]), model[ours])}

  return Entry(read, write)


def must(theirs, value, default=_REQUIRED):
  """Their key has to have this value; `default` as in `get`, else `value`."""

  def read(hf):
    found = get(hf, theirs, value if default is _REQUIRED else default)
    if found != value:
      refuse(theirs, found, f"only {value!r} is")
    return {}

  return Entry(read, lambda model: {theirs: value})


def ours(**values):
  """Fields of `model` that every member of the family has."""
  values = {key.replace("__", "."): value for key, value in values.items()}
  return Entry(lambda hf: values, lambda model: {})


def derived(name, function):
  """A field of `model` that follows from config.json, and is not written."""
  return Entry(lambda hf: {name: function(hf)}, lambda model: {})


def biases(default=False):
  """`attention_bias` and `mlp_bias`, which our one switch covers where they are equal."""

  def read(hf):
    attention, mlp = get(hf, "attention_bias", default), get(hf, "mlp_bias", default)
    if attention != mlp:
      refuse("attention_bias", attention, f"mlp_bias={mlp!r} differs")
    return {"bias": attention}

  return Entry(read, lambda model: {"attention_bias": model["bias"], "mlp_bias": model["bias"]})


ACTIVATIONS = {
  "gelu_new": "gelu",
  "gelu_pytorch_tanh": "gelu",
  "gelu_fast": "gelu",
  "gelu": "gelu_exact",
  "gelu_python": "gelu_exact",
  "silu": "silu",
  "swish": "silu",
  "relu": "relu",
  "relu2": "relu2",
}


def activation(key, default=_REQUIRED):
  """The MLP's activation."""
  return mapped(key, "activation", ACTIVATIONS, default)


def tanh_gelu(key):
  """Gemma's activation: all its spellings, 'gelu' too, mean the tanh form."""
  return mapped(
    key,
    "activation",
    {"gelu_pytorch_tanh": "gelu", "gelu": "gelu", "gelu_new": "gelu"},
    "gelu_pytorch_tanh",
  )


def head_dim(hf):
  """Default of `head_dim` in most families."""
  return get(hf, "hidden_size") // get(hf, "num_attention_heads")


def classes(**fields):
  """What head a model has, by the name of its class: {class: fields of `model`}.

  The first class is taken where config.json names none.
  """

  def read(hf):
    name = (hf.get("architectures") or [next(iter(fields))])[0]
    if name not in fields:
      refuse("architectures", name, f"of {hf['model_type']} are {', '.join(fields)}")
    found = dict(fields[name])
    if found["head"] == "classifier":
      found["num_labels"] = hf.get("num_labels") or len(hf.get("id2label") or (0, 1))
    return found

  def write(model):
    fits = (name for name, f in fields.items() if all(model[k] == v for k, v in f.items()))
    name = next(fits, next(iter(fields)))
    out = {"architectures": [name]}
    if fields[name]["head"] == "classifier":
      labels = [f"LABEL_{i}" for i in range(model["num_labels"])]
      out |= {"id2label": dict(enumerate(labels)), "label2id": {k: i for i, k in enumerate(labels)}}
    return out

  return Entry(read, write)


_KINDS = {"sliding_attention": "local", "full_attention": "global"}


def shortest(kinds):
  """The shortest pattern that, repeated, begins with these kinds."""
  n = next(
    n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds))
  )
  return tuple(kinds[:n])


def layer_types(
  default, window=("sliding_window", lambda n: n, lambda n: n), also=lambda model: {}
):
  """Which layers attend within a window: `layer_types`, or what older files say instead.

  Args:
    default: config.json -> list of 'local' and 'global'.
    window: their key of the window's size, and functions from their size to ours and back.
    also: model -> further keys of config.json.
  """
  key, to_ours, to_theirs = window

  def read(hf):
    given = hf.get("layer_types")
    unknown = [kind for kind in given or () if kind not in _KINDS]
    if unknown:
      refuse("layer_types", unknown[0], f"known are {', '.join(_KINDS)}")
    pattern = shortest([_KINDS[kind] for kind in given] if given else default(hf))
    local = {"window": to_ours(get(hf, key))} if "local" in pattern else {}
    return {"attention_pattern": pattern, **local}

  def write(model):
    names = {v: k for k, v in _KINDS.items()}
    kinds = expanded(model["attention_pattern"], model["num_layers"])
    size = to_theirs(model["window"]) if "local" in kinds else None
    return {"layer_types": [names.get(kind, kind) for kind in kinds], key: size, **also(model)}

  return Entry(read, write)


def expanded(pattern, num_layers):
  """The kind of each layer."""
  return [pattern[i % len(pattern)] for i in range(num_layers)]


def moe(experts, per_token, width="moe_intermediate_size", **more):
  """Numbers and size of experts, by their keys; `more` are further ours=theirs."""
  return sames(
    **{experts: "moe.experts", per_token: "moe.per_token", width: "moe.width"},
    **{theirs: f"moe.{ours}" for theirs, ours in more.items()},
  )


def close(a, b):
  """Whether two values of a field are the same; floats may have gone through JSON."""
  if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
    return len(a) == len(b) and all(map(close, a, b))
  if isinstance(a, float) and isinstance(b, (int, float)):
    return math.isclose(a, b, rel_tol=1e-6)
  return a == b
