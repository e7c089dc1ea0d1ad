"""The two programs of decoding: a chunk of a prompt, and one token of each row.

Neither depends on the lengths of the texts: the first is compiled for each size of chunks, the
second once. The arrays that they carry from call to call are donated: the cache is updated in
place.

B row, T token of a chunk, V vocabulary, W word of 32 tokens, A alternative.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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
    constrained: bool [B], rows whose texts have a prescribed form.
    allowed: uint32 [B, W], the tokens that may follow in these rows, a bit each.
  """

  tokens: np.ndarray
  positions: np.ndarray
  call: paged.Step
  sampling: Sampling
  seeds: np.ndarray
  with_logprobs: np.ndarray
  constrained: np.ndarray
  allowed: np.ndarray


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


class Size(NamedTuple):
  """The size of the cache.

  Attributes:
    rows: B, rows of a batch.
    blocks: Blocks of the pool.
    block_size: Tokens of a block.
    dtype: dtype of the cache.
  """

  rows: int
  blocks: int
  block_size: int
  dtype: Any


class Programs:
  """The compiled programs of a model. All processes of the mesh must call them alike.

  The cache is sharded as the model's keys are. Rows are sharded in all layers but attention, which
  each data shard computes for all rows.

  Attributes:
    empty: () -> carried. An empty cache.
    prefill: (weights, carried, tokens_T, start, `paged.Chunk`) -> carried. Writes T tokens of a
      prompt, from position `start` on, into the cache. T is a multiple of the block's size.
    decode: (weights, carried, `StepInputs`) -> (carried, `Drawn`).
    enter: (carried, row, prompt_V) -> carried. Begins the counts of a row with a penalty.
  """

  def __init__(
    self, model: transformer.Transformer, vocab_size: int, size: Size, mesh: jax.sharding.Mesh
  ):
    """Prepares the programs, which are compiled at their first call.

    Args:
      model: From `weights.prepare`.
      vocab_size: Ids from here on are never drawn.
      size: Size of the cache.
      mesh: The device mesh.
    """
    self._model, self._vocab_size, self._size = model, vocab_size, size
    # Each process reads what was drawn, so it is on all devices.
    whole: Any = NamedSharding(mesh, P())
    axes = (None, "act_heads", None, None)
    of_pool = lambda x: NamedSharding(mesh, model.rules.fitting_spec(mesh, x.shape, axes))
    pools = jax.tree.map(of_pool, jax.eval_shape(self._empty).pools)
    carried = Carried(pools, whole, whole)
    jit = functools.partial(jax.jit, out_shardings=carried)
    self.empty = jit(self._empty)
    self.prefill = jit(self._prefill, donate_argnums=1)
    self.decode = jit(
      self._decode,
      donate_argnums=1,
      out_shardings=(carried, whole),
      compiler_options=compiler_options(),
    )
    self.enter = jit(self._enter, donate_argnums=0)

  def _empty(self) -> Carried:
    size, V = self._size, self._model.cfg.vocab_size
    pools = kv_cache.pools(self._model.cfg, size.blocks, size.block_size, size.dtype)
    return Carried(pools, jnp.zeros((size.rows, V), bool), jnp.zeros((size.rows, V), jnp.int32))

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
    scores_BV = jax.lax.cond(
      x.constrained.any(),
      lambda: jnp.where(_bits(x.allowed, V) | ~x.constrained[:, None], scores_BV, -jnp.inf),
      lambda: scores_BV,
    )
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


def _bits(words_BW: jax.typing.ArrayLike, V: int) -> jax.Array:
  """Bits of words as bool [B, V]. Those that the words lack are False."""
  words_BW = jnp.asarray(words_BW)
  bits = (words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
  flat = bits.reshape(len(words_BW), -1).astype(bool)[:, :V]
  return jnp.pad(flat, ((0, 0), (0, V - flat.shape[1])))


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
