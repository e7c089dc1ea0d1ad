"""The two compiled programs of decoding: a chunk of a prompt, and one token of each row.

Neither depends on the lengths of the texts, so each is compiled once. The arrays that they carry
from call to call are donated: the cache is updated in place.

B row, T token of a chunk, V vocabulary, A alternative.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.inference import sampling
from jaxgpt.inference.sampling import Sampling
from jaxgpt.model import kv_cache, transformer
from jaxgpt.model.attention import paged
from jaxgpt.tree import PyTree

MOST_ALTERNATIVES = 20  # log-probabilities of other tokens that a request may ask for


# XLA's own loops multiply a few rows by a matrix twice as fast as the library that it calls, which
# packs the whole matrix first (docs/log.md).
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_prefer_vector_width": "512"}


@functools.cache
def compiler_options() -> dict[str, str]:
  """XLA options for decoding on the default backend, if this version of XLA knows them."""
  if jax.default_backend() != "cpu":
    return {}
  try:
    jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS)(0)
  except jax.errors.JaxRuntimeError:
    return {}
  return _CPU_OPTIONS


class Carried(NamedTuple):
  """What a call leaves for the next one.

  Attributes:
    pools: The cache.
    prompts: bool [B, V], tokens of the prompt of each row that has a penalty.
    counts: int32 [B, V], how often each token was drawn in the row.
  """

  pools: kv_cache.Pools
  prompts: jax.Array
  counts: jax.Array


class StepInputs(NamedTuple):
  """One token of each row.

  Attributes:
    tokens: int32 [B].
    positions: int32 [B].
    call: Where they are in the cache.
    sampling: Settings [B].
    seeds: uint32 [B, 2].
    with_logprobs: bool [B], rows whose log-probabilities are wanted.
  """

  tokens: np.ndarray
  positions: np.ndarray
  call: paged.Step
  sampling: Sampling
  seeds: np.ndarray
  with_logprobs: np.ndarray


class Drawn(NamedTuple):
  """The tokens that follow.

  Attributes:
    tokens: int32 [B].
    logprobs: float32 [B], by the model itself, before temperature, penalties and filters.
    best: int32 [B, A], the most likely tokens.
    best_logprobs: float32 [B, A].
  """

  tokens: jax.Array
  logprobs: jax.Array
  best: jax.Array
  best_logprobs: jax.Array


class Programs:
  """The compiled programs of a model.

  Attributes:
    prefill: (weights, carried, tokens_T, start, `paged.Chunk`) -> carried. Writes T tokens of a
      prompt, from position `start` on, into the cache. T is a multiple of the block's size.
    decode: (weights, carried, `StepInputs`) -> (carried, `Drawn`).
    enter: (carried, row, prompt_V) -> carried. Begins the counts of a row with a penalty.
  """

  def __init__(self, model: transformer.Transformer, vocab_size: int):
    """Args: model: From `weights.prepare`. vocab_size: Ids from here on are never drawn."""
    self._model, self._vocab_size = model, vocab_size
    options = compiler_options()
    self.prefill = jax.jit(self._prefill, donate_argnums=1)
    self.decode = jax.jit(self._decode, donate_argnums=1, compiler_options=options)
    self.enter = jax.jit(self._enter, donate_argnums=0)

  def carried(self, num_rows: int, num_blocks: int, block_size: int, dtype: Any) -> Carried:
    """An empty cache, sharded as the model's keys are."""
    cfg, rules = self._model.cfg, self._model.rules

    @jax.jit
    def make():
      pools = kv_cache.pools(cfg, num_blocks, block_size, dtype)
      pools = jax.tree.map(lambda x: rules.constrain(x, None, "act_heads", None, None), pools)
      shape = (num_rows, cfg.vocab_size)
      return Carried(pools, jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))

    return make()

  def _prefill(
    self,
    weights: PyTree,
    carried: Carried,
    tokens_T: jax.Array,
    start: jax.Array,
    call: paged.Chunk,
  ) -> Carried:
    # What follows the prompt in its last chunk is not read, but a position must exist.
    positions_T = jnp.minimum(start + jnp.arange(len(tokens_T)), call.context - 1)
    out: Any = self._model.apply(
      {"params": weights},
      tokens_T[None],
      positions_T[None],
      cache=carried.pools,
      call=call,
      project=lambda x, w, bias: None,  # the last token of a prompt is decoded
    )
    return carried._replace(pools=out.cache)

  def _decode(self, weights: PyTree, carried: Carried, x: StepInputs) -> tuple[Carried, Drawn]:
    B = x.tokens.shape[0]
    out: Any = self._model.apply(
      {"params": weights},
      x.tokens[:, None],
      x.positions[:, None],
      cache=carried.pools,
      call=x.call,
      logits_at_B=jnp.zeros((B,), jnp.int32),
    )
    V = self._model.cfg.vocab_size
    logits_BV = jnp.where(jnp.arange(V) < self._vocab_size, out.logits, -jnp.inf)
    s = x.sampling
    less = lambda: sampling.penalized(logits_BV, carried.prompts, carried.counts, s)
    scores_BV = jax.lax.cond(sampling.is_penalized(s).any(), less, lambda: logits_BV)
    tokens_B = sampling.sample(scores_BV, _uniform(x.seeds, x.positions), s)
    counts = carried.counts.at[jnp.arange(B), tokens_B].add(1)
    drawn = jax.lax.cond(
      x.with_logprobs.any(), lambda: _logprobs(logits_BV, tokens_B), lambda: _none(tokens_B, V)
    )
    return carried._replace(pools=out.cache, counts=counts), drawn

  def _enter(self, carried: Carried, row: jax.Array, prompt_V: jax.Array) -> Carried:
    return carried._replace(
      prompts=carried.prompts.at[row].set(prompt_V), counts=carried.counts.at[row].set(0)
    )


def _uniform(seeds_B2: jax.typing.ArrayLike, position_B: jax.typing.ArrayLike) -> jax.Array:
  """Two uniform draws for each row, by its own seed and position alone."""

  def row(seed, position):
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.uniform(key, (2,))

  return jax.vmap(row)(seeds_B2, position_B)


def _logprobs(logits_BV: jax.Array, tokens_B: jax.Array) -> Drawn:
  logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
  best_logprobs, best = jax.lax.top_k(logprobs_BV, min(MOST_ALTERNATIVES, logits_BV.shape[1]))
  own = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]
  return Drawn(tokens_B, own, best, best_logprobs)


def _none(tokens_B: jax.Array, V: int) -> Drawn:
  shape = (len(tokens_B), min(MOST_ALTERNATIVES, V))
  zero = jnp.zeros(shape, jnp.float32)
  return Drawn(tokens_B, zero[:, 0], jnp.zeros(shape, jnp.int32), zero)
