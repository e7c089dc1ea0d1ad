"""Rematerialization policies: which activations are saved for the backward pass.

Everything that is not saved is computed again. `model.remat` selects the policy.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxgpt.config.remat import ATTENTION, INPUT, MEAN_SQUARE, QKV, activations
from jaxgpt.model.attention.kernels import cudnn

# Memory kind that activations are offloaded to, which devices access directly.
HOST_MEMORY = "pinned_host"

Policy = Callable[..., Any]  # see `jax.checkpoint_policies`

_POLICIES = jax.checkpoint_policies


def _with_statistics(policy: Policy, names: Iterable[str]) -> Policy:
  """If the attention output is saved, saves the softmax statistics of cuDNN's kernel too.

  Otherwise the backward pass would run the kernel's forward pass again to get them.
  """
  if ATTENTION not in names:
    return policy
  return lambda primitive, *args, **params: (
    primitive.name == cudnn.FORWARD_PRIMITIVE or policy(primitive, *args, **params)
  )


def _save(*names: str) -> Policy:
  return _with_statistics(_POLICIES.save_only_these_names(*names), names)


REMAT = {
  "full": _POLICIES.nothing_saveable,
  "dots": _POLICIES.save_from_both_policies(  # attention kernels are not dots, so they are named
    _POLICIES.dots_with_no_batch_dims_saveable, _save(ATTENTION)
  ),
  "save_qkv": _save(*QKV),
  "save_attention": _save(*QKV, ATTENTION),
}


def policy(remat: str, also: tuple[str, ...] = ()) -> Policy:
  """The `jax.checkpoint` policy of a block.

  Args:
    remat: `model.remat`: a key of `REMAT`, or names to save and offload, such as
      'save:gate,up+offload:q,k,v'.
    also: Checkpoint names that are saved in addition.
  """
  also = (*also, MEAN_SQUARE)
  if remat in REMAT:
    named = _POLICIES.save_only_these_names(*also)
    return _POLICIES.save_from_both_policies(REMAT[remat], named)
  on_device, on_host = activations(remat)
  on_device = (*on_device, *also)
  if not on_host:
    return _save(*on_device)
  return _with_statistics(
    _POLICIES.save_and_offload_only_these_names(
      names_which_can_be_saved=list(on_device),
      names_which_can_be_offloaded=list(on_host),
      offload_src="device",
      offload_dst=HOST_MEMORY,
    ),
    on_device,
  )


def tick_policy(remat: str, repeats: int) -> Policy | None:
  """The policy of a pipeline tick: saves the input of a block and what `policy` saves of it.

  Args:
    remat: `model.remat`.
    repeats: Repeats of the circular schedule. With more than one, each tick selects its weights
      from those of its stage.

  Returns:
    The policy, or None to save everything.
  """
  if remat == "none":
    if repeats == 1:
      return None
    # Everything except the selected weights, which would be saved once per tick.
    recomputed = (jax.lax.gather_p, jax.lax.convert_element_type_p)
    return lambda prim, *_, **__: prim not in recomputed

  def plain_dots(prim, *_, dimension_numbers=None, **__):
    # As `dots_with_no_batch_dims_saveable`, but dots have one batch dimension: the stages.
    return prim is jax.lax.dot_general_p and len(dimension_numbers[1][0]) <= 1

  of_block = policy(remat, (INPUT,))
  return _POLICIES.save_from_both_policies(plain_dots, of_block) if remat == "dots" else of_block
