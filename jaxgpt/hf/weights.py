"""Loading weights from the files of a published model onto devices, and saving them.

Host memory holds the parameters and little more than one tensor. Each device's shard of a parameter
is allocated once. It is then filled block by block with the boxes of the files that it needs:

    file, one tensor per layer            device buffer [layers, D/2, N, H], donated to every write
    layer 0, q_proj [N*H, D]  --box-->    convert axis order --> buffer[0, :, n0:n1, :]
    layer 1, q_proj [N*H, D]  --box-->    convert axis order --> buffer[1, :, n0:n1, :]
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath

from jaxgpt import tree
from jaxgpt.hf import safetensors
from jaxgpt.hf.convert import Piece, Published
from jaxgpt.hf.layout import Bounds, Layout
from jaxgpt.tree import PyTree

DTYPES = {
  "float32": np.dtype("float32"),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype("float16"),
}

_BLOCK = 8 << 20  # bytes of a tensor on the host at a time

# A piece of a published tensor, and the tensor of the files.
_Source = tuple[Piece, Published, safetensors.Tensor]


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _place(buffer: jax.Array, block: jax.Array, start: jax.Array, plus: float) -> jax.Array:
  """Writes a block into a device's shard, in place because the buffer is donated."""
  block = block.astype(buffer.dtype)
  block = block + plus if plus else block
  block = block.reshape((1,) * (buffer.ndim - block.ndim) + block.shape)
  return jax.lax.dynamic_update_slice(buffer, block, start)


def _place_on_host(shard: np.ndarray, block: np.ndarray, start: Sequence[int], plus: float) -> None:
  """Writes a block into a shard, with the same rounding as `_place`."""
  block = block.astype(shard.dtype)
  block = block + np.asarray(plus, shard.dtype) if plus else block
  block = block.reshape((1,) * (shard.ndim - block.ndim) + block.shape)
  shard[tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block


def load(
  matched: Sequence[tuple[Published, safetensors.Tensor]], abstract: PyTree
) -> dict[str, jax.Array]:
  """Loads parameters onto the devices.

  Args:
    matched: From `convert.Found`.
    abstract: Tree of ShapeDtypeStructs with shardings.

  Returns:
    {path: array} of the parameters that `matched` covers.
  """
  sources: dict[str, list[_Source]] = {}
  for published, tensor in matched:
    for piece in published.pieces:
      sources.setdefault(piece.path, []).append((piece, published, tensor))
  leaves = tree.flatten(abstract)
  return {path: _array(leaves[path], of_path) for path, of_path in sources.items()}


def complete(params: dict[str, jax.Array], abstract: PyTree) -> PyTree:
  """Returns the whole tree: the loaded parameters, and ones for unused scales of norms.

  Args:
    params: {path: array} from `load`.
    abstract: As in `load`.
  """
  ones = lambda leaf: jax.make_array_from_callback(
    leaf.shape,
    leaf.sharding,
    lambda index: np.ones(
      [len(range(*s.indices(n))) for s, n in zip(index or (), leaf.shape)], leaf.dtype
    ),
  )
  return tree.map_named(lambda path, leaf: params[path] if path in params else ones(leaf), abstract)


def _array(leaf: jax.ShapeDtypeStruct, sources: Sequence[_Source]) -> jax.Array:
  """Loads one parameter. Each process reads the shards of its own devices, replicas once."""
  assert leaf.sharding is not None
  devices: dict[tuple[Bounds, ...], list[jax.Device]] = {}
  for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
    bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), leaf.shape, strict=True))
    devices.setdefault(bounds, []).append(device)
  shards: list[jax.Array] = []
  for bounds, copies in devices.items():
    shape = tuple(b - a for a, b in bounds)
    # A small shard is put together on the host. A large one is filled block by block on the device,
    # so that the host never holds all of it; that needs a compiled program for each shape.
    small = math.prod(shape) * leaf.dtype.itemsize <= _BLOCK
    host = np.zeros(shape if small else (), leaf.dtype)
    buffers = [] if small else [jnp.zeros(shape, leaf.dtype, device=device) for device in copies]
    for piece, published, tensor in sources:
      outer, inner = bounds[: len(piece.lead)], bounds[len(piece.lead) :]
      if all(a <= i < b for i, (a, b) in zip(piece.lead, outer, strict=True)):
        first = [i - a for i, (a, _) in zip(piece.lead, outer, strict=True)]
        for block in _blocks(piece.layout, inner, tensor.dtype.itemsize):
          values = read_block(piece, published, tensor, block)
          start = first + [a - b for (a, _), (b, _) in zip(block, inner, strict=True)]
          if small:
            _place_on_host(host, values, start, piece.plus)
            continue
          buffers = [
            _place(b, jax.device_put(values, b.device), np.array(start, np.int32), piece.plus)
            for b in buffers
          ]
          jax.block_until_ready(buffers)  # else the blocks in flight would fill the host's memory
    if small:  # copies of their own, because the caller may donate them
      buffers = [jax.device_put(host, device, may_alias=False) for device in copies]
    shards += buffers
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _blocks(layout: Layout, bounds: tuple[Bounds, ...], itemsize: int) -> list[tuple[Bounds, ...]]:
  """Cuts a box of our array into blocks of about `_BLOCK` bytes each."""
  start, stop = bounds[layout.outer]
  if len(bounds) == 1:
    return [bounds]
  row = math.prod(b - a for i, (a, b) in enumerate(bounds) if i != layout.outer) * itemsize
  step = max(1, _BLOCK // max(1, row))
  return [
    (*bounds[: layout.outer], (a, min(a + step, stop)), *bounds[layout.outer + 1 :])
    for a in range(start, stop, step)
  ]


def read_block(
  piece: Piece, published: Published, tensor: safetensors.Tensor, bounds: Sequence[Bounds]
) -> np.ndarray:
  """Reads a box of our array from a file, in the file's dtype and without `piece.plus`.

  Args:
    piece: The piece of the published tensor that holds our array.
    published: The published tensor.
    tensor: The same tensor in the files.
    bounds: [start, stop) along each axis of our array, without the piece's leading axes.
  """
  box_bounds, convert = piece.layout.region(bounds)
  region = [
    (a + piece.start, b + piece.start) if d == published.axis else (a, b)
    for d, (a, b) in enumerate(box_bounds)
  ]
  if published.view == published.shape:
    block = convert(safetensors.read(tensor, region))
  else:  # the first two axes are one in the file
    (a, b), inner, *rest = region
    size = published.view[1]
    box = safetensors.read(tensor, [(a * size, b * size), *rest])
    block = convert(box.reshape(b - a, size, *box.shape[1:])[:, slice(*inner)])
  return block[..., _order(block.shape[-1], piece.interleaved)] if piece.interleaved else block


def _order(size: int, interleaved: int) -> np.ndarray:
  """Returns the index in their last axis of each entry of ours.

  The last `interleaved` entries are x0 y0 x1 y1 ... in theirs and x0 x1 ... y0 y1 ... in ours.
  """
  first = size - interleaved
  return np.concatenate(
    [np.arange(first), np.arange(first, size, 2), np.arange(first + 1, size, 2)]
  )


def rounded(params: PyTree, dtype: str) -> PyTree:
  """Rounds parameters as an export in `dtype` does. They keep their dtypes."""
  return jax.tree.map(lambda x: x.astype(DTYPES[dtype]).astype(x.dtype), params)


def entries(
  published: Sequence[Published], params: PyTree, dtype: str
) -> tuple[list[safetensors.Entry], Callable[[safetensors.Entry], np.ndarray]]:
  """Published tensors to be written, and the function that makes the array of each.

  Args:
    published: From `convert.publish`.
    params: Tree of arrays.
    dtype: A key of `DTYPES`.
  """
  leaves = tree.flatten(params)
  by_name = {p.name: p for p in published} | {p.copies: p for p in published if p.copies}

  def array_of(entry: safetensors.Entry) -> np.ndarray:
    p = by_name[entry.name]
    pieces = [to_theirs(leaves[x.path], x) for x in p.pieces]
    if p.pieces[0].start:  # entries that the model does not use
      pieces.insert(0, np.zeros_like(np.take(pieces[0], range(p.pieces[0].start), p.axis)))
    return np.concatenate(pieces, p.axis).reshape(p.shape).astype(entry.dtype)

  return [safetensors.Entry(name, p.shape, DTYPES[dtype]) for name, p in by_name.items()], array_of


def save(
  folder: epath.PathLike,
  published: Sequence[Published],
  params: PyTree,
  dtype: str,
  shard_bytes: int,
) -> list[str]:
  """Writes parameters as published tensors.

  Args:
    folder: An empty folder.
    published: From `convert.publish`.
    params: Tree of arrays.
    dtype: A key of `DTYPES`.
    shard_bytes: Largest size of a file.

  Returns:
    Names of the files.
  """
  return safetensors.write(folder, *entries(published, params, dtype), shard_bytes)


def to_theirs(leaf: jax.Array | np.ndarray, piece: Piece) -> np.ndarray:
  """Returns a piece of a published tensor, on the host, in our parameter's dtype."""
  if leaf.nbytes <= _BLOCK:  # the host's copy is kept, and a slice needs no compiled program
    array = np.asarray(leaf)[piece.lead]
  else:
    array = np.asarray(jax.device_get(leaf[piece.lead] if piece.lead else leaf))
  if piece.interleaved:
    array = array[..., np.argsort(_order(array.shape[-1], piece.interleaved))]
  theirs = piece.layout.to_theirs(array)
  return theirs - np.float32(piece.plus) if piece.plus else theirs
