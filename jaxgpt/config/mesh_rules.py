"""Logical axis rules: which mesh axes shard each logical axis of parameters and activations.

A rule gives a logical axis the mesh axes that shard it. The config's `mesh.rules` holds those that
a user may change, and `FIXED` holds those that code relies on. An array whose dimensions have the
logical axes ('embed', 'mlp') under the rules embed='fsdp', mlp='tensor' is sharded over fsdp by
its rows and over tensor by its columns:

                  mlp -> tensor=2
                +---------+---------+
  embed ->      | device  | device  |
  fsdp=2        |  (0,0)  |  (0,1)  |
                +---------+---------+
                | device  | device  |
                |  (1,0)  |  (1,1)  |
                +---------+---------+

A mesh axis may shard only one dimension of an array, since each of its devices holds one part.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from jaxgpt.errors import UserError, nearest


class FixedRule(NamedTuple):
  """A rule that no config may change."""

  mesh_axes: tuple[str, ...]
  relied_on_by: str


FIXED = {
  # Rows of a batch outside the pipeline's layers, where all stages do the same work, ...
  "rows": FixedRule(("data", "fsdp", "expert", "stage"), "the readers of batches"),
  # ... and inside them, where each stage works on its own layers.
  "batch": FixedRule(("data", "fsdp", "expert"), "the pipeline"),
  "stages": FixedRule(("stage",), "the pipeline"),
  "layers": FixedRule(("stage",), "the pipeline"),
  "length": FixedRule(("seq",), "the ring of context parallelism"),
}

# Logical axes of the activations that the model constrains. In none of them may two dimensions be
# sharded by the same mesh axis.
_ACTIVATIONS = {
  "the residual stream between blocks": ("rows", "residual_length", "act_embed"),
  "the head's input": ("rows", "length", "act_embed"),
  "the logits": ("rows", "length", "act_vocab"),
  "the gathered embeddings": ("act_vocab", "act_embed"),
  "the heads": ("rows", "length", "act_heads"),
  "the MLP's columns": ("rows", "length", "act_mlp"),
  "the experts' input": ("stages", "expert_batch", "experts", "act_embed"),
  "the experts' columns": ("stages", "expert_batch", "experts", "act_mlp"),
}


def mesh_axes_of(rule: str) -> tuple[str, ...]:
  """Splits a value of `mesh.rules`: ('fsdp', 'tensor') of 'fsdp,tensor', () of 'none'."""
  return () if rule == "none" else tuple(rule.split(","))


def check_rule(key: str, rule: str, mesh_axes: Collection[str]) -> None:
  """Raises a UserError if a rule names an axis that the mesh lacks."""
  for name in mesh_axes_of(rule):
    if name not in mesh_axes:
      raise UserError(
        f"{key}={rule!r}: no mesh axis {name!r}; {nearest(name, mesh_axes)}give some of "
        f"{', '.join(mesh_axes)} joined by commas, or none"
      )


def check_not_fixed(key: str) -> None:
  """Raises a UserError if a flat config key names a fixed rule, such as 'mesh.rules.layers'."""
  axis = key.removeprefix("mesh.rules.")
  if axis != key and axis in FIXED:
    names, relied_on_by = FIXED[axis]
    raise UserError(
      f"--config.{key} cannot be set: {relied_on_by} relies on {axis!r} being sharded over "
      f"{' x '.join(f'mesh.{name}' for name in names)}; set the sizes of these"
    )


def check(rules: Mapping[str, str]) -> None:
  """Raises a UserError if the rules shard two dimensions of an activation by one mesh axis.

  Args:
    rules: The config's `mesh.rules`.
  """
  table = {axis: fixed.mesh_axes for axis, fixed in FIXED.items()}
  table |= {axis: mesh_axes_of(rule) for axis, rule in rules.items()}
  for axis in rules:
    check_sharded_once(table, (axis,), "a dimension")
  for name, axes in _ACTIVATIONS.items():
    check_sharded_once(table, axes, name)


def check_sharded_once(
  table: Mapping[str, Sequence[str]], axes: Sequence[str | None], array: str
) -> None:
  """Checks that each mesh axis shards at most one dimension of an array, and once.

  Args:
    table: {logical axis: mesh axes}.
    axes: The array's logical axes. A dimension with None is not sharded.
    array: Name of the array for the message.

  Raises:
    UserError: A mesh axis is used twice. The message names the rules to change.
  """
  seen: dict[str, str] = {}
  for axis in filter(None, axes):
    for name in table[axis]:
      if name in seen:
        # Name only rules that the user can change.
        ours = [a for a in dict.fromkeys((axis, seen[name])) if a not in FIXED]
        rules = " and ".join(f"mesh.rules.{a}={','.join(table[a])!r}" for a in ours)
        fixed = "" if seen[name] in ours else f" (its {seen[name]!r} always is)"
        raise UserError(
          f"{rules}: {array} would be sharded by the mesh axis {name!r} twice{fixed}; "
          f"take {name!r} out of mesh.rules.{ours[0]}, or name another mesh axis"
        )
      seen[name] = axis
