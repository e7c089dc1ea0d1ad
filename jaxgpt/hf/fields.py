"""The small vocabulary in which a family's table says how config.json and `model` correspond.

An entry is read in both directions: `read(hf)` gives fields of the config's `model` section, and
`write(model)` gives keys of config.json. `hf` is a plain dict, `model` anything with attributes.
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
  """The value is the same under another name; `default` where config.json has none: a value, or a
  function of config.json."""
  return Entry(lambda hf: {ours: get(hf, theirs, default)},
               lambda model: {theirs: getattr(model, ours)})


def mapped(theirs, ours, table, default=_REQUIRED):
  """Their value has another spelling: `table` is {theirs: ours}; the first spelling is written."""
  def read(hf):
    value = get(hf, theirs, default)
    if value not in table:
      refuse(theirs, value, f"known are {', '.join(map(repr, table))}")
    return {ours: table[value]}

  def write(model):
    value = getattr(model, ours)
    return {theirs: next((k for k, v in table.items() if v == value), value)}

  return Entry(read, write)


def must(theirs, value, default=_REQUIRED, also=()):
  """Their key has to have this value, or one of `also`; `default` as in `same`, else `value`."""
  def read(hf):
    found = get(hf, theirs, value if default is _REQUIRED else default)
    if found != value and found not in also:
      refuse(theirs, found, f"only {value!r} is")
    return {}
  return Entry(read, lambda model: {theirs: value})


def ours(**values):
  """Fields of `model` that every member of the family has."""
  return Entry(lambda hf: values, lambda model: {})


ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu",
               "gelu": "gelu_exact", "gelu_python": "gelu_exact", "silu": "silu", "swish": "silu",
               "relu": "relu", "relu2": "relu2"}


def activation(key, default=_REQUIRED):
  """The MLP's activation."""
  return mapped(key, "activation", ACTIVATIONS, default)


def rope(default_theta=10_000.0):
  """Base of the rotary frequencies, old keys (`rope_theta`) and new (`rope_parameters`)."""
  def read(hf):
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
      refuse("rope_type", kind, "only 'default' is")
    share = given.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
      refuse("partial_rotary_factor", share, "each head is rotated as a whole")
    theta = given.get("rope_theta", hf.get("rope_theta")) or default_theta
    return {"rope": {"theta": float(theta)}}

  return Entry(read, lambda model: {"rope_theta": model.rope.theta, "rope_scaling": None})


def head_dim(hf):
  """Default of `head_dim` in most families."""
  return get(hf, "hidden_size") // get(hf, "num_attention_heads")


def heads(hf):
  """Default of `num_key_value_heads`."""
  return get(hf, "num_attention_heads")


def close(a, b):
  """Whether two values of a field are the same; floats may have gone through JSON."""
  if isinstance(a, float) and isinstance(b, (int, float)):
    return math.isclose(a, b, rel_tol=1e-6)
  return a == b
