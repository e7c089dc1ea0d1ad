"""The programs of decoding: blocks of prompts, and the next tokens of each row.

None depends on the lengths of the texts: the first is compiled for each size of chunks, the others
once. The arrays that they carry from call to call are donated: the cache is updated in place.

B row, T token of a call, K drafted token, V vocabulary, W word of 32 tokens, A alternative.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.inference import sampling
from jaxgpt.inference.engine.blocks import SPARE
from jaxgpt.inference.engine.drafting import acceptance
from jaxgpt.inference.engine.drafting.acceptance import Drafts
from jaxgpt.inference.engine.requests import Token
from jaxgpt.inference.sampling import Sampling
from jaxgpt.model import kv_cache, transformer
from jaxgpt.model.attention import paged
from jaxgpt.tree import PyTree

MOST_ALTERNATIVES = 20  # log-probabilities of other tokens that a request may ask for
_COPIES = 16  # blocks that are copied in a call
_ACCEPT, _DRAFT = 1, 2  # uses of random draws besides that of the tokens themselves

# XLA's own loops multiply a few rows by a matrix twice as fast as the library that it calls, which
# packs the whole matrix first (docs/log.md).
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_prefer_vector_width": "512"}


@functools.cache
def compiler_options(platform: str) -> dict[str, str]:
  """XLA options for decoding on a platform, such as 'cpu', if this version of XLA knows them."""
  if platform != "cpu":
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
    tokens: int32 [B], the token that the last call of `decode` drew in the row. Rows that were not
      in the call hold garbage.
  """

  pools: kv_cache.Pools
  prompts: jax.Array
  counts: jax.Array
  tokens: jax.Array


class StepInputs(NamedTuple):
  """The next token of each row.

  Attributes:
    tokens: int32 [B].
    unread: bool [B], rows whose token is the one in `Carried.tokens`. Only `decode` reads it; in
      other calls all are False.
    positions: int32 [B].
    call: Where it is in the cache, and drafted ones that follow it.
    sampling: Settings [B].
    seeds: uint32 [B, 2].
    with_logprobs: bool [B], rows whose log-probabilities are wanted.
    constrained: bool [B], rows whose texts have a prescribed form.
    allowed: uint32 [B, W], the tokens that may follow in these rows, a bit each.
  """

  tokens: np.ndarray
  unread: np.ndarray
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
    tokens: int32 [B, T].
    num: int32 [B], how many of them are the text's, at least 1.
    logprobs: float32 [B, T], by the model itself, before temperature, penalties and filters.
    best: int32 [B, T, A], the most likely tokens.
    best_logprobs: float32 [B, T, A].
  """

  tokens: jax.Array
  num: jax.Array
  logprobs: jax.Array
  best: jax.Array
  best_logprobs: jax.Array

  def token(self, b: int, t: int, logprobs: int | None) -> Token:
    """Row b's t-th token, without its text, from arrays of the host. `logprobs`: as asked for."""
    token_id = int(self.tokens[b, t])
    if logprobs is None:
      return Token(token_id, "")
    best = zip(self.best[b, t, :logprobs].tolist(), self.best_logprobs[b, t, :logprobs].tolist())
    # A small tokenizer has fewer ids than alternatives. Others are never drawn.
    some = tuple(pair for pair in best if math.isfinite(pair[1]))
    return Token(token_id, "", float(self.logprobs[b, t]), some)


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
    prefill: (weights, carried, tokens_T, positions_T, `paged.Chunk`) -> carried. Writes blocks of
      prompts into the cache.
    decode: (weights, carried, `StepInputs`) -> (carried, `Drawn`). One token of each row.
    verify: (weights, carried, `StepInputs`, `Drafts`) -> (carried, `Drawn`). One to K + 1 tokens.
    propose: (weights, carried, `StepInputs`, (prompts, counts) of the engine's `Carried`) ->
      (carried, `Drafts`). Drafts K tokens of each row, where the call has room for K + 1.
    enter: (carried, row, prompt_V) -> carried. Begins the counts of a row with a penalty.
    copy: (carried, [(from, to)]) -> carried. Copies blocks, into none that is copied from.
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
    axes = ("act_heads", None, None, None)
    spec = lambda x: model.rules.fitting_spec(mesh, x.shape, axes[: x.ndim])
    of_pool = lambda x: NamedSharding(mesh, spec(x))
    pools = jax.tree.map(of_pool, jax.eval_shape(self._empty).pools)
    carried = Carried(pools, whole, whole, whole)
    jit = functools.partial(jax.jit, out_shardings=carried)
    step = functools.partial(
      jax.jit,
      donate_argnums=1,
      out_shardings=(carried, whole),
      compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    self.empty = jit(self._empty)
    self.prefill = jit(self._prefill, donate_argnums=1)
    self.decode, self.verify, self.propose = map(step, (self._decode, self._verify, self._propose))
    self.enter = jit(self._enter, donate_argnums=0)
    self._copy_some = jit(self._copy, donate_argnums=0)

  def copy(self, carried: Carried, pairs: Sequence[tuple[int, int]]) -> Carried:
    for start in range(0, len(pairs), _COPIES):
      some = list(pairs[start : start + _COPIES])
      # One program for any number: the rest copies a block that nobody holds onto itself.
      padded = some + [(SPARE, SPARE)] * (_COPIES - len(some))
      carried = self._copy_some(carried, *np.array(padded, np.int32).T)
    return carried

  def _empty(self) -> Carried:
    size, V = self._size, self._model.cfg.vocab_size
    pools = kv_cache.pools(self._model.cfg, size.blocks, size.block_size, size.dtype)
    prompts = jnp.zeros((size.rows, V), bool)
    return Carried(pools, prompts, prompts.astype(jnp.int32), jnp.zeros((size.rows,), jnp.int32))

  def _prefill(
    self,
    weights: PyTree,
    carried: Carried,
    tokens_T: jax.Array,
    positions_T: jax.Array,
    call: paged.Chunk,
  ) -> Carried:
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
      jnp.where(x.unread, carried.tokens, x.tokens)[:, None],
      x.positions[:, None],
      cache=carried.pools,
      call=x.call,
      logits_at_B=jnp.zeros((B,), jnp.int32),
    )
    logits_BV = self._own(out.logits)
    s = x.sampling
    less = lambda: sampling.penalized(logits_BV, carried.prompts, carried.counts, s)
    scores_BV = _scores(logits_BV, less, x, 1)
    tokens_B = sampling.sample(scores_BV, _uniform(x.seeds, x.positions), s)
    counts = carried.counts.at[jnp.arange(B), tokens_B].add(1)
    carried = carried._replace(pools=out.cache, counts=counts, tokens=tokens_B)
    return carried, _drawn(logits_BV, tokens_B[:, None], jnp.ones_like(tokens_B), x)

  def _verify(
    self, weights: PyTree, carried: Carried, x: StepInputs, drafts: Drafts
  ) -> tuple[Carried, Drawn]:
    drafted_BK = jnp.asarray(drafts.tokens)
    B, K = drafted_BK.shape
    T, V = K + 1, self._model.cfg.vocab_size
    positions_BT = jnp.asarray(x.positions)[:, None] + jnp.arange(T)
    out: Any = self._model.apply(
      {"params": weights},
      jnp.concatenate([jnp.asarray(x.tokens)[:, None], drafted_BK], axis=1),
      # Drafts that do not count are not read, but a position must exist.
      jnp.minimum(positions_BT, x.call.context - 1),
      cache=carried.pools,
      call=x.call,
    )
    logits = self._own(out.logits.reshape(B * T, V))

    def less():
      each = lambda a: jnp.repeat(a, T, axis=0)
      drafted = jax.nn.one_hot(drafted_BK, V, dtype=jnp.int32)
      before_BTV = jnp.cumsum(jnp.pad(drafted, ((0, 0), (1, 0), (0, 0))), axis=1)
      counts = (carried.counts[:, None] + before_BTV).reshape(B * T, V)
      return sampling.penalized(
        logits, each(carried.prompts), counts, jax.tree.map(each, x.sampling)
      )

    scores_BTV = _scores(logits, less, x, T).reshape(B, T, V)
    at = jnp.repeat(jnp.asarray(x.seeds), T, axis=0), positions_BT.reshape(-1)
    accept_BT = _uniform(*at, _ACCEPT)[:, 0].reshape(B, T)
    uniform_BT2 = _uniform(*at).reshape(B, T, 2)
    tokens_BT, num_B = acceptance.accept(scores_BTV, drafts, accept_BT, uniform_BT2, x.sampling)
    written_BT = (jnp.arange(T) < num_B[:, None]).astype(jnp.int32)
    counts = carried.counts.at[jnp.arange(B)[:, None], tokens_BT].add(written_BT)
    carried = carried._replace(pools=out.cache, counts=counts)
    return carried, _drawn(logits, tokens_BT, num_B, x)

  def _propose(
    self,
    weights: PyTree,
    carried: Carried,
    x: StepInputs,
    seen: tuple[jax.Array, jax.Array],
  ) -> tuple[Carried, Drafts]:
    B, T = x.call.blocks.shape
    num = self._vocab_size
    prompts, counts = (jnp.asarray(a)[:, :num] for a in seen)
    s, position_B = x.sampling, jnp.asarray(x.positions)

    def apply(i: jax.Array, token_B: jax.Array, pools: kv_cache.Pools, **more: Any) -> Any:
      at = lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1, axis=1)
      call = dataclasses.replace(x.call, blocks=at(x.call.blocks), offsets=at(x.call.offsets))
      position = jnp.minimum(position_B + i, call.context - 1)
      return self._model.apply(
        {"params": weights},
        token_B[:, None],
        position[:, None],
        cache=pools,
        call=call,
        **more,
      )

    def one(carry: Any, i: jax.Array) -> Any:
      token_B, counts, pools = carry
      out = apply(i, token_B, pools, logits_at_B=jnp.zeros((B,), jnp.int32))
      logits_BV = out.logits[:, :num]
      less = lambda: sampling.penalized(logits_BV, prompts, counts, s)
      scores_BV = jax.lax.cond(sampling.is_penalized(s).any(), less, lambda: logits_BV)
      probs_BV = sampling.probabilities(scores_BV, s)
      token_B = sampling.draw(probs_BV, _uniform(x.seeds, position_B + i, _DRAFT))
      counts = counts.at[jnp.arange(B), token_B].add(1)
      return (token_B, counts, out.cache), (token_B, probs_BV)

    start = jnp.asarray(x.tokens), counts, carried.pools
    (token_B, _, pools), (tokens_KB, probs_KBV) = jax.lax.scan(one, start, jnp.arange(T - 1))
    # The last draft enters the cache too, for the case that all are accepted.
    out = apply(jnp.int32(T - 1), token_B, pools, project=lambda x, w, bias: None)
    drafts = Drafts(
      tokens_KB.swapaxes(0, 1), jnp.full((B,), T - 1, jnp.int32), probs_KBV.swapaxes(0, 1)
    )
    return carried._replace(pools=out.cache), drafts

  def _copy(self, carried: Carried, sources_N: jax.Array, targets_N: jax.Array) -> Carried:
    one = lambda x: x.at[:, targets_N].set(x[:, sources_N])
    return carried._replace(pools=jax.tree.map(one, carried.pools))

  def _own(self, logits: jax.Array) -> jax.Array:
    """Logits with -inf for ids that are never drawn, the last axis V."""
    return jnp.where(jnp.arange(logits.shape[-1]) < self._vocab_size, logits, -jnp.inf)

  def _enter(self, carried: Carried, row: jax.Array, prompt_V: jax.Array) -> Carried:
    return carried._replace(
      prompts=carried.prompts.at[row].set(prompt_V), counts=carried.counts.at[row].set(0)
    )


def _scores(logits: jax.Array, less: Callable[[], jax.Array], x: StepInputs, T: int) -> jax.Array:
  """Logits [B * T, V] with penalties, by `less`, and without the tokens that a form excludes."""
  scores = jax.lax.cond(sampling.is_penalized(x.sampling).any(), less, lambda: logits)

  def formed() -> jax.Array:
    may_BV = _bits(x.allowed, logits.shape[1]) | ~x.constrained[:, None]
    return jnp.where(jnp.repeat(may_BV, T, axis=0), scores, -jnp.inf)

  return jax.lax.cond(x.constrained.any(), formed, lambda: scores)


def _bits(words_BW: jax.typing.ArrayLike, V: int) -> jax.Array:
  """Bits of words as bool [B, V]. Those that the words lack are False."""
  words_BW = jnp.asarray(words_BW)
  bits = (words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
  flat = bits.reshape(len(words_BW), -1).astype(bool)[:, :V]
  return jnp.pad(flat, ((0, 0), (0, V - flat.shape[1])))


def _uniform(
  seeds_B2: jax.typing.ArrayLike, position_B: jax.typing.ArrayLike, use: int | None = None
) -> jax.Array:
  """Two uniform draws for each row, by its own seed and position alone, others for each use."""

  def row(seed, position):
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.uniform(key if use is None else jax.random.fold_in(key, use), (2,))

  return jax.vmap(row)(seeds_B2, position_B)


def _drawn(logits: jax.Array, tokens_BT: jax.Array, num_B: jax.Array, x: StepInputs) -> Drawn:
  """The tokens with their log-probabilities by logits [B * T, V], or zeros if none are wanted."""
  B, T = tokens_BT.shape
  few = min(MOST_ALTERNATIVES, logits.shape[1])

  def found() -> tuple[jax.Array, jax.Array, jax.Array]:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    best_logprobs, best = jax.lax.top_k(logprobs, few)
    own = jnp.take_along_axis(logprobs, tokens_BT.reshape(-1, 1), axis=1)[:, 0]
    return own, best, best_logprobs

  def none() -> tuple[jax.Array, jax.Array, jax.Array]:
    zero = jnp.zeros((B * T, few), jnp.float32)
    return zero[:, 0], zero.astype(jnp.int32), zero

  parts = jax.lax.cond(x.with_logprobs.any(), found, none)
  return Drawn(tokens_BT, num_B, *(part.reshape(B, T, *part.shape[1:]) for part in parts))
