"""No device gathers the activations of others: what a train step exchanges, read in its program.

A wrong result would show in other tests. This one finds programs that are right, but in which every
device computes or keeps the tokens of all.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import config
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.plan import hlo
from jaxgpt.training import build as build_lib
from jaxgpt.training import train_step
from jaxgpt.training.objectives import distillation
from tests import quick
from tests.parallel import mesh_pairs_test

ROWS, LENGTH, SLOTS = 40, 44, 28  # sizes that no weight has
HEADS = dict(width=48, num_heads=6)  # rows of a device times heads is another number too
EXPERTS = dict(mlp_pattern=("moe",), moe=dict(experts=4, width=16, per_token=2))
CAPACITY = EXPERTS | dict(moe=EXPERTS["moe"] | dict(capacity=1.25))
GROUPS = dict(router="sigmoid", experts=8, groups=4, top_groups=2)
FIELDS = {
  "dense": {},
  "experts": EXPERTS,
  "capacity": CAPACITY,
  "latent": CAPACITY | dict(latent=dict(kv_rank=6, q_rank=10, rope_dim=2, v_dim=4)),
  "groups": EXPERTS | dict(moe=EXPERTS["moe"] | GROUPS),
  "saved": CAPACITY | dict(remat="save:q,k,v,attention"),
}


def gathered(text, rows, expert=1):
  """Results of collectives with tokens of more than some rows, in a program's text.

  Args:
    text: The program.
    rows: Of a device.
    expert: Devices that share experts: each has slots of so many times the rows.
  """
  program = hlo.parse(text)
  above = lambda least: {n for n in range(least + 1, ROWS + 1) if ROWS % n == 0}
  flat = {n * LENGTH for n in above(rows)}
  for computation in program.computations.values():
    for made in computation:
      if made.opcode.removesuffix("-start") in ("all-gather", "all-reduce"):
        for array in made.arrays:
          dims = set(array.dims)
          slots = SLOTS in dims and dims & above(rows * expert)
          if slots or (LENGTH in dims and dims & above(rows)) or dims & flat:
            yield made.opcode, array


def compiled(fields, **axes):
  """The text of a train step's program on eight devices."""
  c = mesh_pairs_test.resolved_of(fields | HEADS | dict(max_len=LENGTH), **axes)
  c.data.update(dict(seq_len=LENGTH, batch_size=ROWS))
  c = config.resolve(c)
  mesh = mesh_lib.make(c.mesh, jax.devices()[:8])
  parts = build_lib.build(c, mesh)
  step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  batch = {
    name: jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32 if "weights" in name else jnp.int32)
    for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions")
  }
  return train_step.compile(step, parts.state, batch, mesh).as_text()


@pytest.mark.parametrize(
  "model, axes",
  quick.first(
    [
      ("saved", dict(fsdp=2, expert=4)),
      ("experts", dict(fsdp=4, expert=2)),
      ("dense", dict(fsdp=8)),
      ("groups", dict(fsdp=8)),
      ("capacity", dict(data=2, fsdp=2, expert=2)),
      ("capacity", dict(fsdp=4, tensor=2)),
      ("capacity", dict(fsdp=2, expert=2, tensor=2)),
      ("experts", dict(data=2, expert=2, tensor=2)),
      ("dense", dict(data=2, fsdp=2, tensor=2)),
      ("dense", dict(fsdp=4, seq=2)),
      ("latent", dict(fsdp=2, expert=4)),
      ("capacity", dict(fsdp=2, expert=2, seq=2)),
      ("experts", dict(fsdp=2, expert=2, seq=2)),
    ],
    4,
  ),
)
def test_no_device_gathers_the_tokens_of_others(model, axes):
  data, fsdp, expert = (axes.get(name, 1) for name in ("data", "fsdp", "expert"))
  text = compiled(FIELDS[model], **axes)
  assert not list(gathered(text, ROWS // (data * fsdp * expert), expert))


def test_a_gather_of_tokens_is_found():
  mesh = mesh_lib.make(mesh_pairs_test.resolved("dense", fsdp=8).mesh, jax.devices()[:8])
  with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, 64), jnp.float32, sharding=rows)
    text = jax.jit(lambda x: jax.lax.top_k(x, 4)).lower(x).compile().as_text()
    assert list(gathered(text, ROWS // 8))
    best = jax.jit(lambda x: distillation._best_tokens(x, 4)).lower(x).compile().as_text()
    assert not list(gathered(best, ROWS // 8))
