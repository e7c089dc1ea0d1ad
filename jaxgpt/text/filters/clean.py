"""Cleaning: a sequence of steps that rewrite texts or drop documents.

Users write a step as NAME or NAME:key=value,key=value. `clean_steps.STEPS` lists them.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jaxgpt.text.filters import clean_steps, step_specs
from jaxgpt.text.filters.datatrove_blocks import CleanText
from jaxgpt.text.readers.documents import Document, Dropped
from jaxgpt.text.readers.fields import LABELS, without_text


def make(given: Iterable[str]) -> "Cleaner":
  """Builds the cleaner of a list of specs.

  Args:
    given: Specs such as 'ftfy' or 'length:min_chars=200', applied in this order. A step may occur
      more than once.

  Returns:
    A cleaner. Without specs it passes documents on unchanged.

  Raises:
    UserError: An unknown step or option, a bad value, or a missing extra.
  """
  return Cleaner(given)


class Cleaner:
  """Cleaning steps in order. It pickles as its specs.

  Attributes:
    specs: The strings it was made from.
    changed: {step: [documents changed, characters removed (net)]} over the documents that this
      object has cleaned. Not pickled: each process reports its own.
  """

  def __init__(self, given: Iterable[str]):
    self.specs = tuple(given)
    self._steps = [_build(spec) for spec in self.specs]
    self.changed: dict[str, list[int]] = {}

  @property
  def rewriting(self) -> list[str]:
    """The names of the steps that rewrite the texts of labelled documents."""
    return [step.name for step in self._steps if step.rewrites]

  def __reduce__(self) -> tuple[type["Cleaner"], tuple[tuple[str, ...]]]:
    return Cleaner, (self.specs,)

  def __call__(self, documents: Iterable[Document], dropped: Dropped) -> Iterator[Document]:
    """Cleans documents, one at a time.

    Args:
      documents: The documents.
      dropped: The account of dropped documents. The rule is 'STEP: reason', or 'STEP: error' if
        the step failed, or 'STEP: empty' if it left only white space, or that in a field which
        needs text (`fields.without_text`).

    Yields:
      The kept documents in order, with cleaned texts. In documents with `fields`, steps that only
      rewrite texts also clean the strings there, except labels and the roles of messages. Steps
      that judge look at `text`.
    """
    if not self._steps:
      yield from documents
      return
    for document in documents:
      left: Document | None = document
      for step in self._steps:
        left = left and self._apply(step, left, dropped)
      if left is not None:
        yield left

  def _apply(self, step: "_Step", document: Document, dropped: Dropped) -> Document | None:
    """The document after one step, or None if the step drops it."""
    if step.pages and not document.html:
      return document
    before = document.text
    try:
      text, reason = step.run(before)
      if document.fields and reason is None:
        text = text if step.rewrites else before
        fields = _map_fields(step.run, document.fields) if step.rewrites else document.fields
        document = document._replace(fields=fields)
      text.encode()  # stored texts are UTF-8
    except Exception as e:  # a library that fails on a text must not end the run
      dropped.add(f"{step.name}: error", document.source, f"{type(e).__name__}: {e}"[:200])
      return None
    if reason is None and (not text or text.isspace() or without_text(document.fields)):
      reason = "empty"
    if reason is not None:
      dropped.add(f"{step.name}: {reason}", document.source, _beginning(before))
      return None
    if text != before:
      changed = self.changed.setdefault(step.name, [0, 0])
      changed[0] += 1
      changed[1] += len(before) - len(text)
      document = document._replace(text=text, html=document.html and not step.pages)
    return document


def _beginning(text: str) -> str:
  """The first characters of a text, quoted, for an account."""
  line = " ".join(text[:200].split())
  return repr(line if len(line) <= 60 else f"{line[:57]}…")


# Fields that are names or, as the JSON schemas of tools, code.
_NAMES = (*LABELS, "id", "role", "from", "type", "name", "tool_call_id", "tools")


def _map_fields(run: CleanText, value: Any, key: str | None = None) -> Any:
  """Cleans all strings of a field, except those of `_NAMES`."""
  if key in _NAMES:
    return value
  if isinstance(value, str):
    return run(value)[0] or ""
  if isinstance(value, dict):
    return {k: _map_fields(run, v, k) for k, v in value.items()}
  return [_map_fields(run, v, key) for v in value] if isinstance(value, list | tuple) else value


class _Step(NamedTuple):
  name: str
  run: CleanText
  rewrites: bool  # see `CleaningStep`
  pages: bool  # skip documents that are not HTML pages


def _build(spec: str) -> _Step:
  name, options = step_specs.parse(spec, "--clean", step_specs.defaults(clean_steps.STEPS))
  step = clean_steps.STEPS[name]
  pages = options.pop("pages_only", False)
  return _Step(name, step.build(spec, **options), step.rewrites, pages)
