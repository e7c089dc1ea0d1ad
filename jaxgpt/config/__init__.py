"""Configs: `config.base()` has every key; `config.load` reads a file and its overrides.

The names below are imported when they are first used, so that `jaxgpt --help` and the workers of
`jaxgpt data`, which need other modules of this package, start without ml_collections.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxgpt.config.keys import MESH_AXES, base
  from jaxgpt.config.loading import load, preset
  from jaxgpt.config.resolution import (
    difference,
    effect_of_change,
    flatten,
    from_dict,
    is_free_on_resume,
    resolve,
    why_fixed,
  )

__all__ = [
  "MESH_AXES",
  "base",
  "difference",
  "effect_of_change",
  "flatten",
  "from_dict",
  "is_free_on_resume",
  "load",
  "preset",
  "resolve",
  "why_fixed",
]


def __getattr__(name: str) -> Any:
  if name in __all__:
    for module in ("keys", "resolution", "loading"):
      found = importlib.import_module(f"{__name__}.{module}")
      if hasattr(found, name):
        return getattr(found, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
