"""Samples on the page: the texts that a run wrote as training went on (`log.samples`)."""

from typing import Any

from etils import epath

from jaxgpt.analysis.report import tags
from jaxgpt.analysis.report.tags import Html, join, tag
from jaxgpt.run import metric_writers

_MOST_STEPS = 20  # of a run on the page, evenly spread, with the last one
_MOST_CHARS = 600  # of a text


def of_run(folder: epath.PathLike) -> tuple[list[dict[str, Any]], list[str]]:
  """The samples of a run that the page shows, and notes on what it leaves out.

  Args:
    folder: The run folder.
  """
  try:
    found = metric_writers.read_samples(folder)
  except (OSError, ValueError) as e:
    return [], [f"{metric_writers.SAMPLES} can't be read: {type(e).__name__}"]
  if len(found) <= _MOST_STEPS:
    return found, []
  at = {round(i * (len(found) - 1) / (_MOST_STEPS - 1)) for i in range(_MOST_STEPS)}
  note = f"{_MOST_STEPS} of {len(found):,} steps with samples; {metric_writers.SAMPLES} has all"
  return [found[i] for i in sorted(at)], [note]


def section(found: list[dict[str, Any]], notes: list[str]) -> Html:
  """A table for each prompt: the text that followed it, step by step.

  Args:
    found: From `of_run`.
    notes: From `of_run`.
  """
  prompts = list(dict.fromkeys(one["prompt"] for r in found for one in r["samples"]))
  parts = []
  for prompt in prompts:
    rows = [
      (record["step"], Html(tag("pre", _short(one["text"]))))
      for record in found
      for one in record["samples"]
      if one["prompt"] == prompt
    ]
    caption = f"After {_short(prompt)!r}" if prompt else "From the beginning of a document"
    parts.append(tags.table(caption, ("step", "text"), rows))
  if not found and not notes:
    notes = ["No samples were written: log.samples.every was 0."]
  return join([*parts, *(tag("p", note, class_="note") for note in notes)])


def _short(text: str) -> str:
  return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}…"
