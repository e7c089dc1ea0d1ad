"""Low-rank adapters (LoRA, arXiv:2106.09685): merged into the weights, or published on their own.

The adapters themselves are parameters of the model's layers, see `model.layers.Module.linear`.
"""

import jax
import jax.numpy as jnp

from jaxgpt import tree

SUFFIXES = ("_lora_a", "_lora_b")  # of the names of an adapter's two matrices


def merge(params, c_lora):
  """The weights with their adapters added: W + alpha / rank * A B.

  Args:
    params: all parameters, those of the adapters too.
    c_lora: the config's `model.lora` section.

  Returns:
    A tree without adapters: what a model with `model.lora.rank` = 0 has.
  """
  named = tree.flatten(params)
  adapters = pairs(named)
  product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1) * (c_lora.alpha / c_lora.rank))
  merged = {
    path: w + product(*adapters[path]) if path in adapters else w
    for path, w in named.items()
    if not path.endswith(SUFFIXES)
  }
  return tree.unflatten(merged)


def pairs(named):
  """{path of a weight: (A, B)} of {path: array}; A [layers, in…, rank], B [layers, rank, out…]."""
  first, second = SUFFIXES
  return {
    path.removesuffix(first): (a, named[path.removesuffix(first) + second])
    for path, a in named.items()
    if path.endswith(first)
  }
