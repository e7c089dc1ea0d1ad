"""The layers as stacks of repeated patterns, and which of them stages of a pipeline share."""

import math
from typing import NamedTuple

from jaxgpt.model import pipeline

PIPED = "layers"  # the stack that stages share; the others are short


class Stack(NamedTuple):
  """Layers whose parameters are stacked: `repeats` times the blocks of `kinds`.

  A kind is (attention, mlp), such as ('local', 'dense').
  """

  name: str
  kinds: tuple
  repeats: int

  @property
  def num_layers(self):
    return len(self.kinds) * self.repeats


def of(cfg):
  """The layers as stacks of repeated patterns, in their order.

  Leading dense layers of a mixture of experts, and what is left over when the pattern does not
  divide the layers, are stacks of their own.
  """
  kinds = [
    (
      cfg.attention_pattern[i % len(cfg.attention_pattern)],
      "dense" if i < cfg.moe.first_dense else cfg.mlp_pattern[i % len(cfg.mlp_pattern)],
    )
    for i in range(cfg.num_layers)
  ]
  first = cfg.moe.first_dense if "moe" in cfg.mlp_pattern else 0
  period = math.lcm(len(cfg.attention_pattern), len(cfg.mlp_pattern))
  body = (cfg.num_layers - first) // period * period
  cuts = [
    ("first_layers", kinds[:first], len(cfg.attention_pattern)),
    ("layers", kinds[first : first + body], period),
    ("last_layers", kinds[first + body :], 1),
  ]
  out = []
  for name, some, period in cuts:
    if not some:
      continue
    if len(set(some)) == 1:
      period = 1
    elif len(some) % period or name == "last_layers":
      period = len(some)
    out.append(Stack(name, tuple(some[:period]), len(some) // period))
  return out


def pipeline_of(c, sizes):
  """The `pipeline.Pipeline` of a resolved config on a mesh of {axis: size}, or None; see there."""
  piped = sum(stack.repeats for stack in of(c.model) if stack.name == PIPED)
  return pipeline.make(c, sizes, piped)


def bubble(c, sizes):
  """Share of a step's ticks in which a stage has nothing to do; 0 on a mesh without stages."""
  pipe = pipeline_of(c, sizes)
  return pipe.bubble if pipe else 0.0
