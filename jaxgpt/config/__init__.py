"""Configs: `config.base()` has every key; `config.load` reads a file and its overrides."""

from jaxgpt.config.keys import MESH_AXES, base
from jaxgpt.config.loading import load, preset
from jaxgpt.config.resolution import difference, flatten, from_dict, is_free_on_resume, resolve

__all__ = [
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
