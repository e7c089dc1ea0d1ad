"""Digests of arrays: any changed word is found, whatever the dtype and the sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.run import digests

DTYPES = ("float32", "bfloat16", "int32", "uint32", "int8", "bool")


def array(dtype, shape=(3, 5, 8)):
  return jnp.asarray(np.random.default_rng(0).integers(0, 2, shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_is_found(dtype):
  x = np.asarray(array(dtype, (4, 3)))
  before = digests.of({"x": x})
  assert digests.changed({"x": x}, before) == []
  for place in range(x.nbytes * (1 if dtype == "bool" else 8)):
    data = bytearray(x.tobytes())
    if dtype == "bool":
      data[place] ^= 1
    else:
      data[place // 8] ^= 1 << place % 8
    bad = np.frombuffer(bytes(data), x.dtype).reshape(x.shape)
    assert digests.changed({"x": bad}, before) == ["x"], place


def test_exchanged_values_and_rows_are_found():
  x = np.random.default_rng(1).normal(size=(6, 7)).astype(np.float32)
  before = digests.of({"x": x})
  for a, b in ((0, 1), (2, 5)):
    rows, columns = x.copy(), x.copy()
    rows[[a, b]], columns[:, [a, b]] = x[[b, a]], x[:, [b, a]]
    assert digests.changed({"x": rows}, before) == digests.changed({"x": columns}, before) == ["x"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_digest_does_not_depend_on_the_sharding(dtype):
  x = array(dtype, (8, 4))
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = jax.sharding.PartitionSpec("a", "b")
  sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
  assert digests.of({"x": x}) == digests.of({"x": sharded})


def test_arrays_without_a_digest_or_in_another_dtype_are_passed_over():
  before = digests.of({"x": array("float32")})
  assert digests.changed({"y": array("int32")}, before) == []
  assert digests.changed({"x": array("bfloat16")}, before) == []


def test_an_array_of_one_device_has_a_digest_next_to_a_mesh():
  x = array("float32")
  alone = jax.device_put(x, jax.devices()[1])
  with jax.set_mesh(jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))):
    assert digests.of({"x": alone}) == digests.of({"x": x})
