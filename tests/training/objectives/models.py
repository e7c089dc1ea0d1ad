"""Tiny models for tests of loss functions, built without data, and batches for them."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import config
from jaxgpt.data import layouts
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import build, train_step

VOCAB, LENGTH = 24, 12


def make(**overrides):
  """(config, mesh, parts, state) of one layer, with any flat key as an override a__b."""
  c = config.base()
  c.model.update(dict(vocab_size=VOCAB, num_layers=1, width=16, num_heads=2))
  c.data.update(dict(seq_len=LENGTH, batch_size=4))
  c.schedule.warmup_steps = 0
  c.mesh.fsdp = 1
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
  c = config.resolve(c)
  mesh = mesh_lib.make(c.mesh, jax.devices()[:1])
  parts = build.build(c, mesh)
  with jax.set_mesh(mesh):
    state = train_step.first_state(parts.model, parts.tx, c.seed, parts.state)
  return c, mesh, parts, state


class Bigram:
  """A model that compiles in no time: the logits are a row of a table, the sum of two."""

  cfg = config.base().model
  largest_logits = False

  def apply(self, variables, tokens_BT, positions_BT, segment_ids_BT, **unused):
    """As `Transformer.apply`."""
    del positions_BT, segment_ids_BT, unused
    logits_BTV = sum(jnp.asarray(table)[tokens_BT] for table in variables["params"].values())
    return types.SimpleNamespace(logits=logits_BTV, router=None)


def bigram(seed):
  """Random weights of `Bigram`."""
  keys = jax.random.split(jax.random.key(seed))
  return {name: jax.random.normal(k, (VOCAB, VOCAB)) for name, k in zip(("a", "b"), keys)}


def moved(params, seed=1, by=0.1):
  """Parameters at a distance from given ones, as after some steps."""
  leaves, of_tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(
    of_tree, [x + by * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
  )


def rows(seed, spans):
  """A batch of language modeling. `spans` has for each row (length, first learned) of its spans."""
  rng = np.random.default_rng(seed)
  ids = [[rng.integers(1, VOCAB, length + 1) for length, _ in row] for row in spans]
  batch = layouts.packed(ids, len(spans), LENGTH)
  for i, row in enumerate(spans):
    at = 0
    for length, first in row:
      batch["loss_weights"][i, at : at + first] = 0
      at += length
  return batch


def logits(model, params, batch, row, start, end):
  """Logits of one span alone, without padding or other spans: float64 [T, V]."""
  tokens = jnp.asarray(batch["tokens"][row : row + 1, start:end])
  positions = jnp.arange(end - start)[None]
  out = model.apply({"params": params}, tokens, positions, jnp.ones_like(tokens))
  return out.logits[0]
