"""The vocabulary in which a family's table says how its tensors and our parameters correspond.

In layouts: D width, F MLP, N heads, K key/value heads, H head size, V vocabulary (or labels),
P positions, C compressed size, E experts; I and O where it does not matter.
"""

from typing import NamedTuple


class Part(NamedTuple):
  """One of our parameters as a published tensor, or a part of one, holds it."""

  path: str  # 'layers/…': with leading dimensions by the template's {i} and {e}
  layout: str  # see `layout`
  plus: float = 0.0  # ours = theirs + plus
  pairs: bool = False  # the rotated entries at the end of the last axis lie in pairs (x0, x1), …


class Row(NamedTuple):
  """A published tensor. It exists where our model has the parameters of its parts."""

  name: str  # {i}: layer, {e}: expert
  parts: tuple  # in the order in which they lie along `axis`
  axis: int = 0
  skip: int = 0  # places along the axis, before the first part, that hold nothing
  merged: bool = False  # the layouts' first two dimensions are one in the file
  when: tuple = ()  # of the kinds of head and MLP, or 'normed': where it exists; empty: everywhere


def one(name, path, layout, when=(), **part):
  """A tensor that is one parameter."""
  return Row(name, (Part(path, layout, **part),), when=when)


def vector(name, path, when=(), **part):
  """A norm's scale, a bias, and the like."""
  return one(name, path, "D -> D", when, **part)


def dense(name, path, when=()):
  """A Linear's weight, stored [out, in], and its bias."""
  return (
    one(f"{name}.weight", path, "O I -> I O", when),
    vector(f"{name}.bias", f"{path}_bias", when),
  )


def conv1d(name, path):
  """As `dense`, stored [in, out] as GPT-2's Conv1D does."""
  return (one(f"{name}.weight", path, "I O -> I O"), vector(f"{name}.bias", f"{path}_bias"))


def norm(name, path, when=(), plus=0.0):
  """A LayerNorm's two vectors; of an RMSNorm only the first exists."""
  return (
    vector(f"{name}.weight", f"{path}/scale", when, plus=plus),
    vector(f"{name}.bias", f"{path}/bias", when),
  )


def heads(name, x, **part):
  """A projection to heads, `x` being 'q', 'k' or 'v', and its bias."""
  return (
    one(f"{name}.weight", f"layers/attn/{x}", "(N H) D -> D N H", **part),
    one(f"{name}.bias", f"layers/attn/{x}_bias", "(N H) -> N H"),
  )


def output(name, layout="D (N H) -> N H D"):
  """The projection from heads, and its bias."""
  return (
    one(f"{name}.weight", "layers/attn/o", layout),
    vector(f"{name}.bias", "layers/attn/o_bias"),
  )


def fused(name, layout, *paths, axis=0, suffix=""):
  """Several parameters of the same layout, one after the other in one tensor."""
  return Row(name, tuple(Part(path + suffix, layout) for path in paths), axis)


def qkv(name, layout="(N H) D -> D N H", axis=0):
  """Queries, keys and values in one tensor, and their biases in another."""
  paths = [f"layers/attn/{x}" for x in "qkv"]
  return (
    fused(f"{name}.weight", layout, *paths, axis=axis),
    fused(f"{name}.bias", "(N H) -> N H", *paths, suffix="_bias"),
  )


def flat(*groups):
  """Rows of nested tuples, in their order."""
  return tuple(
    row for group in groups for row in (flat(*group) if not isinstance(group, Row) else (group,))
  )
