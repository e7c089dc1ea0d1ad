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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5, 8), (3, 300), (1, 1, 700)])
def test_the_host_computes_the_same(monkeypatch, dtype, shape):
  monkeypatch.setattr(digests, "_PIECE", 64)  # pieces along each axis
  arrays = {"b": array(dtype, shape), "a": {"c": np.asarray(array(dtype, shape))}}
  copied = digests.on_host(arrays)
  assert digests.text(copied, [digests.sums(copied)]) == digests.of(arrays)


@pytest.mark.parametrize("spec", [("a", "b"), (None, "b"), ("b", None), (None, None)])
def test_the_host_sums_each_shard_once(spec):
  x = array("float32", (8, 12, 2))
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  copied = digests.on_host({"x": jax.device_put(x, sharding)})
  assert digests.text(copied, [digests.sums(copied)]) == digests.of({"x": x})
  # As if each shard were of a process of its own.
  parts = [{"x": copied["x"]._replace(shards=[shard])} for shard in copied["x"].shards]
  assert digests.text(copied, [digests.sums(part) for part in parts]) == digests.of({"x": x})


def test_the_host_has_the_values_from_before_a_donation():
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = add(array("float32", (64, 64)))
  before = digests.of({"x": x})
  copied = digests.on_host({"x": x})
  jax.block_until_ready(add(add(x)))
  assert digests.text(copied, [digests.sums(copied)]) == before


def test_arrays_without_a_digest_or_in_another_dtype_are_passed_over():
  before = digests.of({"x": array("float32")})
  assert digests.changed({"y": array("int32")}, before) == []
  assert digests.changed({"x": array("bfloat16")}, before) == []


def test_an_array_of_one_device_has_a_digest_next_to_a_mesh():
  x = array("float32")
  alone = jax.device_put(x, jax.devices()[1])
  with jax.set_mesh(jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))):
    assert digests.of({"x": alone}) == digests.of({"x": x})
