"""The parts of the page that need no script: figures, account, config, data, results."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxgpt.analysis import compare_runs, run_table
from jaxgpt.analysis.report import results as results_lib
from jaxgpt.analysis.report import tags
from jaxgpt.analysis.report.collect import Run
from jaxgpt.analysis.report.tags import Html, duration, join, number, tag
from jaxgpt.config.keys import KEYS
from jaxgpt.run.process import text_table
from jaxgpt.storage import strict_json

COUNTS = ("tokens", "batches")  # metrics that say nothing about a run
_MOST_ROWS = 40  # of long tables of data and environments
_UNKNOWN = "unknown"


def per_run(runs: Sequence[Run], content: Callable[[Run], Html]) -> Html:
  """The content for each run: as it is for one, to unfold for several."""
  if len(runs) == 1:
    return content(runs[0])
  return join(
    tag(
      "details",
      tag("summary", _swatch(i), run.name),
      tag("div", content(run), class_="inner"),
      class_="run",
      open=i == 0,
    )
    for i, run in enumerate(runs)
  )


def _swatch(i: int) -> Html:
  return tag("span", class_=f"swatch c{i % 10}", aria_hidden="true")


def notes(lines: Iterable[str], kind: str = "note") -> Html:
  """Lines below a table."""
  return join(tag("p", line, class_=kind) for line in lines)


def summary(runs: Sequence[Run]) -> Html:
  """Figures of one run as cards, of several ones as a table."""
  return _cards(runs[0]) if len(runs) == 1 else _table_of(runs)


def _cards(run: Run) -> Html:
  row, goodput = run.row, run.account.goodput
  cards = [
    ("status", row.status, f"step {row.step:,} of {row.steps:,}"),
    ("training loss", number(row.loss), "at the last log line"),
    ("validation loss", number(row.validation), "at the last evaluation"),
    ("bits per byte", number(row.bits_per_byte), "of the validation split"),
    ("tokens per second", number(row.tokens_per_second and round(row.tokens_per_second)), "median"),
    ("tokens read", number(run.data.tokens and round(run.data.tokens)), "without padding"),
    ("wall time", duration(run.account.seconds) if run.account.seconds else "", "as far as logged"),
    ("goodput", f"{goodput:.1%}" if goodput is not None else "", "share of it in training steps"),
  ]
  shown = [
    tag("div", tag("dt", name), tag("dd", value, class_="figure"), tag("dd", about, class_="about"))
    for name, value, about in cards
    if value
  ]
  return join([tag("dl", *shown, class_="cards"), notes(run.damages, "problem")])


def _table_of(runs: Sequence[Run]) -> Html:
  rows = []
  for i, run in enumerate(runs):
    row, goodput = run.row, run.account.goodput
    seconds = run.account.seconds
    rows.append(
      (
        (row.run, join([_swatch(i), row.run])),
        row.status,
        (row.step, f"{row.step:,} of {row.steps:,}"),
        row.loss,
        row.validation,
        row.bits_per_byte,
        (row.tokens_per_second, number(row.tokens_per_second and round(row.tokens_per_second))),
        (seconds or None, duration(seconds) if seconds else ""),
        (goodput, "" if goodput is None else f"{goodput:.1%}"),
      )
    )
  head = ("run", "status", "step", "loss", "validation", "bits/byte", "tokens/s", "wall time")
  problems = [f"{run.name}: {damage}" for run in runs for damage in run.damages]
  table = tags.table("Last figures of the runs", (*head, "goodput"), rows, hidden_caption=True)
  return join([table, notes(problems, "problem")])


def account(run: Run) -> Html:
  """The wall time of a run, as a bar and as a table."""
  found = run.account
  if not found.parts:
    return notes(found.notes)
  total = found.seconds
  width = 1000
  x, rects = 0.0, []
  for i, part in enumerate(found.parts):
    wide = width * part.seconds / total
    label = f"{part.name}: {duration(part.seconds)}, {part.seconds / total:.1%}"
    rects.append(
      tag(
        "rect",
        tag("title", label),
        x=f"{x:.2f}",
        y=0,
        width=f"{max(wide - 2, 0.5):.2f}",
        height=28,
        rx=3,
        class_=f"fill c{i}",
      )
    )
    x += wide
  described = ", ".join(f"{part.name} {part.seconds / total:.0%}" for part in found.parts)
  bar = tag(
    "svg",
    *rects,
    viewBox=f"0 0 {width} 28",
    preserveAspectRatio="none",
    class_="bar",
    role="img",
    aria_label=f"Wall time: {described}",
  )
  rows = [
    (
      (part.name, join([_swatch(i), part.name])),
      (part.seconds, duration(part.seconds)),
      (part.seconds / total, f"{part.seconds / total:.1%}"),
      part.meaning,
    )
    for i, part in enumerate(found.parts)
  ]
  starts = f"{duration(total)} in {found.starts} start{'s' if found.starts > 1 else ''}"
  return join(
    [
      tag("p", starts),
      bar,
      tags.table(
        f"Wall time of {run.name}", ("part", "time", "share", "meaning"), rows, hidden_caption=True
      ),
      notes(found.notes),
    ]
  )


def config(run: Run) -> Html:
  """The config with the origin of each value. Rows that are as by default are hidden at first."""
  rows, classes = [], []
  for key, value in run.flat.items():
    declared = KEYS.get(key)
    origin = run.origin.get(key, _UNKNOWN)
    default = declared.default if declared else None
    is_derived = origin == "base" and declared is not None and declared.default is None
    shown = "derived" if is_derived and value is not None else origin
    shown = "default" if shown == "base" else shown
    about = _first_sentence(declared.help) if declared else "an option of a user's own file"
    rows.append(
      (key, Html(tag("code", _literal(value))), shown, Html(tag("code", _literal(default))), about)
    )
    classes.append("default" if shown in ("default", "derived") else "set")
  head = ("key", "value", "origin", "default", "meaning")
  table = tags.table(f"Config of {run.name}", head, rows, row_classes=classes, hidden_caption=True)
  set_ = classes.count("set")
  label = tag(
    "label",
    tag("input", type="checkbox", class_="all-keys"),
    f" show all {len(rows)} keys, and not only the {set_} that were set",
  )
  changes = [
    f"from step {start['step']}: {key} was {old!r}, is {new!r}"
    for start in run.starts
    for key, (old, new) in (start.get("changes") or {}).items()
  ]
  return tag("div", tag("p", label, class_="tools"), table, notes(changes), class_="config")


def _literal(value: Any) -> str:
  return strict_json.dumps(value, default=str) if not isinstance(value, str) else repr(value)


def _first_sentence(text: str) -> str:
  return text.partition(". ")[0].rstrip(".")


def data(run: Run) -> Html:
  """The data card."""
  card = run.data
  parts = [notes(card.notes, "problem" if any(f.problem for f in card.folders) else "note")]
  if card.stream:
    parts.append(tag("p", f"Training reads a stream of files: {card.stream}"))
  parts += [_folder(folder, card.epochs, len(card.folders) > 1) for folder in card.folders]
  if card.epochs:
    rows = [(name, round(value, 4)) for name, value in card.epochs.items()]
    parts.append(tags.table("Passes over each source so far", ("source", "epochs"), rows))
  return join(parts)


def _folder(folder: Any, epochs: Any, is_mixture: bool) -> Html:
  card, manifest = folder.card, folder.manifest
  weight = "in proportion to its rows" if folder.weight is None else f"{folder.weight:.1%} of rows"
  parts = [tag("h3", folder.path), tag("p", f"Share: {weight}") if is_mixture else Html("")]
  if not manifest:
    return join(parts)
  tokenizer = manifest["tokenizer"]
  parts.append(
    tag(
      "p",
      f"{manifest['kind']}; tokenizer {tokenizer['kind']} of {tokenizer['vocab_size']:,} tokens; "
      f"{manifest.get('kept', 0):,} of {manifest.get('read', 0):,} documents kept; "
      f"digest {manifest['digest'][:12]}",
    )
  )
  rows = [
    (name, entry["documents"], entry["tokens"], entry["bytes"])
    for name, entry in manifest["splits"].items()
  ]
  tables = [tags.table("Splits", ("split", "documents", "tokens", "bytes"), rows)]
  tables += [*_sources(card), *_dropped(card)]
  return join([*parts, tag("div", *tables, class_="flow")])


def _dropped(card: dict[str, Any]) -> list[Html]:
  dropped = [
    (rule, of["documents"], of["bytes"], "; ".join(of.get("examples", [])[:2]))
    for rule, of in card.get("dropped", {}).items()
  ]
  over = [
    (rule, of["count"], None, "; ".join(map(str, of.get("examples", [])[:2])))
    for rule, of in card.get("passed over", {}).items()
    if isinstance(of, dict) and "count" in of
  ]
  changed = [
    (step, of["documents"], of["characters"]) for step, of in card.get("changed", {}).items()
  ]
  out = []
  if dropped:
    out.append(
      tags.table("Documents dropped, by rule", ("rule", "documents", "bytes", "examples"), dropped)
    )
  elif card:
    out.append(tag("p", "No document was dropped.", class_="note"))
  if over:
    rows = [(rule, count, examples) for rule, count, _, examples in over]
    out.append(tags.table("Files passed over", ("reason", "files", "examples"), rows))
  if changed:
    head = ("step", "documents", "characters removed")
    out.append(tags.table("Documents changed by cleaning", head, changed))
  return out


def _sources(card: dict[str, Any]) -> list[Html]:
  sources = list(card.get("sources", {}).items())
  total = sum(of["bytes"] for _, of in sources) or 1
  rows = [
    (name, of["documents"], of["bytes"], (of["bytes"] / total, f"{of['bytes'] / total:.1%}"))
    for name, of in sources[:_MOST_ROWS]
  ]
  if not rows:
    return []
  rest = len(sources) - len(rows)
  more = notes([f"and {rest} smaller sources"] if rest > 0 else [])
  head = ("source", "documents", "bytes", "share of bytes")
  return [tags.table("Sources, by size", head, rows), more]


def evaluations(runs: Sequence[Run], given: Sequence[results_lib.Table]) -> Html:
  """The last figures of each evaluation metric, and the results that were given along."""
  rows = []
  for run in runs:
    found = run.series.get("validation")
    for name, points in found.metrics.items() if found else ():
      if found and points.newest is not None and name not in COUNTS:
        least, greatest = float(np.nanmin(points.low)), float(np.nanmax(points.high))
        rows.append((run.name, name, points.newest, least, greatest, found.records))
  parts = []
  if rows:
    head = ("run", "metric", "last", "least", "greatest", "evaluations")
    parts.append(tags.table("Evaluations during training", head, rows))
  else:
    parts.append(notes(["no evaluation was logged: no validation split, or eval.every=0"]))
  for table in given:
    parts.append(tags.table(table.title, table.head, table.rows))
    parts.append(notes([table.note] if table.note else []))
  if not given:
    parts.append(
      notes(
        [
          "Intervals and tasks: save what jaxgpt evaluate --json or the scoring of a task "
          "prints, and give the file as --results=FILE."
        ]
      )
    )
  return join(parts)


def checkpoints(run: Run) -> Html:
  """The checkpoints of a run."""
  if not run.checkpoints:
    return notes(["no checkpoint is left in the run folder"])
  rows = [
    (
      e.step,
      e.folder,
      (e.bytes, text_table.size(e.bytes)),
      e.date,
      e.items,
      e.note or "sealed files are as saved",
    )
    for e in run.checkpoints
  ]
  head = ("step", "folder", "size", "complete (UTC)", "items", "note")
  table = tags.table(f"Checkpoints of {run.name}", head, rows, hidden_caption=True)
  note = "The report reads no arrays. “jaxgpt checkpoint verify RUN” reads them all."
  return join([table, notes([note])])


def environments(run: Run) -> Html:
  """Hardware, versions and flags of the first start, the starts, and the changes between them."""
  first = run.environments[0].facts
  parts = []
  for topic in ("hardware", "versions", "flags", "code"):
    facts = {k: v for k, v in first.get(topic, {}).items() if "/" not in k}
    shown = [(key, _plain(value)) for key, value in facts.items() if value is not None]
    if topic == "versions":
      shown.sort(key=lambda item: item[0] not in _NAMED)
    if not shown:
      continue
    table = tags.table(topic.capitalize(), ("name", "value"), shown[:_MOST_ROWS])
    rest = len(shown) - _MOST_ROWS
    where = f"and {rest} more in {run.name}/environments"
    parts.append(tag("div", table, notes([where] if rest > 0 else [])))
  starts = [
    (
      i,
      start.get("time", ""),
      start.get("step"),
      start.get("saved"),
      Html(tag("code", " ".join(map(str, start.get("command", []))))),
      "; ".join(f"{k}: {start[k]}" for k in ("failed", "damaged") if k in start),
    )
    for i, start in enumerate(run.starts, 1)
  ]
  head = ("start", "time (UTC)", "from step", "last save", "command", "trouble")
  return join([tags.table("Starts", head, starts), tag("div", *parts, class_="columns")])


_NAMED = (
  "python",
  "jax",
  "jaxlib",
  "numpy",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "jaxgpt",
)


def _plain(value: Any) -> str:
  return value if isinstance(value, str) else strict_json.dumps(value)


def differences(runs: Sequence[Run]) -> Html:
  """How the runs differ: in their keys all together, in the rest each from the first."""
  keys = run_table.differing([run.flat for run in runs])
  rows = [(key, *(Html(tag("code", _literal(run.flat.get(key)))) for run in runs)) for key in keys]
  table = (
    tags.table("Config keys that differ", ("key", *(run.name for run in runs)), rows)
    if rows
    else notes(["All config keys are equal."])
  )
  parts = [table]
  for run in runs[1:]:
    if run.difference is not None:
      lines = compare_runs.lines(run.difference)
      text = "\n".join(lines[lines.index("environment") :])
      inner = tag("pre", text, tabindex=0)
      summary_ = tag("summary", f"{run.name} against {runs[0].name}: environment, data, curves")
      parts.append(tag("details", summary_, inner, class_="run"))
  return join(parts)
