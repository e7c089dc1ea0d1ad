"""8-bit matmuls are close to exact ones, run in 8 bits, and train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.model.quantization import quantized
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import train_step
from tests import quick

pytest.importorskip("qwix")


def arrays():
  keys = jax.random.split(jax.random.key(0), 3)
  return (
    jax.random.normal(keys[0], (2, 8, 4, 16)),
    jax.random.normal(keys[1], (4, 16, 32)),
    jax.random.normal(keys[2], (2, 8, 32)),
  )


@pytest.mark.parametrize("kind, error", [("int8", 0.01), ("fp8", 0.05)])
@pytest.mark.parametrize("gradients", [False, True])
def test_products_and_gradients_are_close_to_exact_ones(kind, error, gradients):
  x, w, dy = arrays()

  def both(f):
    y, pull = jax.vjp(f, x, w)
    return y, *pull(dy)

  got = both(lambda x, w: quantized.times(x, w, 2, kind, gradients))
  want = both(lambda x, w: jnp.tensordot(x, w, 2))
  far = [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(got, want, strict=True)]
  assert 0 < far[0] < error
  # e5m2 has two mantissa bits.
  assert all(
    (0 < e < (0.1 if kind == "fp8" else error)) if gradients else e < 1e-6 for e in far[1:]
  ), far


@pytest.mark.parametrize("gradients, want", [(False, 1), (True, 3)])
def test_matmuls_run_in_8_bits(gradients, want):
  x, w, dy = arrays()
  f = lambda x, w: (quantized.times(x, w, 2, "int8", gradients) * dy).sum()
  text = jax.jit(jax.value_and_grad(f, (0, 1))).lower(x, w).as_text()
  dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  assert len(dots) == 3 and sum("xi8>" in line for line in dots) == want


def losses(c, steps=20):
  _, c = batches_lib.load_tokenizer_and_config(c)
  mesh = mesh_lib.make(c.mesh, jax.devices()[:2])
  parts, data = build_lib.build(c, mesh), batches_lib.split_batches(c, "train")
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in data.batch(0).items()}
  step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  compiled = train_step.compile(step, parts.state, shapes, mesh)
  out = []
  with jax.set_mesh(mesh):
    state = train_step.first_state(parts.model, parts.tx, c.seed, parts.state)
    for i in range(steps):
      state, metrics = compiled(state, batches_lib.to_devices(data.batch(i), mesh))
      out.append(float(metrics["loss"]))
  return np.array(out)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", quick.first([True, False]))
def test_training_in_int8_follows_bfloat16(tiny, gradients):
  make = lambda **fields: tiny(
    mesh__data=1, mesh__fsdp=2, model__dtype="bfloat16", model__remat="save_qkv", **fields
  )
  want = losses(make())
  got = losses(make(model__quantize="int8", model__quantize_gradients=gradients))
  np.testing.assert_allclose(got, want, rtol=0.03)
  assert want[-1] < want[0] - 0.5 and not np.array_equal(got, want)


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(quantize_gradients=True), "needs model.quantize='int8' or 'fp8'"),
    (dict(quantize="int8", grad_dtype="float32"), "set model.grad_dtype='compute'"),
    (dict(quantize="int7"), "did you mean 'int8'"),
  ],
)
def test_invalid_combinations_are_user_errors(fields, words):
  c = config.base()
  c.model.update(fields)
  with pytest.raises(UserError, match=words):
    config.resolve(c, 10)
