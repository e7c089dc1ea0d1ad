"""Joins the shards and sidecars that many tasks wrote to those of one split."""

import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgpt.storage.paths import sha256


def _are_offsets(name: str) -> bool:
  """Whether a sidecar holds offsets [documents + 1] into another. They start at 0 in each task."""
  return name == "sources" or name.endswith("_offsets")


def assemble(
  folder: pathlib.Path, written: Sequence[tuple[pathlib.Path, dict[str, Any]]]
) -> dict[str, Any]:
  """Joins the outputs of tasks for one split, in the tasks' order.

  Links shards instead of copying them if the file system can. Nothing in the tasks' folders
  changes, so that this can be repeated.

  Args:
    folder: An existing folder to write into.
    written: (a task's folder, the result of its `shards.SplitWriter.finish`) of at least one task.

  Returns:
    The split's entry in the manifest, as `SplitWriter.finish` returns it for one task.
  """
  shards = [(task / shard["name"], shard) for task, entry in written for shard in entry["shards"]]
  named = []
  for number, (path, shard) in enumerate(shards):
    split = shard["name"].split("-")[0]
    name = f"{split}-{number:05d}-of-{len(shards):05d}.arrayrecord"
    _link(path, folder / name)
    named.append({**shard, "name": name})
  entry = {key: sum(e[key] for _, e in written) for key in ("documents", "tokens", "bytes")}
  sidecars = []
  for sidecar in written[0][1]["sidecars"]:
    name = sidecar["name"]
    paths = [task / name for task, _ in written]
    if name.endswith(".npy"):
      _join_arrays(paths, folder / name, _are_offsets(name.split(".")[-2]))
    else:
      _join_texts(paths, folder / name)
    sidecars.append(describe(folder / name))
  return {**entry, "shards": named, "sidecars": sidecars}


def _link(path: pathlib.Path, to: pathlib.Path) -> None:
  try:
    os.link(path, to)
  except OSError:  # a file system without hard links
    shutil.copyfile(path, to)


def _join_texts(paths: Sequence[pathlib.Path], to: pathlib.Path) -> None:
  with to.open("wb") as out:
    for path in paths:
      with path.open("rb") as f:
        shutil.copyfileobj(f, out)


def _join_arrays(paths: Sequence[pathlib.Path], to: pathlib.Path, are_offsets: bool) -> None:
  """Joins arrays along their first axis, with one of them in memory at a time.

  Each task's offsets start at 0. They grow by the last offset of the task before, and the first 0
  of every task after the first is dropped:

      task 0  [0, 3, 7]   task 1  [0, 2, 5]   ->   [0, 3, 7, 9, 12]
  """
  arrays = [np.load(path, mmap_mode="r") for path in paths]
  total = sum(len(array) for array in arrays) - (len(arrays) - 1 if are_offsets else 0)
  with to.open("wb") as out:
    np.lib.format.write_array_header_1_0(
      out,
      {
        "descr": np.lib.format.dtype_to_descr(arrays[0].dtype),
        "fortran_order": False,
        "shape": (total, *arrays[0].shape[1:]),
      },
    )
    base = 0
    for number, array in enumerate(arrays):
      if are_offsets:
        end = base + int(array[-1])
        array = array[1 if number else 0 :] + array.dtype.type(base)
        base = end
      out.write(np.ascontiguousarray(array).tobytes())


def describe(path: pathlib.Path) -> dict[str, Any]:
  """A file's entry in the manifest: name, size in bytes and sha256."""
  return {"name": path.name, "size": path.stat().st_size, "sha256": sha256(path)}
