"""Weights of a Hugging Face folder, placed on devices."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxgpt.hf import weights


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("plus", [0.0, -1.0])
def test_a_block_is_rounded_alike_on_host_and_device(dtype, plus):
  block = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  host = np.zeros((2, 4, 5), dtype)
  weights._place_on_host(host, block, [1, 1, 0], plus)
  device = weights._place(jnp.zeros((2, 4, 5), dtype), block, np.array([1, 1, 0]), plus)
  np.testing.assert_array_equal(host, np.asarray(device))
