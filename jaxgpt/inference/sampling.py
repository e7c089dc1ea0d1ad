"""Sampling from a model with a key/value cache.

B sample, S cache slot, V vocabulary.
"""

import jax
import jax.numpy as jnp

from jaxgpt.model import kv_cache


def filter_logits(logits_BV, top_k, top_p, min_p):
  """Masks the tokens that a sampling rule leaves out; the rules apply one after the other.

  Args:
    logits_BV: already divided by the temperature.
    top_k: keep the k most likely tokens; 0: all.
    top_p: keep the fewest most likely tokens whose probabilities reach p (arXiv:1904.09751);
      1: all.
    min_p: keep tokens at least min_p times as likely as the likeliest (arXiv:2407.01082); 0: all.

  Returns:
    [B, V] with -inf for what is left out. The likeliest token always stays.
  """
  V = logits_BV.shape[-1]
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  kth = sorted_BV[:, jnp.clip(jnp.where(top_k > 0, top_k, V), 1, V) - 1]
  logits_BV = jnp.where(logits_BV < kth[:, None], -jnp.inf, logits_BV)
  sorted_BV = jnp.where(sorted_BV < kth[:, None], -jnp.inf, sorted_BV)
  probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # what the more likely ones hold together
  last = jnp.maximum((before_BV < top_p).sum(-1), 1) - 1
  threshold = jnp.take_along_axis(sorted_BV, last[:, None], axis=-1)
  floor = sorted_BV[:, :1] + jnp.log(min_p)
  return jnp.where((logits_BV < threshold) | (logits_BV < floor), -jnp.inf, logits_BV)


def sample(logits_BV, key, temperature, top_k, top_p, min_p):
  """One token id for each row; temperature 0 takes the most likely one.

  Args:
    logits_BV: float32.
    key: PRNG key.
    temperature: divides the logits.
    top_k, top_p, min_p: see `filter_logits`.

  Returns:
    [B] int32.
  """
  scaled = logits_BV / jnp.maximum(temperature, 1e-6)
  drawn = jax.random.categorical(key, filter_logits(scaled, top_k, top_p, min_p), axis=-1)
  return jnp.where(temperature > 0, drawn, logits_BV.argmax(-1)).astype(jnp.int32)


def make(model, num_slots, eos_id, vocab_size):
  """A jitted sampler: one compile for every prompt length, setting and number of new tokens.

  Args:
    model: a `Transformer`.
    num_slots: the context: prompt and new tokens together.
    eos_id: the token that ends a sample.
    vocab_size: ids from here on, which only pad the embedding, are never drawn.

  Returns:
    generate(params, tokens_BS, length, max_new, key, rules) -> (tokens_BS, lengths_B). `rules` are
    the arguments of `sample` after its key. `tokens_BS` holds a prompt of `length` tokens in each
    row, the rest is ignored; at most min(max_new, S - length) tokens follow it, up to the first
    `eos_id`, which is not counted in `lengths_B`.
  """
  cfg = model.cfg

  @jax.jit
  def generate(params, tokens_BS, length, max_new, key, rules):
    B = tokens_BS.shape[0]
    is_token_V = jnp.arange(cfg.vocab_size) < vocab_size

    def draw(logits_BV, i):
      return sample(jnp.where(is_token_V, logits_BV, -jnp.inf), jax.random.fold_in(key, i), *rules)

    places = jnp.broadcast_to(jnp.arange(num_slots), (B, num_slots))
    # Slots past the prompt get keys of padding; each is overwritten before it can be read.
    out = model.apply(
      {"params": params},
      tokens_BS,
      places,
      cache=kv_cache.init(cfg, B, num_slots),
      logits_at_B=jnp.full((B,), length - 1),
    )
    end = jnp.minimum(length + max_new, num_slots)

    def going(carry):
      i, _, _, _, done_B, _ = carry
      return (i < end) & ~done_B.all()

    def step(carry):
      i, tokens, cache, logits, done_B, lengths_B = carry
      token_B = draw(logits, i)
      done_B |= token_B == eos_id
      lengths_B = jnp.where(done_B, lengths_B, i + 1)
      tokens = tokens.at[:, i].set(token_B)
      out = model.apply(
        {"params": params},
        token_B[:, None],
        jnp.full((B, 1), i),
        cache=cache,
        logits_at_B=jnp.zeros((B,), jnp.int32),
      )
      return i + 1, tokens, out.cache, out.logits, done_B, lengths_B

    start = (
      length,
      tokens_BS,
      out.cache,
      out.logits,
      jnp.zeros((B,), bool),
      jnp.full((B,), length),
    )
    _, tokens, _, _, _, lengths_B = jax.lax.while_loop(going, step, start)
    return tokens, lengths_B

  return generate
