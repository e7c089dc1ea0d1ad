"""The kernel for grouped matmuls against `ragged_dot`, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model.experts import grouped


@pytest.mark.parametrize(
  "sizes",
  [(100, 0, 77), pytest.param((0, 200, 0), marks=pytest.mark.slow)],  # a group may be empty
)
def test_the_kernel_computes_what_ragged_dot_does(sizes):
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  rows, w, g = draw(0, 200, 128), draw(1, 3, 128, 256), draw(2, 200, 256)
  used = (jnp.arange(200) < sum(sizes))[:, None]

  def results(platform):
    def f(rows, w):
      rows = jnp.where(used, rows, 0)
      out = grouped.matmul(rows, w, jnp.array(sizes, jnp.int32), platform, interpret=True)
      out = jnp.where(used, out, 0)
      return (out * g).sum(), out

    (_, out), grads = jax.value_and_grad(f, (0, 1), has_aux=True)(rows, w)
    return out, *grads

  for got, want in zip(results("tpu"), results("cpu"), strict=True):
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_tiles_are_few_and_waste_little():
  assert grouped.tiling(16384, 4096, 14336) == (512, 1024, 1024)
  assert grouped.tiling(4096, 2048, 1408) == (512, 1024, 768)
  assert grouped.tiling(1024, 512, 128) == (128, 512, 128)
