"""Drawing tokens from logits.

B row, V vocabulary, C candidate.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.errors import UserError

_CANDIDATES = 128  # most likely tokens that are sorted first; all are where these do not suffice
_GROUP = 128  # neighbours in the vocabulary whose probabilities are summed first


class Sampling(NamedTuple):
  """How tokens are drawn. In compiled code each is an array [B], with a value for each row.

  Attributes:
    temperature: Divides the logits. 0: always the most likely token.
    top_k: See `filter_logits`.
    top_p: See `filter_logits`.
    min_p: See `filter_logits`.
    repetition_penalty: See `penalized`.
    presence_penalty: See `penalized`.
    frequency_penalty: See `penalized`.
  """

  temperature: Any = 0.8
  top_k: Any = 0
  top_p: Any = 1.0
  min_p: Any = 0.0
  repetition_penalty: Any = 1.0
  presence_penalty: Any = 0.0
  frequency_penalty: Any = 0.0

  def check(self) -> None:
    """Raises a UserError that names the first value out of range."""
    for name, ok, valid in (
      ("temperature", self.temperature >= 0, "at least 0"),
      ("top_k", 0 <= self.top_k < 2**31, "at least 0, below 2^31"),
      ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
      ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
      ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
      ("presence_penalty", abs(self.presence_penalty) <= 100, "in [-100, 100]"),
      ("frequency_penalty", abs(self.frequency_penalty) <= 100, "in [-100, 100]"),
    ):
      if not ok or not math.isfinite(getattr(self, name)):
        flag = name.replace("_", "-")
        raise UserError(f"--{flag}={getattr(self, name)} must be {valid} and finite")


def penalized(
  logits_BV: jax.Array, prompt_BV: jax.Array, counts_BV: jax.Array, s: Sampling
) -> jax.Array:
  """Makes tokens that the text already holds less likely.

  The repetition penalty divides positive logits of tokens of the prompt and of the text, and
  multiplies negative ones (arXiv:1909.05858, section 4.1, transformers'
  RepetitionPenaltyLogitsProcessor). The other two are subtracted, as OpenAI's API has it: the
  presence penalty once from each token of the text, the frequency penalty each time.

  Args:
    logits_BV: Logits before the temperature.
    prompt_BV: bool, the tokens of the prompt.
    counts_BV: int32, how often the text after the prompt holds each token.
    s: Settings [B].
  """
  penalty = s.repetition_penalty[:, None]
  less_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  written_BV = counts_BV > 0
  logits_BV = jnp.where(prompt_BV | written_BV, less_BV, logits_BV)
  return (
    logits_BV - s.presence_penalty[:, None] * written_BV - s.frequency_penalty[:, None] * counts_BV
  )


def is_penalized(s: Sampling) -> jax.Array:
  """Whether each row has a penalty, [B] bool."""
  return (s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0)


def filter_logits(
  logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
  """Masks the tokens that a sampling rule excludes. The rules apply one after the other.

  A row's result does not depend on the others. The vocabulary is sorted only where the
  `_CANDIDATES` most likely tokens do not decide.

  Args:
    logits_BV: Logits, already divided by the temperature.
    top_k: [B]. Keep the k most likely tokens and those as likely as the last of them, 0: all.
    top_p: [B]. Keep the fewest most likely tokens whose probabilities add up to p
      (arXiv:1904.09751); 1: all.
    min_p: [B]. Keep tokens at least min_p times as likely as the likeliest (arXiv:2407.01082); 0:
      all.

  Returns:
    [B, V], with -inf for excluded tokens. The likeliest token always stays.
  """
  V = logits_BV.shape[-1]
  few = min(_CANDIDATES, V)
  everything = jnp.full(logits_BV.shape[:1], -jnp.inf)

  def least():
    some, decided = _least(logits_BV, few, top_k, top_p)
    if few == V:
      return some
    all_of_them = lambda: _least(logits_BV, V, top_k, top_p)[0]
    return jnp.where(decided, some, jax.lax.cond(decided.all(), lambda: some, all_of_them))

  sorts = ((top_k > 0) & (top_k < V)) | (top_p < 1)
  least_B = jax.lax.cond(sorts.any(), least, lambda: everything)
  least_B = jnp.where(sorts, least_B, -jnp.inf)
  floor_B = logits_BV.max(-1) + jnp.log(min_p)
  keep = (logits_BV >= least_B[:, None]) & (logits_BV >= floor_B[:, None])
  return jnp.where(keep, logits_BV, -jnp.inf)


def _least(
  logits_BV: jax.Array, C: int, top_k: jax.Array, top_p: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The least logit that top-k and top-p keep, by the C most likely tokens.

  Returns:
    (logits [B], bool [B]: whether C tokens sufficed to tell).
  """
  V = logits_BV.shape[-1]
  sorted_BC = jax.lax.top_k(logits_BV, C)[0]
  k_B = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
  at = lambda i_B: jnp.take_along_axis(sorted_BC, jnp.minimum(i_B, C - 1)[:, None], axis=1)
  kth_B1 = jnp.where((k_B < V)[:, None], at(k_B - 1), -jnp.inf)
  exp = lambda x: jnp.where(x >= kth_B1, jnp.exp(x - sorted_BC[:, :1]), 0)
  wanted_B1 = top_p[:, None] * exp(logits_BV).sum(-1, keepdims=True)
  reached_BC = jnp.cumsum(exp(sorted_BC), axis=-1)
  # The first token stays, and each whose more likely ones do not reach p.
  count_B = 1 + (reached_BC[:, :-1] < wanted_B1).sum(-1)
  by_p = top_p < 1
  least_B = jnp.where(by_p, at(count_B - 1)[:, 0], kth_B1[:, 0])
  # Rounding may keep the sum of all tokens below p of it.
  decided = ((k_B <= C) | (k_B == V)) & (~by_p | (reached_BC[:, -1] >= wanted_B1[:, 0]) | (C == V))
  return least_B, decided


def sample(logits_BV: jax.Array, uniform_B2: jax.Array, s: Sampling) -> jax.Array:
  """Draws one token for each row. Temperature 0 takes the most likely one.

  Args:
    logits_BV: float32 logits, after penalties, -inf for tokens that must not be drawn.
    uniform_B2: Uniform draws from [0, 1).
    s: Settings [B]. The penalties are not read.

  Returns:
    Token ids, [B] int32.
  """
  best_B = logits_BV.argmax(-1).astype(jnp.int32)

  drawn_B = jax.lax.cond(
    (s.temperature > 0).any(), lambda: draw(_weights(logits_BV, s), uniform_B2), lambda: best_B
  )
  return jnp.where(s.temperature > 0, drawn_B, best_B)


def probabilities(logits_BV: jax.Array, s: Sampling) -> jax.Array:
  """The distributions that `sample` draws from, float32 [B, V]. Temperature 0: one token's is 1.

  Args:
    logits_BV: See `sample`.
    s: Settings [B]. The penalties are not read.
  """
  best_BV = jax.nn.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1])

  def shares():
    weights_BV = _weights(logits_BV, s)
    shares_BV = weights_BV / weights_BV.sum(-1, keepdims=True)
    return jnp.where(s.temperature[:, None] > 0, shares_BV, best_BV)

  return jax.lax.cond((s.temperature > 0).any(), shares, lambda: best_BV)


def _weights(logits_BV: jax.Array, s: Sampling) -> jax.Array:
  """Weights of the tokens, proportional to their probabilities where the temperature is not 0."""
  scaled = logits_BV / jnp.maximum(s.temperature, 1e-6)[:, None]
  kept = filter_logits(scaled, s.top_k, s.top_p, s.min_p)
  return jnp.exp(kept - kept.max(-1, keepdims=True))


def draw(weights_BV: jax.Array, uniform_B2: jax.Array) -> jax.Array:
  """Draws an index with probabilities proportional to weights: a group of neighbours, then one.

  Two draws of 24 bits tell more tokens apart than one, and sums of groups are cheaper than a
  cumulative sum over the vocabulary.

  Args:
    weights_BV: Weights, at least 0, one of each row above it.
    uniform_B2: Uniform draws from [0, 1).

  Returns:
    int32 [B].
  """
  B, V = weights_BV.shape
  padded = jnp.pad(weights_BV, ((0, 0), (0, -V % _GROUP))).reshape(B, -1, _GROUP)
  group_B = _inverse_cdf(padded.sum(-1), uniform_B2[:, 0])
  inside = jnp.take_along_axis(padded, group_B[:, None, None], axis=1)[:, 0]
  return (group_B * _GROUP + _inverse_cdf(inside, uniform_B2[:, 1])).astype(jnp.int32)


def _inverse_cdf(weights_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """The first index whose cumulative weight exceeds a share of the whole, [B]."""
  reached_BN = jnp.cumsum(weights_BN, axis=-1)
  index_B = (reached_BN <= uniform_B[:, None] * reached_BN[:, -1:]).sum(-1)
  # Rounding must not lead past the last index with a weight.
  last_B = weights_BN.shape[-1] - 1 - jnp.argmax(weights_BN[:, ::-1] > 0, axis=-1)
  return jnp.minimum(index_B, last_B)
