"""JSON as RFC 8259 has it: numbers that are not finite become null.

Python's `json` writes Infinity and NaN, which other readers of JSON refuse.
"""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
  """`json.dumps`, with null for each float that is not finite.

  Example:
    >>> dumps({"loss": float("inf"), "step": 3})
    '{"loss": null, "step": 3}'

  Args:
    value: A value that `json.dumps` takes.
    **options: Arguments of `json.dumps`.
  """
  try:
    return json.dumps(value, allow_nan=False, **options)
  except ValueError:  # rare, so that other values are not copied
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  return value
