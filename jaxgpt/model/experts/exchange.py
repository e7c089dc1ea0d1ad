"""The exchange of rows between the devices that share the experts: a ragged all-to-all and its way
back.

Every device has an array of rows that is cut into slices, one for each device of its group. The
slices differ in length, which no device knows before the router has run. Two devices:

    device 0 has   a a a | b          sizes to devices 0 and 1:  3 1
    device 1 has   c | d d                                       1 2
    after `there`  device 0: a a a c      device 1: b d d        rows by sender, then zeros

Array shapes are static, so a device has room for R rows. What does not fit is cut off at the end:
the senders know it, and count it.

n devices of a group, R rows of a device's room, D model.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Group(NamedTuple):
  """The devices that exchange rows, and how they do it.

  Attributes:
    axes: Mesh axes of the group, () for a device on its own.
    ragged: Whether `jax.lax.ragged_all_to_all` sends the slices, which XLA does not have on CPU.
      Otherwise each slice is padded to `longest` rows for a dense all-to-all.
    longest: The most rows that a device can send to another.
  """

  axes: tuple[str, ...]
  ragged: bool
  longest: int


class Slices(NamedTuple):
  """Slices of a device's rows, each shared with one device of the group.

  Attributes:
    start: int32 [n]. The first row of each. Ascending.
    size: int32 [n]. Rows of each.
    elsewhere: int32 [n]. The first row of the same slice in the other device's array.
  """

  start: jax.Array
  size: jax.Array
  elsewhere: jax.Array


class Plan(NamedTuple):
  """Which rows a device sends and receives.

  Attributes:
    sent: Slices of the rows that it has.
    received: Slices of the rows that come to it.
    counts: int32 [n, ...]. The rows that come from each device, by kind.
    cut: int32. Its rows that found no room.
  """

  sent: Slices
  received: Slices
  counts: jax.Array
  cut: jax.Array


def plan(group: Group, counts: jax.Array, room: int) -> Plan:
  """Tells all devices of the group how many rows will come, under `jax.shard_map`.

  Args:
    group: The group.
    counts: int32 [n, e]. Rows for each device, by kind. Rows lie in this order, without gaps.
    room: R. Rows beyond it are cut off, those of the last senders and kinds first.

  Returns:
    The plan. Its counts are [n, e] too, of the rows that have room.
  """
  me = jax.lax.axis_index(group.axes)
  all_counts = jax.lax.all_gather(counts, group.axes)  # [n senders, n receivers, e]
  sizes = all_counts.sum(-1)
  here = _starts(sizes, 1)
  there = jnp.minimum(_starts(sizes, 0), room)
  kept = jnp.minimum(sizes, room - there)
  mine = all_counts[:, me]
  kinds = jnp.clip(kept[:, me, None] - _starts(mine, 1), 0, mine)
  return Plan(
    sent=Slices(here[me], kept[me], there[me]),
    received=Slices(there[:, me], kept[:, me], here[:, me]),
    counts=kinds,
    cut=(sizes[me] - kept[me]).sum(),
  )


def _starts(sizes: jax.Array, axis: int) -> jax.Array:
  """Exclusive cumulative sum."""
  return jnp.cumsum(sizes, axis) - sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def move(group: Group, rows: jax.Array, given: Slices, taken: Slices, room: int) -> jax.Array:
  """Sends slices of rows, and puts those that arrive in their places. Under `jax.shard_map`.

  `move(group, rows, plan.sent, plan.received, room)` goes there, and with the two slices in the
  other order a result comes back. Each is the other's transpose, so gradients travel as rows do.

  Args:
    group: The group.
    rows: [rows of the device, D].
    given: The slices to send.
    taken: The slices to receive.
    room: Rows of the result.

  Returns:
    [room, D], zero where nothing arrived.
  """
  if group.ragged:
    empty = jnp.zeros((room, *rows.shape[1:]), rows.dtype)
    return jax.lax.ragged_all_to_all(
      rows, empty, given.start, given.size, given.elsewhere, taken.size, axis_name=group.axes
    )
  places = given.start[:, None] + jnp.arange(group.longest)
  fits = jnp.arange(group.longest) < given.size[:, None]
  blocks = jnp.where(fits[..., None], rows.at[places].get(mode="clip"), 0)
  blocks = jax.lax.all_to_all(blocks, group.axes, 0, 0)
  # Slices follow each other, so a row belongs to the last slice that starts at or before it.
  row = jnp.arange(room)
  whose = (taken.start <= row[:, None]).sum(1) - 1
  place = row - taken.start[whose]
  arrived = blocks.at[whose, place].get(mode="clip")
  return jnp.where((place < taken.size[whose])[:, None], arrived, 0)


def _move(group: Group, rows: jax.Array, given: Slices, taken: Slices, room: int) -> tuple:
  return move(group, rows, given, taken, room), (rows.shape[0], given, taken)


def _move_back(group: Group, room: int, saved: tuple, g: jax.Array) -> tuple:
  num_rows, given, taken = saved
  return move(group, g, taken, given, num_rows), None, None


move.defvjp(_move, _move_back)
