"""Blocks of attention merge into attention to all keys, in any order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model.attention import blockwise, masks, reference
from jaxgpt.model.attention.masks import Band
from jaxgpt.model.attention.spec import Block, ContextParallel, Spec


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("window", [None, 6])
def test_blocks_merge_into_attention_to_all_keys(order, window):
  T, size = 12, 4
  q, k, v = (jax.random.normal(jax.random.key(i), (2, 4 if i == 0 else 2, T, 8)) for i in range(3))
  ids = jnp.array([[1] * 7 + [2] * 3 + [0] * 2, [1] * T])
  cp = ContextParallel(Spec(1.0, causal=True, window=window), "plain", "seq", 1)
  parts = []
  for i in order:
    keys = slice(i * size, (i + 1) * size)
    block = Block(q, k[:, :, keys], v[:, :, keys], ids[:, None], ids[:, None, keys])
    parts.append(blockwise.forward(cp, Band(True, window, offset=-i * size), block))
  got = blockwise.merge(blockwise.merge(parts[0], parts[1]), parts[2]).out
  first = lambda x: x.swapaxes(1, 2)
  mask = masks.visible(ids, causal=True, window=window)
  want = reference.attention(first(q), first(k), first(v), mask, scale=1.0)
  np.testing.assert_allclose(first(got), want, atol=1e-5)


@pytest.mark.parametrize("causal, window", [(True, None), (True, 3), (False, 3), (False, None)])
@pytest.mark.parametrize("offset", [-5, 0, 2])
def test_a_band_knows_whether_it_hides_anything(causal, window, offset):
  band = Band(causal, window, offset)
  assert band.hides(4, 6) == (not band.array(4, 6).all())
