"""What a config and a mesh determine, before any number is computed: the parts of a train step."""

from typing import Any, NamedTuple

import ml_collections

from jaxgpt import tree
from jaxgpt.config.remat import activations
from jaxgpt.errors import UserError
from jaxgpt.model import remat, stacks, transformer
from jaxgpt.model.attention import choose
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from jaxgpt.training import objectives, optimizers, schedules, train_step


class Parts(NamedTuple):
  """A model and what trains it."""

  model: transformer.Transformer
  objective: Any
  tx: Any
  schedule: Any
  state: Any  # shapes and shardings


def build(c, mesh):
  """The model, its objective and optimizer, and the shape of the state on the mesh.

  Args:
    c: a resolved config.
    mesh: the device mesh.

  Raises:
    UserError: the mesh does not divide a parameter, the rows, heads or the layers, or a pattern of
      parameters matches none.
  """
  fields = c.model.copy_and_resolve_references()
  heads = (fields.head_dim, fields.latent.v_dim)
  work = choose.Workload(c.data.seq_len, fields.dtype, fields.attn_softcap, heads)
  fields.attention = choose.choose(fields.attention, mesh.devices.flat[0].platform, work)
  mesh_lib.check_length(mesh.shape, c.data.seq_len, fields.attention)
  if activations(fields.remat).offloaded:
    mesh_lib.check_memory(mesh, remat.HOST_MEMORY, f"model.remat={fields.remat!r}")
  model = transformer.Transformer(
    ml_collections.FrozenConfigDict(fields),
    stacks.pipeline_of(c, mesh.shape),
    sharding.rules(c.mesh),
  )
  schedule = schedules.make(c.schedule, c.train.steps)
  shapes, axes = transformer.abstract(model)
  trained = optimizers.trained(c.optim, axes)
  select = lambda named, is_leaf=None: tree.split(named, trained, is_leaf)[0]
  tx = optimizers.make(
    c.optim, schedule, select(axes, sharding.is_axes), select(transformer.depths(c.model, shapes))
  )
  state = train_step.abstract_state(model, tx, c.optim.ema > 0, trained, mesh)
  check_heads(model, mesh)
  return Parts(model, objectives.make(model, c.objective), tx, schedule, state)


def check_heads(model, mesh):
  """Raises a UserError where devices would not have the key/value heads that their queries read.

  Args:
    model: a `Transformer`.
    mesh: the device mesh, or an abstract one.
  """
  shards = model.rules.num_shards(mesh, "act_heads")
  for key in ("num_heads", "num_kv_heads"):
    if model.cfg[key] % shards:
      axes = model.rules.mesh_axes("act_heads")
      sizes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
      raise UserError(
        f"{sizes} does not divide model.{key}={model.cfg[key]}, and "
        f"mesh.rules.act_heads={','.join(axes)!r} cuts heads so; set it to none"
      )
