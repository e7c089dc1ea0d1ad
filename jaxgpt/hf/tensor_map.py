"""Entries of a family's tensor table: how published tensors correspond to our parameters.

A `TensorTemplate` describes one tensor of every layer ({i}) and expert ({e}). `convert.publish`
fills it in for a model. Most tensors hold one parameter, in another axis order. Others hold
several, one after the other along an axis (queries, keys and values in one matrix). Each of these
is a piece.

    one(name, path, layout)      one parameter
    vector(name, path)           a norm's scale, a bias
    dense(name, path)            a Linear: weight [out, in] and bias
    conv1d(name, path)           GPT-2's Conv1D: weight [in, out] and bias
    norm(name, path)             scale and bias of a norm
    heads(name, "q")             projection to queries, keys or values, and its bias
    output(name)                 projection from heads, and its bias
    qkv(name)                    queries, keys and values in one tensor, and their biases
    fused(name, layout, *paths)  several parameters in one tensor

Whether a tensor exists follows from the model: a bias without a parameter of ours is left out.

Letters of layouts (see `layout`): D width, F hidden size of the MLP, N heads (of queries, or of
keys and values), H head size, V vocabulary or labels, P positions, T token types, C compressed size
of latent attention, E experts. I and O are input and output where no more is known.
"""

from typing import Any, NamedTuple


class PieceTemplate(NamedTuple):
  """One of our parameters, as a published tensor holds it."""

  path: str  # of the parameter; 'layers/...' has leading axes for the name's {i} and {e}
  layout: str  # axis order, see `layout`
  plus: float = 0.0  # ours = theirs + plus
  interleaved: bool = False  # rotated entries, last of the last axis, are stored as x0 y0 x1 y1 ...


class TensorTemplate(NamedTuple):
  """A published tensor. It exists where our model has the parameters of its pieces."""

  name: str  # {i}: layer, {e}: expert
  pieces: tuple[PieceTemplate, ...]  # in their order along `axis`
  axis: int = 0  # along which the pieces are concatenated
  skip: int = 0  # unused entries along the axis before the first piece
  merged: bool = False  # the first two axes of the layouts are one axis in the file
  when: tuple[str, ...] = ()  # exists for these facts, see `convert.publish`; (): always
  instead: str = ""  # name that is read in place of `name` where the files have it
  copies: str = ""  # name under which the tensor is written a second time, and ignored on reading


# A group of templates, in the order of the table.
Templates = tuple[TensorTemplate, ...]


def one(
  name: str, path: str, layout: str, when: tuple[str, ...] = (), **piece: Any
) -> TensorTemplate:
  """A tensor that is one parameter. `piece` has further fields of `PieceTemplate`."""
  return TensorTemplate(name, (PieceTemplate(path, layout, **piece),), when=when)


def vector(name: str, path: str, when: tuple[str, ...] = (), **piece: Any) -> TensorTemplate:
  """A vector that is one parameter, such as the scale of a norm or a bias."""
  return one(name, path, "D -> D", when, **piece)


def dense(name: str, path: str, when: tuple[str, ...] = ()) -> Templates:
  """The weight of a Linear, stored [out, in], and its bias."""
  return (
    one(f"{name}.weight", path, "O I -> I O", when),
    vector(f"{name}.bias", f"{path}_bias", when),
  )


def conv1d(name: str, path: str) -> Templates:
  """As `dense`, stored [in, out] as GPT-2's Conv1D does."""
  return (one(f"{name}.weight", path, "I O -> I O"), vector(f"{name}.bias", f"{path}_bias"))


def norm(name: str, path: str, when: tuple[str, ...] = (), plus: float = 0.0) -> Templates:
  """The scale and bias of a LayerNorm. An RMSNorm has the scale alone."""
  return (
    vector(f"{name}.weight", f"{path}/scale", when, plus=plus),
    vector(f"{name}.bias", f"{path}/bias", when),
  )


def heads(name: str, x: str, **piece: Any) -> Templates:
  """The projection to 'q', 'k' or 'v' (`x`), and its bias."""
  return (
    one(f"{name}.weight", f"layers/attn/{x}", "(N H) D -> D N H", **piece),
    one(f"{name}.bias", f"layers/attn/{x}_bias", "(N H) -> N H"),
  )


def output(name: str, layout: str = "D (N H) -> N H D") -> Templates:
  """The projection from heads to the residual stream, and its bias."""
  return (
    one(f"{name}.weight", "layers/attn/o", layout),
    vector(f"{name}.bias", "layers/attn/o_bias"),
  )


def fused(name: str, layout: str, *paths: str, axis: int = 0, suffix: str = "") -> TensorTemplate:
  """A tensor with several parameters of one layout. `suffix` is appended to every path."""
  return TensorTemplate(name, tuple(PieceTemplate(path + suffix, layout) for path in paths), axis)


def qkv(name: str, layout: str = "(N H) D -> D N H", axis: int = 0) -> Templates:
  """Queries, keys and values in one tensor, and their biases in another."""
  paths = [f"layers/attn/{x}" for x in "qkv"]
  return (
    fused(f"{name}.weight", layout, *paths, axis=axis),
    fused(f"{name}.bias", "(N H) -> N H", *paths, suffix="_bias"),
  )


def flat(*groups: Any) -> Templates:
  """Flattens nested tuples of templates, in their order."""
  return tuple(
    template
    for group in groups
    for template in ((group,) if isinstance(group, TensorTemplate) else flat(*group))
  )
