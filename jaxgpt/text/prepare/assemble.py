"""The shards and sidecars of many tasks to those of one split."""

import hashlib
import os
import shutil

import numpy as np

# Sidecars [documents + 1] of offsets into another one, which begin anew in each task.
_OFFSETS = ("sources", "trained_offsets")


def assemble(folder, parts):
  """Joins what tasks wrote of one split, in the tasks' order.

  Shards are linked, not copied, where the file system can; nothing in the tasks' folders changes,
  so that this can be done again.

  Args:
    folder: an existing pathlib.Path to write into.
    parts: [(task's folder, what its `shards.SplitWriter.finish` returned), …], at least one.

  Returns:
    The split's entry in the manifest, as `SplitWriter.finish` returns it for one task.
  """
  shards = [(part / shard["name"], shard) for part, entry in parts for shard in entry["shards"]]
  named = []
  for number, (path, shard) in enumerate(shards):
    split = shard["name"].split("-")[0]
    name = f"{split}-{number:05d}-of-{len(shards):05d}.arrayrecord"
    _link(path, folder / name)
    named.append({**shard, "name": name})
  entry = {key: sum(part[key] for _, part in parts) for key in ("documents", "tokens", "bytes")}
  sidecars = []
  for sidecar in parts[0][1]["sidecars"]:
    name = sidecar["name"]
    paths = [part / name for part, _ in parts]
    if name.endswith(".npy"):
      _join_arrays(paths, folder / name, name.split(".")[-2] in _OFFSETS)
    else:
      _join_texts(paths, folder / name)
    sidecars.append(_describe(folder / name))
  return {**entry, "shards": named, "sidecars": sidecars}


def _link(path, to):
  try:
    os.link(path, to)
  except OSError:  # a file system without hard links
    shutil.copyfile(path, to)


def _join_texts(paths, to):
  with to.open("wb") as out:
    for path in paths:
      with path.open("rb") as part:
        shutil.copyfileobj(part, out)


def _join_arrays(paths, to, are_offsets):
  """Joins arrays along their first axis, one in memory at a time."""
  parts = [np.load(path, mmap_mode="r") for path in paths]
  total = sum(len(part) for part in parts) - (len(parts) - 1 if are_offsets else 0)
  with to.open("wb") as out:
    np.lib.format.write_array_header_1_0(
      out,
      {
        "descr": np.lib.format.dtype_to_descr(parts[0].dtype),
        "fortran_order": False,
        "shape": (total, *parts[0].shape[1:]),
      },
    )
    base = 0
    for number, part in enumerate(parts):
      if are_offsets:
        end = base + int(part[-1])
        part = part[1 if number else 0 :] + part.dtype.type(base)
        base = end
      out.write(np.ascontiguousarray(part).tobytes())


def _describe(path):
  with path.open("rb") as f:
    digest = hashlib.file_digest(f, "sha256").hexdigest()
  return {"name": path.name, "size": path.stat().st_size, "sha256": digest}
