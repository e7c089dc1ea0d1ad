"""How two runs differ: in their configs, environments, data and curves."""

import json
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from jaxgpt import config
from jaxgpt.analysis import curves
from jaxgpt.config.keys import KEYS
from jaxgpt.errors import UserError
from jaxgpt.run import run_folder
from jaxgpt.run.provenance import environment
from jaxgpt.run.provenance.environment import Difference
from jaxgpt.text.prepare import shards

_FIGURES = (
  ("train", "loss"),
  ("validation", "loss"),
  ("validation", "bits_per_byte"),
  ("train", "tokens_per_second"),
)


class KeyChange(NamedTuple):
  """A config key whose values differ.

  Attributes:
    key: The flat key.
    first, second: Its values.
    matters: Whether it changes the numbers: it is not a key that may change when a run goes on.
  """

  key: str
  first: Any
  second: Any
  matters: bool


class Comparison(NamedTuple):
  """How two runs differ.

  Attributes:
    config: Keys whose values differ, those that change the numbers first.
    environment: Facts of their first starts that differ.
    data: Lines on how their data differ. [] if it is the same.
    curves: Their metrics, record by record.
    figures: {name: (last value of the first run, of the second)}.
  """

  config: list[KeyChange]
  environment: list[Difference]
  data: list[str]
  curves: curves.Comparison
  figures: dict[str, tuple[float | None, float | None]]


def compare(
  first: epath.PathLike,
  second: epath.PathLike,
  both: tuple[curves.Curves, curves.Curves] | None = None,
) -> Comparison:
  """Compares two run folders. Reads no checkpoint.

  Args:
    first, second: The run folders.
    both: Their metrics, if they have been read.

  Raises:
    UserError: One of them holds no run.
  """
  a, b = (run_folder.read_config(run) for run in (first, second))
  starts = [run_folder.read_starts(run)[0] for run in (first, second)]
  environments = [environment.read(run, start) for run, start in zip((first, second), starts)]
  both = both or (curves.read(first), curves.read(second))
  figures = {}
  for kind, metric in _FIGURES:
    values = tuple(curves.last_of(one, kind, metric) for one in both)
    if any(value is not None for value in values):
      figures[f"{kind} {metric}"] = values[0], values[1]
  return Comparison(
    key_changes(a, b),
    environment.differences(*environments),
    _data(a, b, *(start["data_digest"] for start in starts)),
    curves.compare(*both),
    figures,
  )


def key_changes(a: ml_collections.ConfigDict, b: ml_collections.ConfigDict) -> list[KeyChange]:
  """The keys of two resolved configs whose values differ, those that change the numbers first.

  Keys whose values follow from those of other keys in both configs are left out.
  """
  x, y = config.flatten(a), config.flatten(b)
  changes = [
    KeyChange(key, x.get(key), y.get(key), not config.is_free_on_resume(key))
    for key in sorted(x.keys() | y.keys())
    if x.get(key) != y.get(key) and key != "code_folder"
    if not (_follows(a, key, x.get(key)) and _follows(b, key, y.get(key)))
  ]
  return sorted(changes, key=lambda change: (not change.matters, change.key))


def _follows(c: ml_collections.ConfigDict, key: str, value: Any) -> bool:
  """Whether a value is the one that its key derives from the others."""
  derive = KEYS[key].derive if key in KEYS else None
  return derive is not None and derive(c) == value


def _data(
  a: ml_collections.ConfigDict, b: ml_collections.ConfigDict, first: str, second: str
) -> list[str]:
  if first == second:
    return []
  lines = [f"manifest digest: {first[:12] or 'none'} and {second[:12] or 'none'}"]
  manifests = []
  for c in (a, b):
    try:
      manifests.append(shards.read_manifest(c.data.path) if c.data.path else None)
    except UserError as e:  # it is somewhere else by now, or several folders
      lines.append(f"not compared further: {e}")
      manifests.append(None)
  one, other = manifests
  if one is None or other is None:
    return lines
  facts = [
    {
      "kind": m["kind"],
      "tokenizer": f"{m['tokenizer']['kind']} {m['tokenizer']['digest'][:12]}",
      "vocabulary": m["tokenizer"]["vocab_size"],
      **{f"total {key}": value for key, value in m["total"].items()},
      **{f"{split} documents": e["documents"] for split, e in m["splits"].items()},
      "prepared by jaxgpt": m["jaxgpt"],
    }
    for m in (one, other)
  ]
  for name in facts[0]:
    if facts[0][name] != facts[1].get(name):
      lines.append(f"{name}: {facts[0][name]} and {facts[1].get(name)}")
  return lines


def lines(found: Comparison) -> list[str]:
  """Lines that show a comparison."""
  out = ["config"]
  for change in found.config:
    note = "" if change.matters else "  (does not change the numbers)"
    out.append(f"  {change.key}: {change.first!r} and {change.second!r}{note}")
  out += [] if found.config else ["  equal"]
  out.append("environment")
  out += [f"  {d.topic}: {d.name}: {_short(d.first)} and {_short(d.second)}" for d in shown(found)]
  out += [] if found.environment else ["  equal"]
  out += ["data", *(f"  {line}" for line in found.data or ["equal"])]
  return [*out, "curves", *(f"  {line}" for line in curve_lines(found.curves)), *_figures(found)]


def shown(found: Comparison, most: int = 20) -> list[Difference]:
  """The differences of the environments, and a last one that counts those left out."""
  rest = len(found.environment) - most
  more = [Difference("…", f"{rest} more", "see --json", "")] if rest > 0 else []
  return found.environment[:most] + more


def curve_lines(found: curves.Comparison) -> list[str]:
  """Lines on the metrics of two runs."""
  if not found.records:
    return ["no record in common"]
  if found.first_difference is None:
    return [f"equal to the bit in all {found.records} records in common, up to step {found.last}"]
  out = [f"first difference: {found.first_difference.describe()}"]
  out.append(
    f"equal to the bit up to step {found.before}" if found.before else "no record before is equal"
  )
  if found.largest:
    step, gap = found.largest
    out.append(f"largest difference of the training loss: {gap:.2e} at step {step}")
  return out


def _figures(found: Comparison) -> list[str]:
  show = lambda value: "none" if value is None else f"{value:,.4f}"
  return [f"  last {name}: {show(a)} and {show(b)}" for name, (a, b) in found.figures.items()]


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= 100 else f"{text[:99]}…"
