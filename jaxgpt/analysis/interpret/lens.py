"""The logit lens: the predictions of a model that ended after each layer.

B batch, T position, D model, V vocabulary, L layers, R residual streams, K likeliest tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.analysis.interpret import taps
from jaxgpt.model import transformer
from jaxgpt.tree import PyTree


class Lens(NamedTuple):
  """Predictions after the embeddings (index 0) and after each layer (index 1 to L).

  Attributes:
    ids: The likeliest tokens, or classes, [L + 1, B, T, K], or [L + 1, B, K] for heads that pool.
    probabilities: Their probabilities.
    entropy: Of the whole distribution, in nats, [L + 1, B, T].
  """

  ids: jax.Array
  probabilities: jax.Array
  entropy: jax.Array


def streams(at: dict[str, jax.Array]) -> jax.Array:
  """The residual stream before the first layer and after each, [L + 1, B, T, D].

  Args:
    at: Readings of `resid_pre` and `resid_final`.
  """
  return jnp.concatenate([at["resid_pre"], at["resid_final"][None]])


def unembed(
  model: transformer.Transformer, params: PyTree, inputs: taps.Inputs, stream_BTD: jax.Array
) -> jax.Array:
  """The logits that a residual stream gives: the final norm and the head of the model.

  Args:
    model: From `taps.readable`.
    params: All its parameters.
    inputs: The batch, of which heads that pool read segments and positions.
    stream_BTD: Residual stream.
  """
  edits = {"resid_final": taps.Edit(True, stream_BTD)}
  return taps.forward(model, params, inputs, (), edits).output.logits


@functools.partial(jax.jit, static_argnames=("model", "k"))
def logit_lens(
  model: transformer.Transformer,
  params: PyTree,
  inputs: taps.Inputs,
  stream_RBTD: jax.Array,
  k: int = 5,
) -> Lens:
  """Applies the lens (nostalgebraist, 2020) to residual streams, such as those of `streams`.

  Args:
    model: From `taps.readable`.
    params: All its parameters.
    inputs: The batch.
    stream_RBTD: Residual streams.
    k: How many of the likeliest tokens to return.
  """

  def one(stream_BTD: jax.Array) -> Lens:
    log_p = jax.nn.log_softmax(unembed(model, params, inputs, stream_BTD))
    top, ids = jax.lax.top_k(log_p, min(k, log_p.shape[-1]))
    return Lens(ids, jnp.exp(top), -(jnp.exp(log_p) * log_p).sum(-1))

  return jax.lax.map(one, stream_RBTD)  # the logits of one stream at a time
