"""The head of a new run that starts from another model: which of its weights carry over.

A masked language model that becomes a classifier keeps its layers. The weights of its head are of
another kind, whatever their shapes, so they are passed over and named, and the head is new.
"""

import ml_collections

from jaxgpt.data import label_numbers
from jaxgpt.model import lora

WITH_CLASSES = ("classifier", "token_classifier")  # heads whose outputs may have names
_OUTPUT = ("head", "head_bias")
_TRANSFORM = ("head_dense", "head_dense_bias", "head_norm")


def same_output(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> bool:
  """Whether the outputs of two models mean the same.

  Args:
    old: The resolved `model` section of the source.
    new: That of the new run.
  """
  if old.head != new.head:
    return False
  if old.head not in WITH_CLASSES:
    return True
  if old.num_labels != new.num_labels:
    return False
  if old.head == "token_classifier" and bool(old.label_names) != bool(new.label_names):
    return False  # tags have names, starts and ends of answers have none
  named = old.label_names and new.label_names and not label_numbers.generic(old.label_names)
  return not named or same_order(old.label_names, new.label_names)


def same_order(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
  """Whether two models number the classes alike, as far as both have names."""
  return len(a) == len(b) and label_numbers.find(a, b) == list(range(len(a)))


def passed_over(path: str, old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> bool:
  """Whether a parameter belongs to a head that does not carry over.

  Args:
    path: Path of the parameter, such as 'head_bias'.
    old: The resolved `model` section of the source.
    new: That of the new run.
  """
  top = path.partition("/")[0]
  for suffix in lora.SUFFIXES:
    top = top.removesuffix(suffix)
  if top in _OUTPUT:
    return not same_output(old, new)
  return top in _TRANSFORM and old.head_transform != new.head_transform
