"""The page: one HTML file that loads nothing and asks no server.

Its policy (Content-Security-Policy) allows its own script and styles, and no request at all.
"""

import base64
import hashlib
import importlib.resources
import time
from collections.abc import Sequence
from typing import Any

from jaxgpt import __version__
from jaxgpt.analysis.report import results as results_lib
from jaxgpt.analysis.report import samples as samples_lib
from jaxgpt.analysis.report import sections, tags
from jaxgpt.analysis.report import series as series_lib
from jaxgpt.analysis.report.collect import Run
from jaxgpt.analysis.report.tags import Html, join, tag
from jaxgpt.errors import UserError
from jaxgpt.storage import strict_json

MOST_BYTES = 5_000_000
_MAIN = 6  # charts that are shown at once; the others unfold
_CHARTS = {  # metric: (title, unit), in the order of the page
  "loss": ("Loss", "nats per token"),
  "lr": ("Learning rate", ""),
  "grad_norm": ("Gradient norm", "before clipping"),
  "tokens_per_second": ("Throughput", "tokens per second"),
  "host_memory": ("Host memory", "bytes, of the first process"),
  "device_memory": ("Device memory", "bytes in use on the fullest device"),
  "device_memory_peak": ("Device memory, peak", "bytes, since the start of the process"),
  "bits_per_byte": ("Bits per byte", "of the validation split"),
  "perplexity": ("Perplexity", ""),
  "accuracy": ("Accuracy", ""),
  "mfu": ("MFU", "share of the devices' peak"),
  "step_time": ("Step time", "seconds"),
  "input_wait": ("Input wait", "share of the time"),
  "param_norm": ("Weight norm", ""),
}
_ICON = (
  "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect "
  "width='16' height='16' rx='4' fill='%233553c4'/%3E%3Cpath d='M3 4c2 7 4 8 10 8' fill='none' "
  "stroke='white' stroke-width='1.5' stroke-linecap='round'/%3E%3C/svg%3E"
)


def make(runs: Sequence[Run], given: Sequence[results_lib.Table] = (), title: str = "") -> str:
  """The report as an HTML document.

  Args:
    runs: The runs, from `collect.runs`.
    given: Results that were given along.
    title: Its title. '': the names of the runs.

  Raises:
    UserError: It would be larger than `MOST_BYTES`.
  """
  title = title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
  charts = _charts(runs)
  parts = [
    ("summary", "Summary", sections.summary(runs)),
    ("curves", "Curves", _curves(runs, charts)),
    ("time", "Where the time went", sections.per_run(runs, sections.account)),
    ("results", "Evaluations and results", sections.evaluations(runs, given)),
    *[("samples", "Samples as training went on", sections.per_run(runs, _samples))]
    * any(any(run.samples) for run in runs),
    ("data", "Data", sections.per_run(runs, sections.data)),
    ("config", "Config", sections.per_run(runs, sections.config)),
    ("checkpoints", "Checkpoints", sections.per_run(runs, sections.checkpoints)),
    ("environment", "Hardware and versions", sections.per_run(runs, sections.environments)),
  ]
  if len(runs) > 1:
    parts.insert(2, ("differences", "Differences", sections.differences(runs)))
  page = _document(title, parts, _data(runs, charts))
  if (size := len(page.encode())) > MOST_BYTES:
    raise UserError(
      f"the report of {len(runs)} runs would have {size / 1e6:.1f} MB, more than "
      f"{MOST_BYTES / 1e6:.0f} MB; name fewer runs"
    )
  return page


def _samples(run: Run) -> Html:
  return samples_lib.section(*run.samples)


def _document(title: str, parts: Sequence[tuple[str, str, Html]], data: Html) -> str:
  style, script = _asset("page.css"), _asset("page.js")
  policy = (
    f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
    "img-src data:; base-uri 'none'; form-action 'none'"
  )
  nav = tag(
    "nav",
    *(tag("a", key.capitalize(), href=f"#{key}") for key, _, _ in parts),
    aria_label="Sections",
  )
  made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
  header = tag(
    "header",
    tag("div", tag("h1", title), tag("p", f"jaxgpt {__version__}, {made}"), class_="title"),
    nav,
    tag(
      "button", "◐", type="button", id="theme", title="Light or dark", aria_label="Light or dark"
    ),
  )
  body = [
    tag(
      "section", tag("h2", name, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title"
    )
    for key, name, content in parts
  ]
  noscript = tag(
    "noscript", tag("p", "Curves need JavaScript. All tables do without.", class_="problem")
  )
  head = [
    '<meta charset="utf-8">',
    f'<meta http-equiv="Content-Security-Policy" content="{tags.text(policy)}">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    '<meta name="color-scheme" content="light dark">',
    f'<link rel="icon" href="{_ICON}">',
    tag("title", f"{title} · jaxgpt report"),
    f"<style>{style}</style>",
  ]
  lines = [
    "<!doctype html>",
    '<html lang="en">',
    tag("head", Html("\n".join(head))),
    "<body>",
    tag("a", "Skip to the content", href="#main", class_="skip"),
    header,
    tag("main", noscript, *body, id="main"),
    '<div id="tip" role="presentation" hidden></div>',
    '<div id="said" class="unseen" aria-live="polite"></div>',
    data,
    f"<script>{script}</script>",
    "</body>",
    "</html>",
  ]
  return "\n".join(lines) + "\n"


def _asset(name: str) -> str:
  return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
  return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _charts(runs: Sequence[Run]) -> list[dict[str, str]]:
  """The charts: a metric each, with the title, the unit and a name for its element."""
  there = dict.fromkeys(
    name for run in runs for series in run.series.values() for name in series.metrics
  )
  order = [name for name in _CHARTS if name in there]
  order += sorted(name for name in there if name not in _CHARTS and name not in sections.COUNTS)
  return [
    {
      "metric": name,
      "title": _CHARTS.get(name, (name, ""))[0],
      "unit": _CHARTS.get(name, ("", ""))[1],
      "id": f"chart-{number}",
    }
    for number, name in enumerate(order)
  ]


def _curves(runs: Sequence[Run], charts: Sequence[dict[str, str]]) -> Html:
  if not charts:
    return sections.notes(["no metric was logged"])
  figures = [_figure(runs, chart) for chart in charts]
  legend = join(
    tag(
      "button",
      tag("span", class_=f"swatch c{i % 10}", aria_hidden="true"),
      run.name,
      type="button",
      aria_pressed="true",
      data_run=i,
    )
    for i, run in enumerate(runs)
  )
  points = max((len(s.last) for run in runs for s in run.series.values()), default=0)
  records = max((s.records for run in runs for s in run.series.values()), default=0)
  note = (
    f"Each of up to {points:,} points stands for several of up to {records:,} log lines: the line "
    "is their mean, the band reaches from their least to their greatest value."
    if records > points
    else "Every log line is drawn."
  )
  how = (
    "Drag across a chart to zoom in, double-click to zoom out. With the keyboard: arrows move, + "
    "and − zoom, 0 shows all."
  )
  marks = (
    "▲ start of the run or of its continuation, ┃ save (those that are left, and the last of each "
    "start), ● evaluation."
  )
  more = figures[_MAIN:]
  return join(
    [
      Html(_TOOLS),
      tag("div", legend, id="legend", role="group", aria_label="Runs") if len(runs) > 1 else "",
      tag("div", *figures[:_MAIN], class_="charts"),
      tag(
        "details",
        tag("summary", f"{len(more)} more metrics"),
        tag("div", *more, class_="charts small"),
      )
      if more
      else "",
      sections.notes([how, marks, note]),
    ]
  )


_TOOLS = """<div class="tools" role="group" aria-label="Curves">
<label>x axis <select id="axis"><option value="steps">steps</option><option value="hours">training
time</option></select></label>
<label>smoothing <input id="smooth" type="range" min="0" max="0.98" step="0.02" value="0"></label>
<label><input id="log" type="checkbox"> log scale</label>
<label><input id="marks" type="checkbox" checked> marks</label>
<button type="button" id="reset" disabled>Show all</button>
</div>"""


_KEY = """<span class="key" aria-hidden="true">
<svg viewBox="0 0 22 8"><path d="M0 4H22"/></svg>training
<svg viewBox="0 0 22 8"><path d="M0 4H22" class="held"/><circle cx="11" cy="4" r="2.6"/></svg>
evaluation</span>"""


def _figure(runs: Sequence[Run], chart: dict[str, str]) -> Html:
  """A chart to be drawn by the script, with its figures as a table for those who cannot see it."""
  rows, missing = [], 0
  for run in runs:
    for kind, series in run.series.items():
      points = series.metrics.get(chart["metric"])
      if points is None:
        continue
      missing += points.missing
      if points.newest is not None:
        ends = (
          float(points.low[~_is_nan(points.low)].min()),
          float(points.high[~_is_nan(points.high)].max()),
        )
        rows.append((run.name, kind, points.newest, *ends, series.records))
  head = ("run", "kind", "last", "least", "greatest", "log lines")
  table = tags.table(f"Figures of {chart['title']}", head, rows, hidden_caption=True)
  caption = [tag("b", chart["title"]), " ", tag("span", chart["unit"], class_="unit")]
  if len(kinds := {row[1] for row in rows}) > 1 or kinds == {"validation"}:
    caption.append(Html(_KEY))
  warning = f"{missing:,} log lines without a finite number" if missing else ""
  return tag(
    "figure",
    tag("figcaption", *caption, tag("span", warning, class_="problem") if warning else ""),
    tag("div", class_="plot", tabindex=0, role="img", aria_label=chart["title"]),
    tag("details", tag("summary", "figures"), table, class_="figures"),
    id=chart["id"],
    data_metric=chart["metric"],
  )


def _is_nan(values: Any) -> Any:
  return values != values


def _data(runs: Sequence[Run], charts: Sequence[dict[str, str]]) -> Html:
  """The points of the curves as JSON, in an element that no browser executes."""
  found = {
    "charts": charts,
    "runs": [
      {
        "name": run.name,
        "series": {kind: series_lib.to_json(series) for kind, series in run.series.items()},
        "marks": run.marks,
      }
      for run in runs
    ],
  }
  text = strict_json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")
  return Html(f'<script type="application/json" id="points">{text}</script>')
