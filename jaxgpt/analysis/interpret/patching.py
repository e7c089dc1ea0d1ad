"""Activation patching and ablation: how much an output depends on one activation.

Causal tracing compares two prompts of the same length, a clean and a corrupted one
(arXiv:2202.05262, arXiv:2309.16042). The corrupted prompt is run again and again, each time with
the clean activations at one site: a position of a layer, a head, a whole layer. A site that
restores the clean answer carries the difference. Ablation puts zeros or a mean at a site instead.

All sites of a tap share one compiled program, since a site is a mask.

B batch, T position, N heads, L layers, P sites.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxgpt.analysis.interpret import taps
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from jaxgpt.tree import PyTree

_AT_ONCE = 8  # sites that are computed together


class Answer(NamedTuple):
  """What is measured: the logit of one token, less that of another.

  Attributes:
    at: Position of the prediction in each row, [B]. None for heads that pool.
    right: Token ids [B].
    wrong: Token ids [B].
  """

  at: Any
  right: Any
  wrong: Any

  def __call__(self, logits: jax.Array) -> jax.Array:
    """The difference of the logits, [B]. Logits are [B, T, V], or [B, V] for heads that pool."""
    rows = jnp.arange(logits.shape[0])
    logits_BV = logits if self.at is None else logits[rows, jnp.asarray(self.at)]
    return logits_BV[rows, jnp.asarray(self.right)] - logits_BV[rows, jnp.asarray(self.wrong)]


class Trace(NamedTuple):
  """The result of causal tracing.

  Attributes:
    clean: Logit difference of the clean prompts, [B].
    corrupted: That of the corrupted ones, [B].
    patched: That of the corrupted ones with clean activations at each site, [L, T or N or 1, B].
  """

  clean: jax.Array
  corrupted: jax.Array
  patched: jax.Array

  @property
  def recovered(self) -> jax.Array:
    """0: as corrupted, 1: as clean. [L, T or N or 1, B]."""
    return (self.patched - self.corrupted) / (self.clean - self.corrupted)


def sites(cfg: ml_collections.FrozenConfigDict, tap: str, by: str, length: int) -> np.ndarray:
  """Masks of the sites of a tap: bool [L, T or N or 1, ...], for `taps.Edit`.

  Args:
    cfg: The config's `model` section.
    tap: A tap of layers.
    by: 'position', 'head' or 'layer': what a site is, within a layer.
    length: T.

  Raises:
    UserError: The tap has no such axis.
  """
  taps.check(cfg, (tap,))
  if tap not in taps.OF_LAYERS:
    raise UserError(f"tap {tap!r} is of no layer; choose from {', '.join(taps.OF_LAYERS)}")
  shape = taps.OF_LAYERS[tap].partition("]")[0].strip("[").split(", ")
  axis, size = {"position": ("T", length), "head": ("N", cfg.num_heads), "layer": ("", 1)}[by]
  if axis and axis not in shape:
    raise UserError(f"tap {tap!r} has no axis by {by}: its activations are {taps.OF_LAYERS[tap]}")
  num_layers = len(taps.layers_with(cfg, tap))
  along = [size if name == axis else 1 for name in shape]
  inner = np.eye(size, dtype=bool).reshape(size, *along)
  layers = np.eye(num_layers, dtype=bool)
  # [layer of the site, index of the site, layer, ...]
  return layers[:, None, :, *([None] * len(shape))] & inner[None, :, None]


@functools.partial(jax.jit, static_argnames=("model", "tap"))
def replaced(
  model: transformer.Transformer,
  params: PyTree,
  inputs: taps.Inputs,
  answer: Answer,
  tap: str,
  masks: jax.Array,
  value: jax.Array,
) -> jax.Array:
  """Measures a batch once for each mask, with a value in the place of the activations.

  Args:
    model: From `taps.readable`.
    params: All its parameters.
    inputs: The batch.
    answer: What is measured.
    tap: Name of the tap.
    masks: Masks of sites, [P, ...], see `sites`.
    value: What the activations are replaced by: 0.0 ablates, the activations of other inputs patch.

  Returns:
    [P, B].
  """

  def one(mask: jax.Array) -> jax.Array:
    edits = {tap: taps.Edit(mask, value)}
    return answer(taps.forward(model, params, inputs, (), edits).output.logits)

  return jax.lax.map(one, masks, batch_size=min(_AT_ONCE, masks.shape[0]))


def trace(
  model: transformer.Transformer,
  params: PyTree,
  clean: taps.Inputs,
  corrupted: taps.Inputs,
  answer: Answer,
  tap: str = "resid_pre",
  by: str = "position",
) -> Trace:
  """Causal tracing over pairs of prompts.

  Args:
    model: From `taps.readable`, with logits over a vocabulary.
    params: All its parameters.
    clean: The clean prompts.
    corrupted: The corrupted prompts, of the same length.
    answer: The answer to the clean prompts, and that to the corrupted ones.
    tap: Where activations are patched.
    by: See `sites`.

  Raises:
    UserError: See `sites`; or the prompts differ in shape.
  """
  if clean.tokens.shape != corrupted.tokens.shape:
    raise UserError(
      f"clean prompts are {clean.tokens.shape}, corrupted ones {corrupted.tokens.shape}; "
      "activations are patched position by position, so give prompts of one length"
    )
  there, here = (taps.read(model, params, inputs, (tap,)) for inputs in (clean, corrupted))
  return restore(model, params, corrupted, answer, tap, by, there, here)


def restore(
  model: transformer.Transformer,
  params: PyTree,
  corrupted: taps.Inputs,
  answer: Answer,
  tap: str,
  by: str,
  there: taps.Reading,
  here: taps.Reading,
) -> Trace:
  """As `trace`, from readings of the clean prompts, `there`, and of the corrupted ones, `here`."""
  masks = sites(model.cfg, tap, by, corrupted.tokens.shape[1])
  flat = masks.reshape(-1, *masks.shape[2:])
  patched = replaced(model, params, corrupted, answer, tap, flat, there.at[tap])
  return Trace(
    answer(there.output.logits),
    answer(here.output.logits),
    patched.reshape(*masks.shape[:2], -1),
  )


def ablate_heads(
  cfg: ml_collections.FrozenConfigDict, heads: list[tuple[int, int]], value: Any = 0.0
) -> taps.Edits:
  """Edits that put a value, zero by default, in the place of heads.

  Args:
    cfg: The config's `model` section.
    heads: (layer, head) pairs.
    value: Broadcasts against [L, B, T, N, H].

  Raises:
    UserError: There is no such head.
  """
  mask = np.zeros((cfg.num_layers, 1, 1, cfg.num_heads, 1), bool)
  for layer, head in heads:
    if not (0 <= layer < cfg.num_layers and 0 <= head < cfg.num_heads):
      raise UserError(
        f"head {head} of layer {layer} does not exist: the model has {cfg.num_layers} layers of "
        f"{cfg.num_heads} heads, counted from 0"
      )
    mask[layer, :, :, head] = True
  return {"heads": taps.Edit(mask, value)}
