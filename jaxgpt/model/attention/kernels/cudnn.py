"""cuDNN's flash attention for GPUs.

B batch, T query position, S key position, N heads, K key/value heads, H head size.
"""

import jax

from jaxgpt.model.attention import token_order
from jaxgpt.model.attention.spec import ContextParallel, Spec

# JAX's name of the primitive that computes the output and the softmax statistics in one call.
FORWARD_PRIMITIVE = "dot_product_attention_fwd_wrapper"


def attention(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, spec: Spec
) -> jax.Array:
  """Computes attention of 16-bit arrays without a softcap, as `choose` makes sure of.

  Under a mesh each device computes its own rows and heads. `context_parallel.attention` handles
  rows that are sharded.

  Args:
    q_BTNH: Queries.
    k_BSKH: Keys.
    v_BSKH: Values.
    mask_BTS: True where query t may attend to key s.
    spec: Scale, and `causal`: whether `mask_BTS` hides every key after its query (T = S). Those
      keys are then skipped.

  Returns:
    As `reference.attention`, except that a query without any key gets an average of values.
  """

  assert spec.softcap is None

  def local(q, k, v, mask):
    return jax.nn.dot_product_attention(
      q, k, v, mask=mask[:, None], scale=spec.scale, is_causal=spec.causal, implementation="cudnn"
    )

  args, mesh = (q_BTNH, k_BSKH, v_BSKH, mask_BTS), jax.sharding.get_abstract_mesh()
  if mesh.size > 1 and not mesh.manual_axes:
    # JAX's own partitioning of this call writes addresses of Python objects into the program, which
    # then differs from process to process. A shard_map avoids it.
    fitting = spec.rules.fitting_spec
    specs = [fitting(mesh, x.shape, ("batch", None, "act_heads", None)) for x in args[:3]]
    specs.append(fitting(mesh, mask_BTS.shape, ("batch", None, None)))
    local = jax.shard_map(local, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
  return local(*args)


def gathered_attention(
  cp: ContextParallel,
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_ids_B1T: jax.Array,
) -> jax.Array:
  """Computes attention of a device's queries to gathered keys, under `jax.shard_map`.

  cuDNN does not return the softmax normalizer that ring attention needs. So each device gathers the
  keys and values of its whole rows.

  Args:
    cp: How rows are sharded.
    q_BTNH: Scaled queries of this device.
    k_BTKH: Keys of this device.
    v_BTKH: Values of this device.
    segment_ids_B1T: Segments of this device's tokens.
  """
  assert cp.spec.softcap is None
  gather = lambda x, axis: jax.lax.all_gather(x, cp.axis, axis=axis, tiled=True)
  mask = token_order.device_mask(cp, segment_ids_B1T[:, 0], gather(segment_ids_B1T[:, 0], 1))
  return attention(q_BTNH, gather(k_BTKH, 1), gather(v_BTKH, 1), mask, Spec(scale=1.0))


def supports_heads(
  key_size: int, value_size: int, capability: tuple[int, int] | None = None
) -> bool:
  """Whether cuDNN has kernels for head sizes.

  Args:
    key_size: Head size of queries and keys.
    value_size: Head size of values.
    capability: Compute capability of the GPU. None: that of the local GPU, or, without one, the
      lowest.
  """
  if capability is None:
    version = jax.local_devices()[0].compute_capability if gpu_name() else "0"
    if not version.replace(".", "", 1).isdigit():
      return False  # not an NVIDIA GPU
    capability = (int(version.partition(".")[0]), 0)
  is_hopper = capability >= (9, 0)
  return (
    key_size % 8 == 0
    and value_size % 8 == 0
    and key_size <= (256 if is_hopper else 128)
    and (key_size == value_size or is_hopper)
  )


def gpu_name() -> str | None:
  """The name of the local GPU, or None on a machine without one."""
  device = jax.local_devices()[0]
  return device.device_kind if device.platform == "gpu" else None
