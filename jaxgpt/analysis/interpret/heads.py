"""Scores of attention heads, by where they attend in repeated random tokens.

B batch, T position, S key position, N heads, L layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.analysis.interpret import taps
from jaxgpt.model import transformer
from jaxgpt.tree import PyTree


class Scores(NamedTuple):
  """Mean attention [L, N] of each head, from 0 to 1.

  Attributes:
    induction: In the second copy, to the token after the same token in the first copy: the token
      that comes next (Olsson et al., arXiv:2209.11895).
    previous: To the token before.
    duplicate: In the second copy, to the same token in the first copy.
    first: To the first token of the row, where heads rest that have nothing to do.
  """

  induction: jax.Array
  previous: jax.Array
  duplicate: jax.Array
  first: jax.Array


def repeated(key: jax.Array, rows: int, half: int, vocab_size: int) -> jax.Array:
  """Random tokens, each row twice in a row: [rows, 2 * half]. No token occurs twice in a copy
  where the vocabulary allows.

  Args:
    key: PRNG key.
    rows: Number of rows.
    half: Length of a copy.
    vocab_size: Ids are below it.
  """
  if half <= vocab_size:
    draw = lambda k: jax.random.permutation(k, vocab_size)[:half]
  else:
    draw = lambda k: jax.random.randint(k, (half,), 0, vocab_size)
  once = jax.vmap(draw)(jax.random.split(key, rows))
  return jnp.concatenate([once, once], 1)


@functools.partial(jax.jit, static_argnames="model")
def scores(model: transformer.Transformer, params: PyTree, tokens_BT: jax.Array) -> Scores:
  """Scores all heads on rows of two equal halves.

  Args:
    model: From `taps.readable`.
    params: All its parameters.
    tokens_BT: From `repeated`.
  """
  half = tokens_BT.shape[1] // 2
  reading = taps.forward(model, params, taps.Inputs(tokens_BT), ("pattern",))
  pattern = reading.at["pattern"].astype(jnp.float32).mean(1)  # [L, N, T, S]
  second = jnp.arange(half, 2 * half - 1)
  t = jnp.arange(1, 2 * half)
  return Scores(
    induction=pattern[..., second, second - half + 1].mean(-1),
    previous=pattern[..., t, t - 1].mean(-1),
    duplicate=pattern[..., second, second - half].mean(-1),
    first=pattern[..., t, 0].mean(-1),
  )
