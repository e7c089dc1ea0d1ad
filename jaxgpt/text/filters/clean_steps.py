"""The built-in cleaning steps. To add one, write its build function and add an entry to `STEPS`.

A step is repeatable: it keeps nothing from one document to the next, so that neither the order of
the documents nor the number of processes changes a result. The quality heuristics are datatrove's
(https://github.com/huggingface/datatrove), called one text at a time.
"""

import contextlib
import os
import signal
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError, optional
from jaxgpt.text.filters import datatrove_blocks
from jaxgpt.text.filters import words as words_of
from jaxgpt.text.filters.datatrove_blocks import CleanText
from jaxgpt.text.filters.step_specs import Option


class CleaningStep(NamedTuple):
  """A cleaning step.

  Attributes:
    build: (spec, **options) -> the function that cleans a text. The spec is for error messages.
    options: The options that users may set.
    summary: One line for the documentation.
    rewrites: It only rewrites texts and never drops one, so it also cleans the fields of labelled
      documents.
  """

  build: Callable[..., CleanText]
  options: Mapping[str, Option]
  summary: str
  rewrites: bool = False


STEPS: Registry[CleaningStep] = Registry("--clean")


def _unicode(spec: str, *, form: str) -> CleanText:
  if form not in ("NFC", "NFD", "NFKC", "NFKD"):
    raise UserError(f"--clean={spec}: form={form!r}; choose one of NFC, NFD, NFKC, NFKD")
  normalize: Any = unicodedata.normalize  # its type wants a literal; `form` was checked above
  return lambda text: (normalize(form, text), None)


def _length(
  spec: str, *, min_chars: int, max_chars: int, min_words: int, max_words: int
) -> CleanText:
  del spec

  def run(text: str) -> tuple[str, str | None]:
    if len(text) < min_chars:
      return text, "too few characters"
    if max_chars and len(text) > max_chars:
      return text, "too many characters"
    count = len(words_of.plain_words(text)) if min_words or max_words else 0
    if count < min_words:
      return text, "too few words"
    return text, "too many words" if max_words and count > max_words else None

  return run


def _repeated_lines(spec: str, *, min_chars: int) -> CleanText:
  del spec

  def run(text: str) -> tuple[str, str | None]:
    seen, kept = set(), []
    for line in text.splitlines(keepends=True):
      key = line.strip()
      if len(key) < min_chars or key not in seen:
        kept.append(line)
        seen.add(key)
    return "".join(kept), None

  return run


def _ftfy(spec: str, **options: Any) -> CleanText:
  optional("ftfy", datatrove_blocks.EXTRA, f"--clean={spec}")
  block = datatrove_blocks.module("pipeline.formatters.ftfy").FTFYFormatter(**options)
  return lambda text: (block.format(text), None)


def _pii(spec: str, **options: Any) -> CleanText:
  del spec
  block = datatrove_blocks.module("pipeline.formatters.pii").PIIFormatter(**options)

  def run(text: str) -> tuple[str, str | None]:
    # The block cycles through its replacements across texts: restart the cycle for each text.
    block.emails_replacer._replace_i = block.ip_replacer._replace_i = 0
    return block.format(text), None

  return run


def _html(spec: str, *, timeout: float, favour_precision: bool) -> CleanText:
  optional("trafilatura", datatrove_blocks.EXTRA, f"--clean={spec}")
  # `deduplicate` would remember paragraphs of other documents.
  block = datatrove_blocks.module("pipeline.extractors.trafilatura").Trafilatura(
    favour_precision=favour_precision, deduplicate=False
  )

  def run(text: str) -> tuple[str, str | None]:
    try:
      with _deadline(timeout):
        extracted = block.extract(text)
    except _TimeUp:
      return text, "timeout"
    return (extracted, None) if extracted else (text, "no text found")

  return run


class _TimeUp(BaseException):
  """Not an Exception: trafilatura would catch it."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
  """Raises _TimeUp in the block after some seconds (0: never).

  datatrove runs each extraction in its own process to be able to stop it, which costs more than the
  extraction. The signal of a timer suffices for code that is mostly Python. Without such signals
  (on Windows, or outside the main thread) there is no limit.
  """
  if (
    not seconds
    or not hasattr(signal, "setitimer")
    or threading.current_thread() is not threading.main_thread()
  ):
    yield
    return

  def time_up(*_: object) -> None:
    raise _TimeUp

  before = signal.signal(signal.SIGALRM, time_up)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _language(spec: str, *, model: str, keep: tuple[str, ...], threshold: float) -> CleanText:
  if not os.path.isfile(model):
    raise UserError(
      f"--clean={spec}: model={model!r} is no file; name a fastText model such as "
      "lid.176.bin, which this package does not contain"
    )
  if not keep:
    raise UserError(f"--clean={spec}: name the languages to keep, as in keep=en;de")
  fasttext = optional("fasttext.FastText", datatrove_blocks.EXTRA, f"--clean={spec}")
  lid = datatrove_blocks.module("utils.lid").FastTextLID(list(keep))
  try:
    lid._model = fasttext._FastText(model)
  except ValueError as e:
    raise UserError(f"--clean={spec}: model={model!r} is no fastText model ({e})") from e
  Document = datatrove_blocks.module("data").Document

  def run(text: str) -> tuple[str, str | None]:
    (best, _), scores = lid.predict(Document(text=text, id=""))
    return text, None if any(s >= threshold for s in scores.values()) else str(best)

  return run


_C4 = {
  "filter_no_terminal_punct": Option(True, "drop lines without a final punctuation mark"),
  "min_num_sentences": Option(5, "fewest sentences of a text"),
  "min_words_per_line": Option(3, "drop lines with fewer words"),
  "max_word_length": Option(1000, "drop lines with a longer word, in characters"),
  "filter_lorem_ipsum": Option(True, "drop texts with 'lorem ipsum'"),
  "filter_javascript": Option(True, "drop lines that mention JavaScript"),
  "filter_curly_bracket": Option(True, "drop texts with a curly bracket"),
  "filter_policy": Option(True, "drop lines about cookies and terms of use"),
  "remove_citations": Option(True, "remove citation marks such as [1]"),
}
_OF_TEXTS = ("min_num_sentences", "filter_lorem_ipsum", "filter_curly_bracket")

# An option of a quality filter that is 0 or -1 turns the rule off, as in datatrove.
STEPS.add(
  "ftfy",
  CleaningStep(
    _ftfy,
    {
      "fix_latin_ligatures": Option(False, "write ligatures as letters"),
      "fix_character_width": Option(False, "write full-width characters in normal width"),
      "uncurl_quotes": Option(False, "make quotation marks straight"),
      "fix_line_breaks": Option(False, "write all line breaks as newlines"),
    },
    "repair mojibake and other encoding mistakes",
    rewrites=True,
  ),
)
STEPS.add(
  "unicode",
  CleaningStep(
    _unicode,
    {"form": Option("NFC", "NFC, NFD, NFKC or NFKD")},
    "Unicode normalization",
    rewrites=True,
  ),
)
STEPS.add(
  "html",
  CleaningStep(
    _html,
    {
      "pages_only": Option(True, "leave documents alone that are not HTML pages"),
      "timeout": Option(30.0, "seconds per page; 0: no limit"),
      "favour_precision": Option(True, "prefer less text over wrong text"),
    },
    "extract the main text of HTML pages (trafilatura)",
  ),
)
STEPS.add(
  "pii",
  CleaningStep(
    _pii,
    {
      "remove_emails": Option(True, "replace e-mail addresses"),
      "remove_ips": Option(True, "replace IP addresses"),
      "only_remove_public_ips": Option(True, "keep private IP addresses"),
      "email_replacement": Option(("email@example.com",), "replacements, used in turn"),
      "ip_replacement": Option(("22.214.171.124",), "replacements, used in turn"),
    },
    "replace e-mail and IP addresses",
    rewrites=True,
  ),
)
STEPS.add(
  "repeated_lines",
  CleaningStep(
    _repeated_lines,
    {"min_chars": Option(30, "shorter lines may repeat")},
    "remove lines that the text contains already",
    rewrites=True,
  ),
)
STEPS.add(
  "c4_lines",
  CleaningStep(
    datatrove_blocks.quality_filter(
      "c4_filters",
      "C4QualityFilter",
      min_num_sentences=-1,
      filter_lorem_ipsum=False,
      filter_curly_bracket=False,
    ),
    {key: option for key, option in _C4.items() if key not in _OF_TEXTS},
    "drop lines by the rules of C4 (arXiv:1910.10683)",
  ),
)
STEPS.add(
  "c4_quality",
  CleaningStep(
    datatrove_blocks.quality_filter("c4_filters", "C4QualityFilter"),
    _C4,
    "drop lines and texts by the rules of C4 (arXiv:1910.10683)",
  ),
)
STEPS.add(
  "gopher_quality",
  CleaningStep(
    datatrove_blocks.quality_filter("gopher_quality_filter", "GopherQualityFilter"),
    {
      "min_doc_words": Option(50, "fewest words"),
      "max_doc_words": Option(100_000, "most words"),
      "min_avg_word_length": Option(3.0, "smallest mean word length, in characters"),
      "max_avg_word_length": Option(10.0, "largest mean word length, in characters"),
      "max_symbol_word_ratio": Option(0.1, "most '#' or '...' per word"),
      "max_bullet_lines_ratio": Option(0.9, "largest share of lines that start with a bullet"),
      "max_ellipsis_lines_ratio": Option(0.3, "largest share of lines that end with an ellipsis"),
      "max_non_alpha_words_ratio": Option(0.8, "smallest share of words with a letter"),
      "min_stop_words": Option(2, "fewest stop words"),
      "stop_words": Option(
        ("the", "be", "to", "of", "and", "that", "have", "with"), "the stop words"
      ),
    },
    "drop texts by the quality rules of Gopher (arXiv:2112.11446)",
  ),
)
STEPS.add(
  "gopher_repetition",
  CleaningStep(
    datatrove_blocks.quality_filter("gopher_repetition_filter", "GopherRepetitionFilter"),
    {
      "dup_line_frac": Option(0.3, "largest share of repeated lines"),
      "dup_para_frac": Option(0.3, "largest share of repeated paragraphs"),
      "dup_line_char_frac": Option(0.2, "largest share of characters in repeated lines"),
      "dup_para_char_frac": Option(0.2, "largest share of characters in repeated paragraphs"),
    },
    "drop texts that repeat themselves by the rules of Gopher (arXiv:2112.11446)",
  ),
)
STEPS.add(
  "fineweb_quality",
  CleaningStep(
    datatrove_blocks.quality_filter("fineweb_quality_filter", "FineWebQualityFilter"),
    {
      "line_punct_thr": Option(0.12, "smallest share of lines that end with punctuation"),
      "line_punct_exclude_zero": Option(False, "keep texts without any such line"),
      "short_line_thr": Option(0.67, "largest share of short lines"),
      "short_line_length": Option(30, "length of a short line, in characters"),
      "char_duplicates_ratio": Option(0.01, "largest share of characters in repeated lines"),
      "new_line_ratio": Option(0.3, "most newlines per word"),
    },
    "drop texts by the rules of FineWeb (arXiv:2406.17557)",
  ),
)
STEPS.add(
  "language",
  CleaningStep(
    _language,
    {
      "model": Option("", "a fastText language identification model, such as lid.176.bin"),
      "keep": Option((), "language codes to keep, such as en;de"),
      "threshold": Option(0.65, "smallest score of a kept language"),
    },
    "keep texts in some languages (fastText)",
  ),
)
STEPS.add(
  "length",
  CleaningStep(
    _length,
    {
      "min_chars": Option(0, "fewest characters"),
      "max_chars": Option(0, "most characters; 0: no limit"),
      "min_words": Option(0, "fewest words"),
      "max_words": Option(0, "most words; 0: no limit"),
    },
    "drop texts that are too short or too long",
  ),
)
