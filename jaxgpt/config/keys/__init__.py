"""Every config key, declared once. `schema.py` explains the fields of a declaration."""

import ml_collections

from jaxgpt.config.keys import conditions
from jaxgpt.config.keys.logs import LOG
from jaxgpt.config.keys.mesh import MESH, MESH_AXES
from jaxgpt.config.keys.model import MODEL
from jaxgpt.config.keys.objective import OBJECTIVE
from jaxgpt.config.keys.training import (
  CHECKPOINT,
  DATA,
  EVAL,
  OPTIM,
  SCHEDULE,
  TASK,
  TRAIN,
)
from jaxgpt.config.schema import OF_DATA, Interval, Key, Section

__all__ = ["DECLARATIONS", "KEYS", "MESH_AXES", "MODEL", "SECTIONS", "base", "lock"]

DECLARATIONS = Section(
  "Keys outside any section.",
  dict(
    seed=Key(
      0,
      "Seed of the initial weights, of dropout and of the data order.",
      interval=Interval(0, 2**31, open_high=True),
      fixed=OF_DATA,
    ),
    init_from=Key(
      "",
      "Run folder or Hugging Face folder with the weights to start from. Empty: random weights.",
      fixed="the weights of step 0 came from there",
    ),
    code_folder=Key(
      "",
      "Folder of the files in values FILE.py:NAME. Empty: the folder of the config file.",
      free_on_resume=True,
      needs=conditions.USER_FILES,
    ),
    model=MODEL,
    data=DATA,
    objective=OBJECTIVE,
    optim=OPTIM,
    schedule=SCHEDULE,
    train=TRAIN,
    eval=EVAL,
    task=TASK,
    checkpoint=CHECKPOINT,
    log=LOG,
    mesh=MESH,
  ),
)
KEYS = dict(DECLARATIONS.flat_keys())
SECTIONS = dict(DECLARATIONS.sections())


def base() -> ml_collections.ConfigDict:
  """The default config, locked, with every key.

  Keys that are derived from others are None until `config.resolve` sets them. The `options`
  sections are empty and take any key.

  Example:
    >>> c = config.base()
    >>> c.optim.lr = 3e-4
    >>> c.objective.options.gamma = 2.0
  """
  return lock(DECLARATIONS.config())


def lock(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Locks a config against unknown keys, except in the sections of users' own options."""
  c.lock()
  for name, section in SECTIONS.items():
    if section.user_keys:
      node = c
      for part in name.split("."):
        node = node[part]
      node.unlock()
  return c
