"""Reading and writing of the safetensors format, a box of a tensor at a time.

    8 bytes      length n of the header, little endian
    n bytes      header, JSON: {name: {dtype, shape, data_offsets}}
    the rest     the tensors, in C order; data_offsets are relative to here

The format is implemented here, because export must not hold a whole model in memory and import must
name the tensors that a truncated file lacks (https://huggingface.co/docs/safetensors).
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.hf.layout import Bounds

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
  "F64": np.dtype("float64"),
  "F32": np.dtype("float32"),
  "F16": np.dtype("float16"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype("int64"),
  "I32": np.dtype("int32"),
  "I16": np.dtype("int16"),
  "I8": np.dtype("int8"),
  "U8": np.dtype("uint8"),
  "BOOL": np.dtype("bool"),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK = 32 << 20  # bytes read at a time when only some columns are kept


class Tensor(NamedTuple):
  """A tensor of a file, not yet read."""

  file: epath.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int  # of its first byte in the file

  @property
  def nbytes(self) -> int:
    """Size in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def scan(folder: epath.PathLike) -> dict[str, Tensor]:
  """Lists the tensors of a model folder. Reads the headers alone.

  Args:
    folder: Holds `model.safetensors`, or `model.safetensors.index.json` and the files it names. If
      it holds both, the first is read, as transformers does.

  Returns:
    {name: Tensor}.

  Raises:
    UserError: A file is missing, broken or truncated (the message names the tensors that it lacks),
      or does not hold a tensor that the index says it does.
  """
  folder = epath.Path(folder)
  index = folder / INDEX
  if (folder / SINGLE).exists() or not index.exists():
    if not (folder / SINGLE).exists():
      other = sorted(p.name for p in folder.glob("*.bin"))
      hint = (
        f"; {other[0]} is a pickle, which is never loaded: convert it with transformers' "
        "save_pretrained"
        if other
        else ""
      )
      raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    return _header(folder / SINGLE)
  try:
    where = json.loads(index.read_text())["weight_map"]
    names = sorted(set(where.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f"{index} is broken ({type(e).__name__}: {e}); download it again") from e
  missing = [name for name in names if not (folder / name).exists()]
  if missing:
    raise UserError(
      f"{folder} lacks {len(missing)} of {len(names)} files that {INDEX} names: "
      f"{', '.join(missing[:5])}; download them"
    )
  tensors: dict[str, Tensor] = {}
  for name in names:
    tensors |= _header(folder / name)
  lost = sorted(where.keys() - tensors.keys())
  if lost:
    raise UserError(
      f"{where[lost[0]]} does not hold {', '.join(lost[:5])}, which {INDEX} places "
      "there; download the folder again"
    )
  return tensors


def passed_over(folder: epath.Path) -> list[str]:
  """Returns a note on weights in a model folder that `scan` does not read, or none."""
  if not ((folder / SINGLE).exists() and (folder / INDEX).exists()):
    return []
  shards = sorted(p.name for p in folder.glob("model-*.safetensors"))
  return [f"{SINGLE} is read, as transformers does, and not {', '.join([INDEX, *shards[:3]])}"]


def _header(path: epath.Path) -> dict[str, Tensor]:
  broken = f"{path} is broken or not a safetensors file ({{}}); download it again"
  size = path.stat().length
  try:
    with path.open("rb") as f:
      (length,) = struct.unpack("<Q", f.read(8))
      if length > size:
        raise ValueError(f"its header would have {length} of {size} bytes")
      header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
      if entry["dtype"] not in _DTYPES:
        raise UserError(
          f"{path}: tensor {name} has dtype {entry['dtype']}, which is not supported; "
          "convert the model to bfloat16 or float32"
        )
      start, end = entry["data_offsets"]
      tensors[name] = Tensor(
        path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start
      )
      if tensors[name].nbytes != end - start:
        raise ValueError(
          f"tensor {name} has {end - start} bytes, its shape {entry['shape']} needs "
          f"{tensors[name].nbytes}"
        )
  except UserError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
    raise UserError(broken.format(e)) from e
  cut = [name for name, t in tensors.items() if t.offset + t.nbytes > size]
  if cut:
    raise UserError(
      f"{path} is truncated: it has {size:,} bytes and lacks {len(cut)} of {len(tensors)} "
      f"tensors, whole or in part: {', '.join(sorted(cut)[:5])}; download it again"
    )
  return tensors


def read(tensor: Tensor, region: Sequence[Bounds] | None = None) -> np.ndarray:
  """Reads a box of a tensor.

  Args:
    tensor: From `scan`.
    region: [start, stop) along each axis. None: the whole tensor.

  Returns:
    Array in the file's dtype.
  """
  region = region or tuple((0, n) for n in tensor.shape)
  if not tensor.shape:
    return _rows(tensor, 0, 1, 1).reshape(())
  (start, stop), *rest = region
  row = math.prod(tensor.shape[1:])
  if tuple(rest) == tuple((0, n) for n in tensor.shape[1:]):
    return _rows(tensor, start, stop, row).reshape(stop - start, *tensor.shape[1:])
  out = np.empty([b - a for a, b in region], tensor.dtype)
  step = max(1, _BLOCK // max(1, row * tensor.dtype.itemsize))
  for a in range(start, stop, step):
    b = min(a + step, stop)
    block = _rows(tensor, a, b, row).reshape(b - a, *tensor.shape[1:])
    out[a - start : b - start] = block[(slice(None), *(slice(*r) for r in rest))]
  return out


def _rows(tensor: Tensor, start: int, stop: int, row: int) -> np.ndarray:
  """Reads entries [start, stop) of the first axis, each of `row` elements, as a flat array."""
  out = np.empty((stop - start) * row, tensor.dtype)
  with tensor.file.open("rb") as f:
    f.seek(tensor.offset + start * row * tensor.dtype.itemsize)
    view = out.view(np.uint8).data
    done = 0
    while done < len(view):
      n = f.readinto(view[done:])
      if not n:
        raise UserError(f"{tensor.file} ended early: it changed while being read; start again")
      done += n
  return out


class Entry(NamedTuple):
  """A tensor to be written."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Size in bytes."""
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write(
  folder: epath.PathLike,
  entries: Sequence[Entry],
  array_of: Callable[[Entry], np.ndarray],
  shard_bytes: int,
) -> list[str]:
  """Writes tensors one after the other, into one file or several files with an index.

  Args:
    folder: An empty folder.
    entries: The tensors, in the order of the files.
    array_of: Function from an entry to the array of its shape and dtype. Called once per entry, in
      order.
    shard_bytes: Largest size of a file. A single larger tensor gets a file of its own.

  Returns:
    Names of the files written.
  """
  shards: list[list[Entry]] = [[]]
  for entry in entries:
    if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > shard_bytes:
      shards.append([])
    shards[-1].append(entry)
  n = len(shards)
  names = [SINGLE] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
  for name, shard in zip(names, shards, strict=True):
    write_file(epath.Path(folder) / name, shard, array_of)
  if n == 1:
    return names
  index = {
    "metadata": {"total_size": sum(e.nbytes for e in entries)},
    "weight_map": {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard},
  }
  (epath.Path(folder) / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
  return [*names, INDEX]


def write_file(
  path: epath.Path, entries: Sequence[Entry], array_of: Callable[[Entry], np.ndarray]
) -> None:
  """Writes one file of tensors. The arguments are those of `write`."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for e in entries:
    header[e.name] = {
      "dtype": _NAMES[np.dtype(e.dtype)],
      "shape": list(e.shape),
      "data_offsets": [offset, offset + e.nbytes],
    }
    offset += e.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
  with path.open("wb") as f:
    f.write(struct.pack("<Q", len(text)) + text)
    for e in entries:
      array = np.ascontiguousarray(array_of(e))
      if array.shape != tuple(e.shape) or array.dtype != e.dtype:
        raise ValueError(f"{e.name}: {array.dtype}{array.shape} is not {e.dtype}{e.shape}")
      f.write(array.reshape(-1).view(np.uint8).data)
