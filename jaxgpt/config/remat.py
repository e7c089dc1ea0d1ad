"""The grammar of `model.remat`: named policies, or lists of activations to save or offload."""

from typing import NamedTuple

from jaxgpt.errors import UserError, nearest

POLICIES = {
  "none": "save everything, recompute nothing",
  "full": "save only each layer's input and the mean squares of its norms",
  "dots": "save the results of matmuls and attention",
  "save_qkv": "save queries, keys and values",
  "save_attention": "save queries, keys, values and attention's output",
}
# Activations of a layer that 'save:' and 'offload:' can name. The model marks each of them with
# `jax.ad_checkpoint.checkpoint_name`.
QKV = ("q", "k", "v")  # q and k rotated; with `model.qk_norm` before their norm
ATTENTION = "attention"  # output of the softmax; its kernels add their softmax statistics
O = "o"  # noqa: E741  output of the attention layer
GATE, UP, DOWN = "gate", "up", "down"  # of the MLP, before its activation function
ACTIVATIONS = (*QKV, ATTENTION, O, GATE, UP, DOWN)
MEAN_SQUARE = "mean_square"  # of a token in an RMSNorm; every policy saves it
INPUT = "input"  # of a layer, which is saved unless 'offload:' names it


class Activations(NamedTuple):
  """Activations that are kept for the backward pass, by name."""

  saved: tuple[str, ...]  # in device memory
  offloaded: tuple[str, ...]  # in host memory


def activations(remat: str) -> Activations:
  """Parses the lists of a `model.remat` such as 'save:gate,up+offload:q,k,v'.

  Returns:
    The names listed. Both tuples are empty for a named policy.
  """
  names: dict[str, tuple[str, ...]] = {"save": (), "offload": ()}
  for term in remat.split("+"):
    where, _, listed = term.partition(":")
    if where in names and listed:
      names[where] += tuple(listed.split(","))
  return Activations(names["save"], names["offload"])


def check(key: str, value: str) -> None:
  """Raises a UserError unless `value` is a policy or well-formed lists of activations."""
  if value in POLICIES:
    return
  terms = [term.partition(":") for term in value.split("+")]
  well_formed = all(where in ("save", "offload") and listed for where, _, listed in terms)
  saved, offloaded = activations(value)
  names = saved + offloaded
  unknown = (set(saved) - set(ACTIVATIONS)) | (set(offloaded) - {INPUT, *ACTIVATIONS})
  if not well_formed or unknown or len(set(names)) < len(names):
    raise UserError(
      f"{key}={value!r}: {nearest(value, POLICIES)}choose one of {', '.join(POLICIES)}, or "
      f"'save:' and some of {','.join(ACTIVATIONS)}, each once, such as "
      "'save:q,k,v,attention', or 'offload:' and such names or input, or 'save:gate,up+offload:q'"
    )
