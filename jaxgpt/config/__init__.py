"""Configs: `config.base()` has every key; `config.load` reads a file and its overrides."""

from jaxgpt.config.keys import FREE_ON_RESUME, MESH_AXES, base
from jaxgpt.config.loading import (
  difference,
  flatten,
  from_dict,
  is_free_on_resume,
  load,
  preset,
  resolve,
)

__all__ = [
  "FREE_ON_RESUME",
  "MESH_AXES",
  "base",
  "difference",
  "flatten",
  "from_dict",
  "is_free_on_resume",
  "load",
  "preset",
  "resolve",
]
