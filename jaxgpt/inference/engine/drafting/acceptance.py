"""Which drafted tokens a model takes, so that its text keeps the model's own distribution.

A drafter guesses the next K tokens, each drawn from a distribution q. The model computes its own
distributions p after each of them in one call (Leviathan et al., arXiv:2211.17192, algorithm 1):

    drafted     the    cat    sat    on
    taken       yes    yes    no                  with probability min(1, p / q)
    text        the    cat    lay                 in its place one from max(p - q, 0), normalized

If all are taken, one more token is drawn from the last p. So a call yields 1 to K + 1 tokens. With
temperature 0 both distributions have one token each, and a guess is taken if it is the model's.

B row, K drafted token, T = K + 1 position, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.inference import sampling
from jaxgpt.inference.sampling import Sampling


class Drafts(NamedTuple):
  """Drafted tokens of each row.

  Attributes:
    tokens: int32 [B, K].
    num: int32 [B], how many of them count, the first ones.
    probs: float32 [B, K, at most V], the distributions that they were drawn from. None: each was
      certain.
  """

  tokens: jax.typing.ArrayLike
  num: jax.typing.ArrayLike
  probs: jax.Array | None = None


def accept(
  scores_BTV: jax.Array,
  drafts: Drafts,
  accept_BT: jax.Array,
  uniform_BT2: jax.Array,
  s: Sampling,
) -> tuple[jax.Array, jax.Array]:
  """Takes drafted tokens, and draws the one that follows them.

  Args:
    scores_BTV: The model's float32 logits before the first drafted token, and after each. With
      penalties, and -inf for tokens that must not be drawn.
    drafts: The drafted tokens.
    accept_BT: Uniform draws from [0, 1) that decide on drafted tokens.
    uniform_BT2: Uniform draws for the token that follows.
    s: Settings [B]. The penalties are not read.

  Returns:
    (tokens [B, T], how many of them are the text's [B], at least 1).
  """
  B, T, V = scores_BTV.shape
  drafted_BK, num_B = jnp.asarray(drafts.tokens), jnp.asarray(drafts.num)
  K = T - 1
  best_BT = scores_BTV.argmax(-1).astype(jnp.int32)

  def taken(ok_BK: jax.Array) -> jax.Array:
    """How many of the first tokens are all right."""
    return jnp.cumprod(ok_BK & (jnp.arange(K) < num_B[:, None]), axis=1).sum(1)

  def most_likely() -> tuple[jax.Array, jax.Array]:
    count_B = taken(drafted_BK == best_BT[:, :K])
    return count_B, _at(best_BT, count_B)

  def drawn() -> tuple[jax.Array, jax.Array]:
    several = jax.tree.map(lambda x: jnp.repeat(x, T), s)
    p_BTV = sampling.probabilities(scores_BTV.reshape(B * T, V), several).reshape(B, T, V)
    own_BK = _of(p_BTV[:, :K], drafted_BK)
    theirs_BK = 1.0 if drafts.probs is None else _of(drafts.probs, drafted_BK)
    count_B = taken(accept_BT[:, :K] * theirs_BK < own_BK)
    refused_B = jnp.minimum(count_B, K - 1)
    if drafts.probs is None:
      q_BV = jax.nn.one_hot(_at(drafted_BK, refused_B), V)
    else:
      q_BV = _at(drafts.probs, refused_B)
      q_BV = jnp.pad(q_BV, ((0, 0), (0, V - q_BV.shape[1])))
    p_BV = _at(p_BTV, count_B)
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    # Rounding may leave nothing of two distributions that are equal.
    is_rest = (count_B < num_B) & (rest_BV > 0).any(-1)
    weights_BV = jnp.where(is_rest[:, None], rest_BV, p_BV)
    return count_B, sampling.draw(weights_BV, _at(uniform_BT2, count_B))

  count_B, last_B = jax.lax.cond((s.temperature > 0).any(), drawn, most_likely)
  drafted_BT = jnp.pad(drafted_BK, ((0, 0), (0, 1)))
  tokens_BT = jnp.where(jnp.arange(T) < count_B[:, None], drafted_BT, last_B[:, None])
  return tokens_BT, count_B + 1


def _at(x: jax.Array, index_B: jax.Array) -> jax.Array:
  """x[b, index[b]] for each row."""
  return jax.vmap(lambda row, i: row[i])(x, index_B)


def _of(probs_BKV: jax.Array, tokens_BK: jax.Array) -> jax.Array:
  """The probabilities of tokens, [B, K]."""
  return jnp.take_along_axis(probs_BKV, tokens_BK[..., None], axis=-1)[..., 0]
