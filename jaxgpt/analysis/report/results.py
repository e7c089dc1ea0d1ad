"""Results that are given along with runs: files that other commands printed as JSON.

jaxgpt evaluate --json             a split, its metrics and tables
jaxgpt evaluate --tasks … --json   tasks of the harness, with standard errors
jaxgpt.tasks.scoring --json        metrics of a task and of its baseline, with intervals
jaxgpt export                      parity.json, the certificate
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from jaxgpt.errors import UserError, first_line
from jaxgpt.storage import strict_json
from jaxgpt.tasks import bootstrap

_95_PERCENT = 1.96  # standard errors


class Table(NamedTuple):
  """A table of results.

  Attributes:
    title: Its heading.
    head: Names of the columns. The first one is text.
    rows: Cells: texts, numbers, or None.
    note: A sentence below it.
  """

  title: str
  head: tuple[str, ...]
  rows: list[tuple[Any, ...]]
  note: str = ""


def read(path: epath.PathLike) -> list[Table]:
  """The tables of a file.

  Raises:
    UserError: The file is none of those above.
  """
  path = epath.Path(path)
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as e:
    raise UserError(f"--results={path}: not a file of JSON ({first_line(e)})") from e
  if isinstance(found, dict):
    for is_it, tables in _READERS:
      if is_it(found):
        return tables(path.name, found)
  raise UserError(
    f"--results={path}: not what jaxgpt evaluate --json, python -m jaxgpt.tasks.scoring --json or "
    "jaxgpt export (parity.json) write; give one of these"
  )


def _is_evaluation(found: Mapping[str, Any]) -> bool:
  return {"split", "step", "loss"} <= found.keys()


def _evaluation(name: str, found: Mapping[str, Any]) -> list[Table]:
  head = {key: value for key, value in found.items() if key != "by"}
  rows: list[tuple[Any, ...]] = [
    (key, value) for key, value in head.items() if key not in ("split", "step", "data_digest")
  ]
  title = f"{name}: {found['split']} at step {found['step']}"
  digest = str(found.get("data_digest", ""))[:12]
  note = f"Digest of the data: {digest}." if digest else ""
  out = [Table(title, ("metric", "value"), rows, note)]
  for by, table in found.get("by", {}).items():
    if groups := _rows(table):
      columns = list(dict.fromkeys(key for group in groups for key in group))
      cells = [tuple(group.get(key) for key in columns) for group in groups]
      out.append(Table(f"{title}, by {by}", tuple(columns), cells))
  return out


def _rows(table: Any) -> list[dict[str, Any]]:
  """The rows of a table by source, position or length, whichever form it has."""
  if isinstance(table, dict):
    items = [(key, value) for key, value in table.items() if isinstance(value, dict)]
    return [{"name": key, **value} for key, value in items]
  return [row for row in table if isinstance(row, dict)] if isinstance(table, list) else []


def _is_harness(found: Mapping[str, Any]) -> bool:
  return {"step", "tasks"} <= found.keys() and isinstance(found["tasks"], dict)


def _harness(name: str, found: Mapping[str, Any]) -> list[Table]:
  rows: list[tuple[Any, ...]] = []
  for task, metrics in found["tasks"].items():
    for metric, value in metrics.items():
      if metric.partition("/")[0].endswith("_stderr"):
        continue
      base, slash, rest = metric.partition("/")
      error = metrics.get(f"{base}_stderr{slash}{rest}")
      spread = None if error is None else _95_PERCENT * error
      ends = (None, None) if spread is None else (value - spread, value + spread)
      rows.append((task, metric, value, *ends))
  title = f"{name}: tasks of the harness at step {found['step']}"
  head = ("task", "metric", "value", "95% from", "to")
  return [Table(title, head, rows, "Intervals are 1.96 standard errors that lm-eval computed.")]


def _is_scores(found: Mapping[str, Any]) -> bool:
  return {"rows", "scores", "baseline"} <= found.keys()


def _scores(name: str, found: Mapping[str, Any]) -> list[Table]:
  baseline = dict(found["baseline"])
  of = f"baseline: {baseline.pop('name', '')}"
  rows: list[tuple[Any, ...]] = []
  for metric, estimate in found["scores"].items():
    rows.append((metric, "model", *estimate))
    rows += [(metric, of, *baseline[metric])] if metric in baseline else []
  left = sum(found.get("left_out", {}).values())
  note = f"Intervals are bootstrapped over rows, at {bootstrap.LEVEL:.0%}."
  note += f" Predictions that failed: {found.get('failed', 0)}." if found.get("failed") else ""
  note += f" Rows left out: {left}." if left else ""
  title = f"{name}: {found['rows']} rows"
  return [Table(title, ("metric", "of", "value", "95% from", "to"), rows, note)]


def _is_parity(found: Mapping[str, Any]) -> bool:
  return {"checked", "tokenizer"} <= found.keys()


def _parity(name: str, found: Mapping[str, Any]) -> list[Table]:
  rows: list[tuple[Any, ...]] = []
  for key in ("checked", "why_not"):
    if key in found:
      rows.append((key.replace("_", " "), str(found[key])))
  for part in ("logits", "greedy", "tokenizer", "versions"):
    values = found.get(part)
    if isinstance(values, dict):
      rows += [(f"{part}: {key}", _short(value)) for key, value in values.items()]
  return [Table(f"{name}: parity with transformers", ("fact", "value"), rows)]


def _short(value: Any) -> Any:
  if isinstance(value, int | float | str) or value is None:
    return value
  text = strict_json.dumps(value)
  return text if len(text) <= 120 else f"{text[:119]}…"


_READERS = (
  (_is_harness, _harness),
  (_is_evaluation, _evaluation),
  (_is_scores, _scores),
  (_is_parity, _parity),
)
