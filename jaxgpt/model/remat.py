"""What of the layers the backward pass finds saved, and what it computes again."""

import jax

from jaxgpt.config.remat import activations
from jaxgpt.model import layers
from jaxgpt.model.attention import attention

_SAVEABLE = jax.checkpoint_policies


def _with_statistics(policy, names):
  """With attention's output, where that is among the names, what its kernel keeps beside it."""
  if attention.OUTPUT not in names:
    return policy
  return lambda primitive, *args, **params: (
    primitive.name == attention.CUDNN_FORWARD or policy(primitive, *args, **params)
  )


def _named(*names):
  return _with_statistics(_SAVEABLE.save_only_these_names(*names), names)


REMAT = {  # what the backward pass finds saved; everything else is computed again
  "full": _SAVEABLE.nothing_saveable,
  "dots": _SAVEABLE.save_from_both_policies(  # a kernel is no dot
    _SAVEABLE.dots_with_no_batch_dims_saveable, _named(attention.OUTPUT)
  ),
  "save_qkv": _named(*layers.QKV),
  "save_attention": _named(*layers.QKV, attention.OUTPUT),
}


def policy(remat, also=()):
  """What `model.remat` saves, and other names: a key of `REMAT`, or names as `config.remat` reads."""
  if remat in REMAT:
    named = _SAVEABLE.save_only_these_names(*also)
    return _SAVEABLE.save_from_both_policies(REMAT[remat], named)
  on_device, on_host = activations(remat)
  on_device = (*on_device, *also)
  if not on_host:
    return _named(*on_device)
  return _with_statistics(
    _SAVEABLE.save_and_offload_only_these_names(
      names_which_can_be_saved=list(on_device),
      names_which_can_be_offloaded=list(on_host),
      offload_src="device",
      offload_dst=HOST_MEMORY,
    ),
    on_device,
  )


HOST_MEMORY = "pinned_host"  # the kind that devices read and write by themselves
INPUT = "input"  # name of what a block reads


def tick_policy(remat, repeats):
  """What of a pipeline's tick is saved: what `policy` saves of a block, and its input; None: all.

  Args:
    remat: `model.remat`.
    repeats: of the pipeline; where there are several, a tick takes its weights out of the stage's.
  """
  if remat == "none":
    if repeats == 1:
      return None
    # All but those weights, which would be saved for each tick.
    made_again = (jax.lax.gather_p, jax.lax.convert_element_type_p)
    return lambda prim, *_, **__: prim not in made_again

  def plain_dots(prim, *_, dimension_numbers=None, **__):  # with the stages' one batch dimension
    return prim is jax.lax.dot_general_p and len(dimension_numbers[1][0]) <= 1

  of_block = policy(remat, (INPUT,))
  return _SAVEABLE.save_from_both_policies(plain_dots, of_block) if remat == "dots" else of_block
