"""Weights from and to the files of a published model, a tensor at a time.

Host memory holds little more than one tensor beside the parameters: each device's shard of a
parameter is allocated once, and is filled layer by layer with the part of the file that it needs.
"""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxgpt import tree
from jaxgpt.hf import safetensors

DTYPES = {
  "float32": np.dtype("float32"),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype("float16"),
}

_BLOCK = 8 << 20  # bytes of a tensor that are on the host at a time


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _place(buffer, part, start, plus):
  """Writes a part into its place in a device's shard; in place, since the buffer is donated."""
  part = part.astype(buffer.dtype)
  part = part + plus if plus else part
  part = part.reshape((1,) * (buffer.ndim - part.ndim) + part.shape)
  return jax.lax.dynamic_update_slice(buffer, part, start)


def load(pairs, abstract):
  """Reads parameters onto the devices.

  Args:
    pairs: of `convert.Found`.
    abstract: tree of ShapeDtypeStructs with shardings.

  Returns:
    {path: array}, of the paths that `pairs` name.
  """
  sources = {}
  for published, tensor in pairs:
    for piece in published.pieces:
      sources.setdefault(piece.path, []).append((piece, published, tensor))
  leaves = tree.flatten(abstract)
  return {path: _array(leaves[path], pieces) for path, pieces in sources.items()}


def complete(params, abstract):
  """All parameters: those read, and ones for those that nothing reads and nobody publishes."""
  ones = lambda leaf: jax.make_array_from_callback(
    leaf.shape,
    leaf.sharding,
    lambda index: np.ones(
      [len(range(*s.indices(n))) for s, n in zip(index, leaf.shape)], leaf.dtype
    ),
  )
  return tree.map_named(lambda path, leaf: params[path] if path in params else ones(leaf), abstract)


def _array(leaf, pieces):
  """One parameter: each process reads what its own devices hold, copies but once."""
  devices = {}
  for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
    bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
    devices.setdefault(bounds, []).append(device)
  shards = []
  for bounds, copies in devices.items():
    shape = tuple(b - a for a, b in bounds)
    buffers = [jnp.zeros(shape, leaf.dtype, device=device) for device in copies]
    for piece, published, tensor in pieces:
      outer, inner = bounds[: len(piece.lead)], bounds[len(piece.lead) :]
      if all(a <= i < b for i, (a, b) in zip(piece.lead, outer, strict=True)):
        first = [i - a for i, (a, _) in zip(piece.lead, outer, strict=True)]
        for block in _blocks(piece.layout, inner, tensor.dtype.itemsize):
          part = read_part(piece, published, tensor, block)
          start = first + [a - b for (a, _), (b, _) in zip(block, inner, strict=True)]
          buffers = [
            _place(b, jax.device_put(part, b.device), np.array(start, np.int32), piece.plus)
            for b in buffers
          ]
          jax.block_until_ready(buffers)  # else blocks that wait their turn pile up
    shards += buffers
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _blocks(layout, bounds, itemsize):
  """The part of ours within `bounds`, cut so that each piece is some `_BLOCK` bytes of the file."""
  start, stop = bounds[layout.outer]
  if len(bounds) == 1:
    return [bounds]
  row = math.prod(b - a for i, (a, b) in enumerate(bounds) if i != layout.outer) * itemsize
  step = max(1, _BLOCK // max(1, row))
  return [
    (*bounds[: layout.outer], (a, min(a + step, stop)), *bounds[layout.outer + 1 :])
    for a in range(start, stop, step)
  ]


def read_part(piece, published, tensor, bounds):
  """The part of ours within `bounds`, in the file's dtype, before anything is added."""
  region, convert = piece.layout.region(bounds)
  region = [
    (a + piece.start, b + piece.start) if d == published.axis else (a, b)
    for d, (a, b) in enumerate(region)
  ]
  if published.view == published.shape:
    part = convert(safetensors.read(tensor, region))
  else:  # the first two dimensions are one in the file
    (a, b), inner, *rest = region
    size = published.view[1]
    box = safetensors.read(tensor, [(a * size, b * size), *rest])
    part = convert(box.reshape(b - a, size, *box.shape[1:])[:, slice(*inner)])
  return part[..., _order(part.shape[-1], piece.pairs)] if piece.pairs else part


def _order(size, pairs):
  """Where each entry of our last axis is in theirs: ours has the halves of the pairs apart."""
  first = size - pairs
  return np.concatenate(
    [np.arange(first), np.arange(first, size, 2), np.arange(first + 1, size, 2)]
  )


def rounded(params, dtype):
  """What a reader in float32 finds after an export in `dtype`."""
  dtype = DTYPES[dtype]
  return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)


def save(folder, published, params, dtype, shard_bytes):
  """Writes parameters as published tensors.

  Args:
    folder: an empty folder.
    published: from `convert.publish`.
    params: tree of arrays.
    dtype: a key of `DTYPES`.
    shard_bytes: size of a file at most.

  Returns:
    Names of the files.
  """
  leaves = tree.flatten(params)
  by_name = {p.name: p for p in published}

  def array_of(entry):
    p = by_name[entry.name]
    parts = [to_theirs(leaves[x.path], x) for x in p.pieces]
    if p.pieces[0].start:
      parts.insert(0, np.zeros_like(np.take(parts[0], range(p.pieces[0].start), p.axis)))
    return np.concatenate(parts, p.axis).reshape(p.shape).astype(entry.dtype)

  entries = [safetensors.Entry(p.name, p.shape, DTYPES[dtype]) for p in published]
  return safetensors.write(folder, entries, array_of, shard_bytes)


def to_theirs(leaf, piece):
  """A part of a published tensor, on the host, in float32."""
  array = np.asarray(jax.device_get(leaf[piece.lead] if piece.lead else leaf))
  if piece.pairs:
    array = array[..., np.argsort(_order(array.shape[-1], piece.pairs))]
  theirs = piece.layout.to_theirs(array)
  return theirs - np.float32(piece.plus) if piece.plus else theirs
