"""Low-rank adapters (LoRA, arXiv:2106.09685): names, targets, and merging into the weights.

An adapted weight W has two more parameters next to it, A and B, and the layer computes
x W + alpha / rank * (x A) B. `layers.Module.linear` declares them.
"""

import fnmatch

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt import tree
from jaxgpt.model.quantization import quantized_base
from jaxgpt.tree import PyTree

A, B = SUFFIXES = ("_lora_a", "_lora_b")  # follow the name of the adapted weight


def adapts(c_lora: ml_collections.ConfigDict, name: str) -> bool:
  """Whether a weight has an adapter: whether its name matches one of `model.lora.targets`."""
  return bool(c_lora.rank) and any(fnmatch.fnmatchcase(name, t) for t in c_lora.targets)


def is_adapter(path: str) -> bool:
  """Whether the parameter at a path, such as 'layers/attn/q_lora_a', belongs to an adapter."""
  return path.endswith(SUFFIXES)


def adapters(named: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Finds the adapters among parameters.

  Args:
    named: {path: array} of all parameters.

  Returns:
    {path of the adapted weight: (A, B)}, with A [layers, in..., rank] and B [layers, rank, out...].
  """
  return {
    path.removesuffix(A): (a, named[path.removesuffix(A) + B])
    for path, a in named.items()
    if path.endswith(A)
  }


def merge(params: PyTree, c_lora: ml_collections.ConfigDict) -> PyTree:
  """Adds the adapters to their weights: W + alpha / rank * A B. A quantized base becomes float32.

  Args:
    params: All parameters, including those of the adapters.
    c_lora: The config's `model.lora` section.

  Returns:
    The parameters of the same model with `model.lora.rank` = 0.
  """
  named = tree.flatten(quantized_base.numbers(params))
  found = adapters(named)
  # Parameters of a stack have a leading axis of layers, hence the vmap.
  product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1) * (c_lora.alpha / c_lora.rank))
  merged = {
    path: w + product(*found[path]) if path in found else w
    for path, w in named.items()
    if not is_adapter(path)
  }
  return tree.unflatten(merged)
