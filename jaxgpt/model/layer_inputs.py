"""The inputs that all layers share: attention masks, rotary angles, positions and segments.

B batch, T query position, S key position.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections

from jaxgpt.model import rope
from jaxgpt.model.attention import attention, masks, paged, token_order


class KindInputs(NamedTuple):
  """The inputs of all layers of one kind of attention: 'global', 'local' or 'nope'.

  Attributes:
    mask: [B, T, S] bool, or None if the attention implementation builds the mask itself.
    rotary: (sin, cos) from `rope.angles`, or None.
  """

  mask: jax.Array | None
  rotary: tuple[jax.Array, jax.Array] | None


class LayerInputs(NamedTuple):
  """The inputs of all layers apart from the residual stream, computed once for a batch.

  Attributes:
    kinds: {kind of attention: its `KindInputs`}.
    positions: [B, T], positions within each document.
    real: [B, T], False for padding.
    segments: [B, T], 1, 2, ... for the documents of a row, 0 for padding.
    call: Where the tokens are in a paged cache, or None.
  """

  kinds: dict[str, KindInputs]
  positions: jax.Array
  real: jax.Array
  segments: jax.Array
  call: paged.Call | None = None


def make(
  cfg: ml_collections.FrozenConfigDict,
  form: str,
  positions_BT: jax.Array,
  segments_BT: jax.Array,
  call: paged.Call | None = None,
) -> LayerInputs:
  """Computes the inputs of all layers.

  Args:
    cfg: The config's `model` section.
    form: The attention implementation, one of `choose.FORMS`.
    positions_BT: Positions within each document.
    segments_BT: Segments, not used for the mask if there is a cache.
    call: Where the tokens are in a paged cache, or None.
  """
  mask: Callable[[int | None], jax.Array | None]
  if call is not None:
    length, mask = call.context, lambda window: None
  else:
    length = positions_BT.shape[1]
    mask = lambda window: (
      masks.visible(segments_BT, causal=cfg.causal, window=window)
      if attention.needs_mask(form, length)
      else None
    )
  real = segments_BT != 0
  kinds = {}
  for kind in sorted(set(cfg.attention_pattern)):
    local = kind == "local"
    rotary = None
    if cfg.position == "rotary" and kind != "nope":
      # Local layers may have a base of their own, and then do not stretch it (Gemma 3).
      own = local and cfg.rope.local_theta is not None
      theta = cfg.rope.local_theta if own else cfg.rope.theta
      scaling = "none" if own else cfg.rope.scaling
      rotary = rope.angles(positions_BT, rotated_size(cfg), cfg.rope, theta, scaling, length)
    kinds[kind] = KindInputs(mask(cfg.window if local else None), rotary)
  return LayerInputs(kinds, positions_BT, real, segments_BT, call)


def restored(inputs: LayerInputs) -> LayerInputs:
  """Inputs with positions, padding and segments in the order of the rows. `kinds` stays."""
  positions, real, segments = map(
    token_order.restore, (inputs.positions, inputs.real, inputs.segments)
  )
  return inputs._replace(positions=positions, real=real, segments=segments)


def rotated_size(cfg: ml_collections.FrozenConfigDict) -> int:
  """Number of entries of a head that the rotary embedding rotates."""
  return cfg.latent.rope_dim if cfg.latent.kv_rank else int(cfg.head_dim * cfg.rope.fraction)
