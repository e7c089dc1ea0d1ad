"""The default suite runs in minutes: of a long parametrization it takes the first cases."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(cases: Iterable[Any], kept: int = 1) -> list[Any]:
  """The cases of a parametrization, those after the first `kept` marked slow (`make test-all`)."""
  out = []
  for i, case in enumerate(cases):
    values = case if isinstance(case, tuple) else (case,)
    out.append(pytest.param(*values, marks=pytest.mark.slow if i >= kept else ()))
  return out
