"""Cleaning: named steps that change a text or drop its document.

A step is a row of `STEPS`; users write it as NAME or NAME:key=value,key=value. The heuristics are
datatrove's blocks, called a text at a time with what makes them repeatable: words and sentences
come from `words` (datatrove would ask for a language's spaCy or Stanza models), and no block keeps
anything from one document to the next, so that neither the order of the documents nor the number
of processes changes a result.
"""

import contextlib
import functools
import os
import signal
import threading
import unicodedata
from typing import NamedTuple

from jaxgpt import errors
from jaxgpt.errors import UserError
from jaxgpt.text.filters import step_specs
from jaxgpt.text.filters import words as words_of

EXTRA = "data"  # the extra that installs datatrove


def make(given):
  """The cleaner that a list of specs stands for.

  Args:
    given: strings such as 'ftfy' or 'length:min_chars=200', carried out in this order; a step may
      come twice.

  Returns:
    A `Cleaner`; without specs it passes documents on as they are.

  Raises:
    UserError: an unknown step or key, a bad value, or a missing extra.
  """
  return Cleaner(given)


class Cleaner:
  """Steps in order, as `make` builds them. It pickles as its specs.

  Attributes:
    specs: the strings it was made from, as a tuple.
    changed: {step: [documents it changed, characters it took away (net)]}, of the documents seen
      so far by this object. It isn't pickled: a process that cleans hands its own back.
  """

  def __init__(self, given):
    self.specs = tuple(given)
    self._steps = [_build(spec) for spec in self.specs]
    self.changed = {}

  def __reduce__(self):
    return Cleaner, (self.specs,)

  def __call__(self, documents, dropped):
    """Cleans documents, one at a time.

    Args:
      documents: an iterable of `read.Document`.
      dropped: a `read.Dropped`. What a step drops is counted there under 'STEP: reason', a
        document on which a step fails under 'STEP: error', and one of which a step leaves nothing
        but white space under 'STEP: empty'.

    Returns:
      An iterator of the documents that are kept, in order, their texts cleaned. In documents with
      `fields` the strings there are cleaned by the steps that only rewrite texts, but for `label`
      and the role of a message; steps that judge look at `text`.
    """
    for document in documents:
      for step in self._steps:
        document = self._apply(step, document, dropped)
        if document is None:
          break
      else:
        yield document

  def _apply(self, step, document, dropped):
    """The document after one step, or None where it was dropped."""
    if step.pages and not document.html:
      return document
    before = document.text
    try:
      text, reason = step.run(before)
      if document.fields and reason is None:
        text = text if step.rewrites else before
        fields = _map_fields(step.run, document.fields) if step.rewrites else document.fields
        document = document._replace(fields=fields)
      text.encode()  # what is stored must have a UTF-8 form
    except Exception as e:  # whatever a library stumbles over is no reason to end the run
      dropped.add(f"{step.name}: error", document.source, f"{type(e).__name__}: {e}"[:200])
      return None
    if reason is None and (not text or text.isspace()):
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


def _beginning(text):
  line = " ".join(text[:200].split())
  return repr(line if len(line) <= 60 else f"{line[:57]}…")


def _map_fields(run, value, key=None):
  if isinstance(value, str):
    return value if key in ("label", "id", "role", "from") else run(value)[0] or ""
  if isinstance(value, dict):
    return {k: _map_fields(run, v, k) for k, v in value.items()}
  return [_map_fields(run, v, key) for v in value] if isinstance(value, list | tuple) else value


class _Step(NamedTuple):
  name: str
  run: object  # text -> (text, None) or (text, the reason to drop it)
  rewrites: bool  # it never judges: what it does to a text it may do to any
  pages: bool  # it leaves alone what is no HTML page


class _Row(NamedTuple):
  build: object  # (spec, **options) -> run
  defaults: dict
  rewrites: bool = False


def _build(spec):
  name, options = step_specs.parse(
    spec, "--clean", {name: row.defaults for name, row in STEPS.items()}
  )
  row = STEPS[name]
  pages = options.pop("pages_only", False)
  return _Step(name, row.build(spec, **options), row.rewrites, pages)


def datatrove(module):
  """A module of datatrove, quiet, or a UserError that names the extra."""
  found = errors.optional(f"datatrove.{module}", EXTRA, "this step")
  errors.optional("loguru", EXTRA, "this step").logger.disable("datatrove")
  return found


@functools.cache
def word_tokenizer():
  """`words` in the form that datatrove's blocks take as their `language`."""

  class Words(datatrove("utils.word_tokenizers").WordTokenizer):
    def word_tokenize(self, text):
      return words_of.words(text)

    def sent_tokenize(self, text):
      return [text[a:b] for a, b in words_of.sentence_spans(text)]

    def span_tokenize(self, text):
      return words_of.sentence_spans(text)

  return Words()


def _unicode(spec, *, form):
  if form not in ("NFC", "NFD", "NFKC", "NFKD"):
    raise UserError(f"--clean={spec}: form={form!r}; choose from NFC, NFD, NFKC, NFKD")
  return lambda text: (unicodedata.normalize(form, text), None)


def _length(spec, *, min_chars, max_chars, min_words, max_words):
  del spec

  def run(text):
    if len(text) < min_chars:
      return text, "too few characters"
    if max_chars and len(text) > max_chars:
      return text, "too many characters"
    count = len(words_of.plain_words(text)) if min_words or max_words else 0
    if count < min_words:
      return text, "too few words"
    return text, "too many words" if max_words and count > max_words else None

  return run


def _repeated_lines(spec, *, min_chars):
  del spec

  def run(text):
    seen, kept = set(), []
    for line in text.splitlines(keepends=True):
      key = line.strip()
      if len(key) < min_chars or key not in seen:
        kept.append(line)
        seen.add(key)
    return "".join(kept), None

  return run


def _ftfy(spec, **options):
  errors.optional("ftfy", EXTRA, f"--clean={spec}")
  block = datatrove("pipeline.formatters.ftfy").FTFYFormatter(**options)
  return lambda text: (block.format(text), None)


def _pii(spec, **options):
  del spec
  block = datatrove("pipeline.formatters.pii").PIIFormatter(**options)

  def run(text):
    # The block goes round its replacements from one text to the next: start each text afresh.
    block.emails_replacer._replace_i = block.ip_replacer._replace_i = 0
    return block.format(text), None

  return run


def _html(spec, *, timeout, favour_precision):
  errors.optional("trafilatura", EXTRA, f"--clean={spec}")
  # Its `deduplicate` remembers paragraphs of other documents.
  block = datatrove("pipeline.extractors.trafilatura").Trafilatura(
    favour_precision=favour_precision, deduplicate=False
  )

  def run(text):
    try:
      with _deadline(timeout):
        extracted = block.extract(text)
    except _TimeUp:
      return text, "timeout"
    return (extracted, None) if extracted else (text, "no text found")

  return run


class _TimeUp(BaseException):
  """No Exception, which trafilatura would catch."""


@contextlib.contextmanager
def _deadline(seconds):
  """Raises _TimeUp in the block after so many seconds (0: never).

  datatrove runs an extraction in a process of its own to be able to stop it; that costs more than
  the extraction. A timer's signal does for code that is mostly Python; where there is none
  (Windows, or not the main thread) there is no limit.
  """
  if (
    not seconds
    or not hasattr(signal, "setitimer")
    or threading.current_thread() is not threading.main_thread()
  ):
    yield
    return

  def time_up(*_):
    raise _TimeUp

  before = signal.signal(signal.SIGALRM, time_up)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _filter(module, name, **fixed):
  """A builder for one of datatrove's filters, with options of it that are fixed."""

  def build(spec, **options):
    del spec
    Document = datatrove("data").Document
    block = getattr(datatrove(f"pipeline.filters.{module}"), name)(
      **options, **fixed, language=word_tokenizer()
    )

    def run(text):
      document = Document(text=text, id="")
      result = block.filter(document)
      keep, reason = result if isinstance(result, tuple) else (result, None)
      return document.text, None if keep else reason or "dropped"

    return run

  return build


def _language(spec, *, model, keep, threshold):
  if not os.path.isfile(model):
    raise UserError(
      f"--clean={spec}: model={model!r} is no file; name a fastText model such as "
      "lid.176.bin, which is not part of this package"
    )
  if not keep:
    raise UserError(f"--clean={spec}: name the languages to keep, as in keep=en;de")
  fasttext = errors.optional("fasttext.FastText", EXTRA, f"--clean={spec}")
  lid = datatrove("utils.lid").FastTextLID(list(keep))
  try:
    lid._model = fasttext._FastText(model)
  except ValueError as e:
    raise UserError(f"--clean={spec}: model={model!r} is no fastText model ({e})") from e
  Document = datatrove("data").Document

  def run(text):
    (best, _), scores = lid.predict(Document(text=text, id=""))
    return text, None if any(s >= threshold for s in scores.values()) else str(best)

  return run


# name -> how it is built, its keys with their defaults (0 or -1: that rule is off, as datatrove
# has it), whether it only rewrites. A new step is a row.
STEPS = {
  "ftfy": _Row(
    _ftfy,
    {
      "fix_latin_ligatures": False,
      "fix_character_width": False,
      "uncurl_quotes": False,
      "fix_line_breaks": False,
    },
    rewrites=True,
  ),
  "unicode": _Row(_unicode, {"form": "NFC"}, rewrites=True),
  "html": _Row(_html, {"pages_only": True, "timeout": 30.0, "favour_precision": True}),
  "pii": _Row(
    _pii,
    {
      "remove_emails": True,
      "remove_ips": True,
      "only_remove_public_ips": True,
      "email_replacement": ("email@example.com",),
      "ip_replacement": ("22.214.171.124",),
    },
    rewrites=True,
  ),
  "repeated_lines": _Row(_repeated_lines, {"min_chars": 30}, rewrites=True),
  "c4_lines": _Row(
    _filter(
      "c4_filters",
      "C4QualityFilter",
      min_num_sentences=-1,
      filter_lorem_ipsum=False,
      filter_curly_bracket=False,
    ),
    {
      "filter_no_terminal_punct": True,
      "min_words_per_line": 3,
      "max_word_length": 1000,
      "filter_javascript": True,
      "filter_policy": True,
      "remove_citations": True,
    },
  ),
  "c4_quality": _Row(
    _filter("c4_filters", "C4QualityFilter"),
    {
      "filter_no_terminal_punct": True,
      "min_num_sentences": 5,
      "min_words_per_line": 3,
      "max_word_length": 1000,
      "filter_lorem_ipsum": True,
      "filter_javascript": True,
      "filter_curly_bracket": True,
      "filter_policy": True,
      "remove_citations": True,
    },
  ),
  "gopher_quality": _Row(
    _filter("gopher_quality_filter", "GopherQualityFilter"),
    {
      "min_doc_words": 50,
      "max_doc_words": 100_000,
      "min_avg_word_length": 3.0,
      "max_avg_word_length": 10.0,
      "max_symbol_word_ratio": 0.1,
      "max_bullet_lines_ratio": 0.9,
      "max_ellipsis_lines_ratio": 0.3,
      "max_non_alpha_words_ratio": 0.8,
      "min_stop_words": 2,
      "stop_words": ("the", "be", "to", "of", "and", "that", "have", "with"),
    },
  ),
  "gopher_repetition": _Row(
    _filter("gopher_repetition_filter", "GopherRepetitionFilter"),
    {
      "dup_line_frac": 0.3,
      "dup_para_frac": 0.3,
      "dup_line_char_frac": 0.2,
      "dup_para_char_frac": 0.2,
    },
  ),
  "fineweb_quality": _Row(
    _filter("fineweb_quality_filter", "FineWebQualityFilter"),
    {
      "line_punct_thr": 0.12,
      "line_punct_exclude_zero": False,
      "short_line_thr": 0.67,
      "short_line_length": 30,
      "char_duplicates_ratio": 0.01,
      "new_line_ratio": 0.3,
    },
  ),
  "language": _Row(_language, {"model": "", "keep": (), "threshold": 0.65}),
  "length": _Row(_length, {"min_chars": 0, "max_chars": 0, "min_words": 0, "max_words": 0}),
}
