"""The architecture of a model: the part of its config that determines its function."""

import math
import types
from typing import Any

import ml_collections

from jaxgpt.config.keys import MODEL
from jaxgpt.config.resolution import flatten


def architecture(c_model: ml_collections.ConfigDict) -> dict[str, Any]:
  """The keys of a `model` section that determine the model's function.

  Keys of training, memory and speed are left out, and so are keys without effect, such as `window`
  in a model without local layers. Two models with equal architectures and equal parameters give the
  same outputs, up to rounding.

  Args:
    c_model: The resolved `model` section.

  Returns:
    {flat key below `model`: value}. Patterns have one entry per layer.
  """
  flat = flatten(c_model)
  # Conditions that also read the objective: none trains this model here.
  no_objective = types.SimpleNamespace(name="")
  only_model = types.SimpleNamespace(model=c_model, objective=no_objective)
  found = {
    name: flat[name]
    for name, key in MODEL.flat_keys()
    if key.architecture
    and all(node.needs is None or node.needs.holds(only_model) for node in MODEL.on_path(name))
  }
  # Patterns that differ only in their length may say the same: ("local",) and ("local", "local").
  for name, key in MODEL.flat_keys():
    if key.items:
      found[name] = tuple(each_layer(flat[name], c_model.num_layers))
  return found


def each_layer(pattern: tuple[str, ...], num_layers: int) -> list[str]:
  """The kind of each layer under a pattern that is repeated in turn."""
  return [pattern[i % len(pattern)] for i in range(num_layers)]


def same_value(a: Any, b: Any) -> bool:
  """Whether two values of a key are equal, up to the rounding of floats that went through JSON."""
  if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
    return len(a) == len(b) and all(map(same_value, a, b))
  if isinstance(a, float) and isinstance(b, (int, float)):
    return math.isclose(a, b, rel_tol=1e-6)
  return a == b
