"""Checks of single values that a range or a list of choices cannot express, named by their keys."""

import math
from typing import Any

from jaxgpt.errors import UserError


def data_weights(key: str, value: Any) -> None:
  """Raises a UserError unless the value is a tuple of numbers of at least 0."""
  if not _are_weights(value):
    raise UserError(
      f"{key}={value!r}: must be numbers of at least 0, one per folder of data.path, such as "
      "(0.7, 0.3)"
    )


def data_weight_changes(key: str, value: Any) -> None:
  """Raises a UserError unless the value is a tuple of (step, weights) with rising steps."""
  last = 0
  for change in value:
    if not (
      isinstance(change, tuple)
      and len(change) == 2
      and isinstance(change[0], int)
      and change[0] > last
      and _are_weights(change[1])
    ):
      raise UserError(
        f"{key}: {change!r} must be (step, weights) with a step above {last}; write "
        "((1000, (0.5, 0.5)),) for new weights from step 1000 on"
      )
    last = change[0]


def data_stages(key: str, value: Any) -> None:
  """Raises a UserError unless the value is a tuple of (steps, batch_size, seq_len), all above 0."""
  is_count = lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0
  for stage in value:
    if not (isinstance(stage, tuple) and len(stage) == 3 and all(map(is_count, stage))):
      raise UserError(
        f"{key}: {stage!r} must be (steps, batch_size, seq_len), whole numbers above 0; write "
        "((1000, 32, 256),), with the comma at the end, for 1,000 steps of 32 rows of 256 tokens"
      )


def profile_steps(key: str, value: Any) -> None:
  """Raises a UserError unless the value is () or (first, last), counted from 1."""
  is_count = lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0
  if value and not (len(value) == 2 and all(map(is_count, value)) and value[0] <= value[1]):
    raise UserError(
      f"{key}={value!r}: must be the first and the last step to trace, counted from 1; write "
      f'--config.{key}="(11, 13)"'
    )


def texts(key: str, value: Any) -> None:
  """Raises a UserError unless the value is a tuple of one or more texts."""
  if not value or not all(isinstance(text, str) for text in value):
    raise UserError(
      f"{key}={value!r}: must be one or more texts; write --config.{key}=\"('one', 'two')\""
    )


def label_names(key: str, value: Any) -> None:
  """Raises a UserError unless the value is a tuple of different strings."""
  strings = all(isinstance(name, str) and name for name in value)
  if not strings or len(set(value)) < len(value):
    raise UserError(
      f"{key}={value!r}: must be different names of classes; write "
      f"--config.{key}=\"('bad', 'good')\""
    )


def fields(key: str, value: Any) -> None:
  """Raises a UserError unless the value is a tuple of strings 'NAME=COLUMN'."""
  for field in value:
    if not isinstance(field, str) or not all(field.partition("=")):
      raise UserError(
        f'{key}: {field!r} must be "NAME=COLUMN"; write --config.{key}=\'("input=article",)\''
      )


def mesh_compiler_options(key: str, value: Any) -> None:
  """Raises a UserError unless the value is a tuple of strings 'name=value'."""
  for option in value:
    if not isinstance(option, str) or not option.partition("=")[2]:
      raise UserError(
        f'{key}: {option!r} must be "name=value"; write --config.{key}=\'("name=value",)\''
      )


def optim_lr_scales(key: str, value: Any) -> None:
  """Raises a UserError unless the value is a tuple of (pattern, factor of at least 0)."""
  for scale in value:
    if not (
      isinstance(scale, tuple)
      and len(scale) == 2
      and isinstance(scale[0], str)
      and isinstance(scale[1], (int, float))
      and 0 <= scale[1] < math.inf
    ):
      raise UserError(
        f"{key}: {scale!r} must be (pattern, factor); write (('layers/*', 0.1),), with the "
        "comma at the end"
      )


def patterns(key: str, value: Any) -> None:
  """Raises a UserError unless the value is a tuple of strings."""
  if not all(isinstance(pattern, str) for pattern in value):
    raise UserError(
      f"{key}={value!r}: must be patterns of parameters; write ('layers/*',), with the comma at "
      "the end"
    )


def user_option(key: str, value: Any) -> None:
  """Raises a UserError unless the value is a number, string, bool or a tuple of these.

  Args:
    key: A flat key in one of the `options` sections.
    value: Its value.
  """
  if isinstance(value, tuple):
    for item in value:
      user_option(key, item)
  elif isinstance(value, float) and not math.isfinite(value):
    raise UserError(f"{key}={value}: must be a finite number")
  elif not isinstance(value, (bool, int, float, str)):
    raise UserError(
      f"{key}={value!r}: options are numbers, strings, bools or tuples of these; "
      "give the option such a value"
    )


def _are_weights(value: Any) -> bool:
  is_number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
  return isinstance(value, tuple) and all(is_number(w) and 0 <= w < math.inf for w in value)
