"""Context parallelism: attention of rows whose tokens are sharded over devices.

Three implementations: `ring` passes keys around, `halo` exchanges the ends of chunks where the
layer has a window, and cuDNN gathers the keys. `token_order` says which tokens a device holds.

B batch, T token of the row, N heads, K key/value heads, H head size.
"""

import functools

import jax

from jaxgpt.model.attention import ring
from jaxgpt.model.attention.kernels import cudnn, splash
from jaxgpt.model.attention.spec import ContextParallel, Spec
from jaxgpt.parallel import sharding


def attention(
  form: str,
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_ids_BT: jax.Array,
  spec: Spec,
) -> jax.Array:
  """Computes attention of rows that the current mesh shards.

  Args:
    form: 'splash', or 'cudnn', which gathers keys. Any other computes blocks by definition, and so
      does 'splash' where a chunk (see `token_order`) is not a multiple of `splash.LANES`.
    q_BTNH: Queries.
    k_BTKH: Keys.
    v_BTKH: Values.
    segment_ids_BT: 1, 2, ... for the documents of a row, 0 for padding.
    spec: Options. If `spec.causal`, tokens are in the order of `token_order.balance`.

  Returns:
    As `splash.attention`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  (axis,) = sharding.FIXED.mesh_axes("length")
  chunk = q_BTNH.shape[1] // (2 * mesh.shape[axis])
  kernel = "splash" if form == "splash" and chunk % splash.LANES == 0 else "plain"
  cp = ContextParallel(spec, kernel, axis, mesh.shape[axis])
  heads_first = lambda x: x.swapaxes(1, 2)
  q_BTNH *= spec.scale
  gathers = form == "cudnn"
  if gathers:
    run, args = cudnn.gathered_attention, (q_BTNH, k_BTKH, v_BTKH)
    axes = ("batch", "length", "act_heads", None)
  else:
    run, args = ring.attend, tuple(map(heads_first, (q_BTNH, k_BTKH, v_BTKH)))
    axes = ("batch", "act_heads", "length", None)
  ids = segment_ids_BT[:, None]
  specs = [spec.rules.fitting_spec(mesh, x.shape, axes) for x in args]
  specs.append(spec.rules.fitting_spec(mesh, ids.shape, ("batch", None, "length")))
  out = jax.shard_map(
    functools.partial(run, cp), in_specs=tuple(specs), out_specs=specs[0], check_vma=False
  )(*args, ids)
  return out if gathers else heads_first(out)
