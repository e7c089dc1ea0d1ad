"""Stacks: the layers, grouped so that one scan runs over layers with equal parameters.

The parameters of layers of the same kind are stored as one array with a leading `layers` axis, and
a `scan` over that axis compiles the layer once. Layers may follow a pattern. Then a scan step runs
one *period* of the pattern, and there is one array per block of the period. For attention_pattern =
(local, global) with 5 layers:

  layer        0      1       2      3       4
               local  global  local  global  local
  stack        'layers': period (local, global), 2 repeats    'last_layers': period (local), 1
  repeat parameters   'layers/0/...' [2, ...] of layers 0 and 2       'last_layers/...' [1, ...] of
  layer 4
               'layers/1/...' [2, ...] of layers 1 and 3

Leading dense layers of a mixture of experts (`moe.first_dense`) form the stack 'first_layers'.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import ml_collections

from jaxgpt.config.keys.layer_kinds import attention_kinds, mlp_kinds
from jaxgpt.model import pipeline
from jaxgpt.tree import PyTree

PIPELINED = "layers"  # the stack that pipeline stages share, the others are short

Kind = tuple[str, str]  # (attention, mlp), such as ('local', 'dense')


class Stack(NamedTuple):
  """Layers whose parameters are stacked: a period of blocks, repeated.

  Attributes:
    name: Name of the stack in the parameter tree.
    kinds: Kinds of the blocks of the period.
    repeats: Number of periods, the size of the leading axis of the parameters.
  """

  name: str
  kinds: tuple[Kind, ...]
  repeats: int

  @property
  def num_layers(self) -> int:
    """Number of layers."""
    return len(self.kinds) * self.repeats


def of(cfg: ml_collections.FrozenConfigDict) -> list[Stack]:
  """Groups the layers of a model into stacks, in their order.

  Args:
    cfg: The config's `model` section.
  """
  kinds = list(zip(attention_kinds(cfg), mlp_kinds(cfg), strict=True))
  first = cfg.moe.first_dense if "moe" in cfg.mlp_pattern else 0
  period = math.lcm(len(cfg.attention_pattern), len(cfg.mlp_pattern))
  body = (cfg.num_layers - first) // period * period
  cuts = [
    ("first_layers", kinds[:first], len(cfg.attention_pattern)),
    (PIPELINED, kinds[first : first + body], period),
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


def apart(cfg: ml_collections.FrozenConfigDict, params: PyTree) -> PyTree:
  """Takes stacked parameters apart, so that a layer's are arrays of their own.

  Args:
    cfg: The config's `model` section.
    params: All parameters.

  Returns:
    The same tree, with a tuple of trees, one for each period, in the place of each stack.
  """
  split = {s.name: tuple(repeat_of(params[s.name], i) for i in range(s.repeats)) for s in of(cfg)}
  return {**params, **split}


def repeat_of(stack: PyTree, i: int) -> PyTree:
  """Parameters of the i-th period of a stack, stacked or `apart`."""
  return stack[i] if isinstance(stack, tuple) else jax.tree.map(lambda x: x[i], stack)


def pipeline_of(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> pipeline.Pipeline | None:
  """The pipeline of a resolved config on a mesh, or None if the mesh has one stage.

  Args:
    c: The resolved config.
    sizes: Size of each mesh axis.

  Raises:
    UserError: See `pipeline.make`.
  """
  return pipeline.make(c, sizes, pipelined_periods(c.model))


def pipelined_periods(cfg: ml_collections.FrozenConfigDict) -> int:
  """Periods of the layers' pattern that pipeline stages share. `cfg` is the `model` section."""
  return sum(stack.repeats for stack in of(cfg) if stack.name == PIPELINED)


def bubble(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> float:
  """The pipeline bubble: share of a step in which a stage idles, 0 on a mesh without stages."""
  pipe = pipeline_of(c, sizes)
  return pipe.bubble if pipe else 0.0
