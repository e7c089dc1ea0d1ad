"""muP and its extension to depth: settings tuned on a small model hold for a large one.

Initial weights, learning rates and epsilon of each parameter follow from its logical axes, and from
how much wider and deeper the model is than the one whose settings were tuned:

  n = model.width / model.mup.base_width        l = model.num_layers / model.mup.base_depth

Each entry is a factor on the config's own value (`model.init_std`, `optim.lr`,
`optim.weight_decay`, `optim.eps`). a is `model.mup.depth_power`; the powers of l apply to the
parameters of the layers.

  role     parameters                          init    rate           decay   epsilon
  input    embeddings of tokens, positions     1       1              1       1/n
  hidden   matrices between hidden sizes       1/√n    l^(a-1) / n    n       l^-a / n
  vector   biases, scales of norms             1       l^(a-1)        1       l^-a / n
  output   a head of its own                   1       1              1       1/n
  router   routers of experts                  1/n     l^(a-1) / n    n       l^-a

and in the forward pass, as values of config keys that are derived:

  model.output_scale     1/n         on the input of the head, tied or not
  model.attn_scale       1/head_dim, or sqrt(base_head_dim)/head_dim if that is given
  model.residual_scale   l^-a        on each residual branch

Sources: width, Tensor Programs V (arXiv:2203.03466), table 8, in the form that allows tied
embeddings, Adam's column; attention, its definition 4.1. Depth and epsilon, CompleteP
(arXiv:2505.01618), table 1, with a = 1; a = 1/2 is the rule of Tensor Programs VI
(arXiv:2310.02244) for Adam. A router is an output whose size stays. It has no multiplier in the
forward pass, so it has the form of table 3 in its place: a factor moves from the multiplier to the
initial weights and the rate, and Adam's gradient is larger by it.

Decay is a factor on the weight decay, which is multiplied by the rate: n / n leaves the share of a
weight that decays per step as it was.

All hidden sizes are taken to grow in proportion to the width: heads times their size, and the
hidden size of MLPs. Where the axes are those of a stack, l counts the layers of the whole model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgpt.parallel import sharding

INPUT, HIDDEN, VECTOR, OUTPUT, ROUTER = "input", "hidden", "vector", "output", "router"
_FIXED_SIZES = ("vocab", "positions", "labels", "router")  # do not grow with the width


class Factors(NamedTuple):
  """Factors on the settings of a parameter.

  Attributes:
    init: On the standard deviation of its initial values.
    rate: On the learning rate.
    decay: On the weight decay, which the learning rate multiplies.
    eps: On Adam's epsilon.
  """

  init: float = 1.0
  rate: float = 1.0
  decay: float = 1.0
  eps: float = 1.0


def is_on(c_model: Any) -> bool:
  """Whether the `model` section scales a parametrization from a base width or depth."""
  return bool(c_model.mup.base_width or c_model.mup.base_depth)


def width_ratio(c_model: Any) -> float:
  """n: the width relative to the base width, 1 without one."""
  return c_model.width / (c_model.mup.base_width or c_model.width)


def depth_ratio(c_model: Any) -> float:
  """l: the number of layers relative to the base depth, 1 without one."""
  return c_model.num_layers / (c_model.mup.base_depth or c_model.num_layers)


def role(axes: Sequence[str | None]) -> str:
  """The role of a parameter with these logical axes: a row of the table above.

  Example:
    >>> mup.role(("layers", "mlp", "embed"))
    'hidden'
  """
  if not sharding.is_weight(tuple(axes)):
    return VECTOR
  inner = [axis for axis in axes if axis not in ("layers", "experts")]
  if inner[-1] == "router":
    return ROUTER
  if inner[0] in _FIXED_SIZES:
    return INPUT
  return OUTPUT if inner[-1] in _FIXED_SIZES else HIDDEN


def factors(c_model: Any, axes: Sequence[str | None]) -> Factors:
  """The factors of a parameter.

  Args:
    c_model: The config's `model` section, resolved.
    axes: Logical axes of the parameter. Those of layers have an axis 'layers'. Without it, only
      `init` is meant.

  Returns:
    All 1 if the section names neither a base width nor a base depth.
  """
  if not is_on(c_model):
    return Factors()
  found, n = role(axes), width_ratio(c_model)
  deeper = depth_ratio(c_model) if "layers" in axes else 1.0
  power = c_model.mup.depth_power
  rate, eps = deeper ** (power - 1), deeper**-power
  if found == HIDDEN:
    return Factors(n**-0.5, rate / n, n, eps / n)
  if found == ROUTER:
    return Factors(1 / n, rate / n, n, eps)
  return Factors(1.0, rate, 1.0, eps / n)
