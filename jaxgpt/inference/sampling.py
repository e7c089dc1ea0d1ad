"""Sampling tokens from a model with a KV cache.

B sample, S cache slot, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.errors import UserError
from jaxgpt.model import kv_cache, transformer
from jaxgpt.tree import PyTree


class Sampling(NamedTuple):
  """How tokens are drawn, see `penalized`, `filter_logits` and `sample`."""

  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def check(self) -> None:
    """Raises a UserError that names the first value out of range."""
    for name, ok, valid in (
      ("temperature", self.temperature >= 0, "at least 0"),
      ("top_k", self.top_k >= 0, "at least 0"),
      ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
      ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
      ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
    ):
      if not ok or not math.isfinite(getattr(self, name)):
        flag = name.replace("_", "-")
        raise UserError(f"--{flag}={getattr(self, name)} must be {valid} and finite")


# generate(params, tokens_BS, length, max_new, key, settings) -> (tokens_BS, lengths_B), see `make`.
Generate = Callable[
  [
    PyTree,
    jax.typing.ArrayLike,
    jax.typing.ArrayLike,
    jax.typing.ArrayLike,
    jax.Array,
    tuple[float, ...],
  ],
  tuple[jax.Array, jax.Array],
]


def penalized(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float | jax.Array) -> jax.Array:
  """Makes tokens that the text already holds less likely (arXiv:1909.05858, section 4.1).

  Args:
    logits_BV: Logits before the temperature.
    seen_BV: bool, the tokens of the prompt and of the text so far.
    penalty: Divides positive logits of these tokens and multiplies negative ones; 1: no penalty.

  Returns:
    [B, V] logits, as transformers' RepetitionPenaltyLogitsProcessor gives them.
  """
  less_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  return jnp.where(seen_BV, less_BV, logits_BV)


def filter_logits(
  logits_BV: jax.Array,
  top_k: int | jax.Array,
  top_p: float | jax.Array,
  min_p: float | jax.Array,
) -> jax.Array:
  """Masks the tokens that a sampling rule excludes. The rules apply one after the other.

  Args:
    logits_BV: Logits, already divided by the temperature.
    top_k: Keep the k most likely tokens, 0: all.
    top_p: Keep the fewest most likely tokens whose probabilities add up to p (arXiv:1904.09751);
      1: all.
    min_p: Keep tokens at least min_p times as likely as the likeliest (arXiv:2407.01082), 0: all.

  Returns:
    [B, V], with -inf for excluded tokens. The likeliest token always stays.
  """
  V = logits_BV.shape[-1]
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  kth = sorted_BV[:, jnp.clip(jnp.where(top_k > 0, top_k, V), 1, V) - 1]
  logits_BV = jnp.where(logits_BV < kth[:, None], -jnp.inf, logits_BV)
  sorted_BV = jnp.where(sorted_BV < kth[:, None], -jnp.inf, sorted_BV)
  probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # total probability of more likely tokens
  last = jnp.maximum((before_BV < top_p).sum(-1), 1) - 1
  threshold = jnp.take_along_axis(sorted_BV, last[:, None], axis=-1)
  floor = sorted_BV[:, :1] + jnp.log(min_p)
  return jnp.where((logits_BV < threshold) | (logits_BV < floor), -jnp.inf, logits_BV)


def sample(
  logits_BV: jax.Array,
  key: jax.Array,
  temperature: float | jax.Array,
  top_k: int | jax.Array,
  top_p: float | jax.Array,
  min_p: float | jax.Array,
) -> jax.Array:
  """Draws one token per row. Temperature 0 takes the most likely one.

  Args:
    logits_BV: float32 logits.
    key: PRNG key.
    temperature: Divides the logits.
    top_k: See `filter_logits`.
    top_p: See `filter_logits`.
    min_p: See `filter_logits`.

  Returns:
    Token ids, [B] int32.
  """
  scaled = logits_BV / jnp.maximum(temperature, 1e-6)
  drawn = jax.random.categorical(key, filter_logits(scaled, top_k, top_p, min_p), axis=-1)
  return jnp.where(temperature > 0, drawn, logits_BV.argmax(-1)).astype(jnp.int32)


def make(
  model: transformer.Transformer, num_slots: int, eos_id: int | Sequence[int], vocab_size: int
) -> Generate:
  """Makes a jitted sampler, compiled once for all prompt lengths, settings and sample lengths.

  Args:
    model: The model.
    num_slots: S, the context: prompt and new tokens together.
    eos_id: The token that ends a sample, or several of which each does.
    vocab_size: Token ids from here on only pad the embedding. They are never drawn.

  Returns:
    generate(params, tokens_BS, length, max_new, key, settings) -> (tokens_BS, lengths_B). Each row
    of `tokens_BS` starts with a prompt of `length` tokens. The rest is ignored. At most
    min(max_new, S - length) tokens follow it, up to the first `eos_id`, which `lengths_B` does not
    count. `length` and `max_new` are one number for all rows, or [B]. `settings` is a `Sampling`,
    or the arguments of `sample` after its key.
  """
  cfg = model.cfg
  end_ids = jnp.array([eos_id] if isinstance(eos_id, int) else list(eos_id))
  apply: Any = model.apply  # the type of Flax's `apply` does not know the model's results

  @jax.jit
  def generate(params, tokens_BS, length, max_new, key, settings):
    B = tokens_BS.shape[0]
    is_token_V = jnp.arange(cfg.vocab_size) < vocab_size
    rows_B = jnp.arange(B)
    length_B = jnp.broadcast_to(length, (B,))
    end_B = jnp.minimum(length_B + max_new, num_slots)

    def draw(logits_BV, seen_BV, i):
      key_i = jax.random.fold_in(key, i)
      if len(settings) > 4:
        logits_BV = penalized(logits_BV, seen_BV, settings[4])
      return sample(jnp.where(is_token_V, logits_BV, -jnp.inf), key_i, *settings[:4])

    # Prefill: one call fills the cache. Slots after the prompt get keys of ignored tokens. Each of
    # them is overwritten before a query can attend to it.
    positions = jnp.broadcast_to(jnp.arange(num_slots), (B, num_slots))
    seen_BV = jnp.zeros((B, cfg.vocab_size), bool)
    seen_BV = seen_BV.at[rows_B[:, None], tokens_BS].max(positions < length_B[:, None])
    out = apply(
      {"params": params},
      tokens_BS,
      positions,
      cache=kv_cache.init(cfg, B, num_slots),
      logits_at_B=length_B - 1,
    )

    def unfinished(carry):
      _, _, _, _, _, done_B, _ = carry
      return ~done_B.all()

    # Decode: draw each row's token at its position, then compute the logits after it.
    def step(carry):
      t, tokens, seen_BV, cache, logits, done_B, lengths_B = carry
      token_B = draw(logits, seen_BV, length_B.max() + t)
      position_B = jnp.minimum(length_B + t, num_slots - 1)  # of rows that are not done
      done_B |= jnp.isin(token_B, end_ids)
      lengths_B = jnp.where(done_B, lengths_B, position_B + 1)
      tokens = tokens.at[rows_B, length_B + t].set(token_B)  # none beyond the last slot
      seen_BV = seen_BV.at[rows_B, token_B].set(True)
      done_B |= position_B + 1 >= end_B
      out = apply(
        {"params": params},
        token_B[:, None],
        position_B[:, None],
        cache=cache,
        logits_at_B=jnp.zeros((B,), jnp.int32),
      )
      return t + 1, tokens, seen_BV, out.cache, out.logits, done_B, lengths_B

    start = (0, tokens_BS, seen_BV, out.cache, out.logits, length_B >= end_B, length_B)
    _, tokens, _, _, _, _, lengths_B = jax.lax.while_loop(unfinished, step, start)
    return tokens, lengths_B

  return generate
