"""The balanced order of tokens under context parallelism."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model.attention import token_order
from tests.model.attention.context_parallel_test import mesh_of


def test_balance_and_restore_are_inverse():
  x = jnp.arange(2 * 32 * 3).reshape(2, 32, 3)
  with jax.set_mesh(mesh_of(4)):
    balanced = jax.jit(token_order.balance)(x)
    np.testing.assert_array_equal(jax.jit(token_order.restore)(balanced), x)
  first = balanced.addressable_shards[0].data[0, :, 0]
  np.testing.assert_array_equal(first // 3, [0, 1, 2, 3, 28, 29, 30, 31])
  assert token_order.balance(x) is x, "no mesh"
  with jax.set_mesh(mesh_of(4)):
    assert token_order.balance(x[:, :30]) is not None and token_order.num_shards(30) == 1


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_chunks_of_a_device_add_up_to_equal_work(n):
  work = token_order.chunks(n, causal=True) + 0.5  # in keys per query, over the size of a chunk
  assert len(set(work.sum(1))) == 1
  assert sorted(token_order.chunks(n, causal=False).reshape(-1)) == list(range(2 * n))


def test_contiguous_shards_would_leave_most_work_to_the_last_device():
  n, T = 4, 64
  positions = np.arange(T).reshape(n, -1)
  assert np.ptp((positions + 1).sum(1)) > 10 * (T // (2 * n)) ** 2
