"""The data of a run: the cards of its prepared folders, where these still exist."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from jaxgpt.analysis import curves
from jaxgpt.data import pipeline
from jaxgpt.errors import UserError, first_line
from jaxgpt.text.prepare import shards

_EPOCHS = "epochs/"


class Folder(NamedTuple):
  """A prepared folder of a run.

  Attributes:
    path: As the config names it.
    weight: Its share of the rows, or None: in proportion to its rows.
    problem: Why it cannot be read, or ''.
    card: Its card.json, {} without one.
    manifest: Its manifest, {} without one.
  """

  path: str
  weight: float | None
  problem: str
  card: dict[str, Any]
  manifest: dict[str, Any]


class DataCard(NamedTuple):
  """The data of a run.

  Attributes:
    folders: Its prepared folders.
    stream: The addresses of `data.stream`, or ''.
    epochs: {source: passes at the last log line}.
    tokens: Tokens that the model read up to the last log line, or None.
    notes: Lines on facts that are unknown or have changed.
  """

  folders: list[Folder]
  stream: str
  epochs: dict[str, float]
  tokens: float | None
  notes: list[str]


def of(c: ml_collections.ConfigDict, digest: str, records: curves.Curves) -> DataCard:
  """The data of a run.

  Args:
    c: Its config.
    digest: The digest of its data, from starts.jsonl. '': an imported model.
    records: Its metrics.
  """
  train = [record for (kind, _), record in records.items() if kind == "train"]
  epochs = {
    name.removeprefix(_EPOCHS): value
    for name, value in (train[-1] if train else {}).items()
    if name.startswith(_EPOCHS)
  }
  if not digest:
    return DataCard([], "", epochs, None, ["an imported model: it has no data of its own"])
  paths = [os.fspath(path) for path in pipeline.folders(c.data.path)]
  weights = list(c.data.weights) or [None] * len(paths)
  total = sum(weight for weight in weights if weight is not None) or 1.0
  folders = [
    _folder(path, None if weight is None else weight / total)
    for path, weight in zip(paths, weights)
  ]
  return DataCard(folders, c.data.stream, epochs, _tokens(train), _notes(c, folders, digest))


def _notes(c: ml_collections.ConfigDict, folders: list[Folder], digest: str) -> list[str]:
  notes = [f"{folder.path}: {folder.problem}" for folder in folders if folder.problem]
  if not notes:
    found = pipeline.digest_of([folder.manifest["digest"] for folder in folders])
    if found != digest:
      notes.append(
        f"the data is not the run's any more: its digest was {digest[:12]}, is {found[:12]}"
      )
  if c.data.weight_changes:
    notes.append(f"the shares changed in the run: data.weight_changes={c.data.weight_changes!r}")
  return notes


def _tokens(train: list[dict[str, Any]]) -> float | None:
  """Tokens read, from the rates and times of all log lines."""
  before, total = 0, 0.0
  for record in train:
    rate, seconds = record.get("tokens_per_second"), record.get("step_time")
    if rate is None or seconds is None:
      return None
    total += rate * seconds * (record["step"] - before)
    before = record["step"]
  return total if train else None


def _folder(path: str, weight: float | None) -> Folder:
  try:
    manifest = shards.read_manifest(path)
  except (UserError, OSError) as e:
    return Folder(path, weight, first_line(e), {}, {})
  card: Mapping[str, Any] = {}
  problem = ""
  try:
    card = json.loads((epath.Path(path) / "card.json").read_text(encoding="utf-8"))
  except (OSError, ValueError) as e:
    problem = f"its card.json can't be read ({first_line(e)})"
  return Folder(path, weight, problem, dict(card), manifest)
