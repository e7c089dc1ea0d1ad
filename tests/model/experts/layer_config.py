"""The `model` section of configs with one experts layer."""

import ml_collections

from jaxgpt import config


def section(moe=None, **fields):
  """A resolved `model` section: a width of 8, eight experts of width 12, unless given otherwise.

  Args:
    moe: Fields of `model.moe`.
    **fields: Other fields of `model`.
  """
  c = config.base()
  c.model.update(
    dict(
      vocab_size=5,
      max_len=8,
      width=8,
      num_heads=2,
      activation="silu",
      gated=True,
      bias=False,
      mlp_pattern=("moe",),
      init_std=0.5,
      moe=dict(experts=8, width=12) | (moe or {}),
    )
    | fields
  )
  c.data.seq_len = 8
  return ml_collections.FrozenConfigDict(config.resolve(c).model)
