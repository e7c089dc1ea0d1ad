"""datatrove's blocks, with the same words on every machine and no state between documents."""

import functools
import types
from collections.abc import Callable
from typing import Any, TypeAlias

from jaxgpt import errors
from jaxgpt.text.filters import words as words_of

EXTRA = "data"  # the extra that installs datatrove

# text -> (cleaned text, None), or (text, reason to drop it)
CleanText: TypeAlias = Callable[[str], tuple[str, str | None]]


def module(name: str) -> types.ModuleType:
  """Imports a module of datatrove and silences its log.

  Raises:
    UserError: datatrove is not installed. The message names the extra.
  """
  found = errors.optional(f"datatrove.{name}", EXTRA, "this step")
  errors.optional("loguru", EXTRA, "this step").logger.disable("datatrove")
  return found


@functools.cache
def word_tokenizer() -> Any:
  """Our `words` as the `language` argument of datatrove's blocks.

  By default, datatrove would download spaCy or Stanza models of the language.
  """

  class Words(module("utils.word_tokenizers").WordTokenizer):  # type: ignore[misc]  # optional
    def word_tokenize(self, text: str) -> list[str]:
      return words_of.words(text)

    def sent_tokenize(self, text: str) -> list[str]:
      return [text[a:b] for a, b in words_of.sentence_spans(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
      return words_of.sentence_spans(text)

  return Words()


def quality_filter(module_name: str, class_name: str, **fixed: Any) -> Callable[..., CleanText]:
  """Makes the `build` function of a cleaning step from one of datatrove's filters.

  Args:
    module_name: Its module below datatrove.pipeline.filters.
    class_name: Its class.
    **fixed: Arguments of the class that users don't set.
  """

  def build(spec: str, **options: Any) -> CleanText:
    del spec
    Document = module("data").Document
    block = getattr(module(f"pipeline.filters.{module_name}"), class_name)(
      **options, **fixed, language=word_tokenizer()
    )

    def run(text: str) -> tuple[str, str | None]:
      document = Document(text=text, id="")
      result = block.filter(document)
      keep, reason = result if isinstance(result, tuple) else (result, None)
      return document.text, None if keep else reason or "dropped"

    return run

  return build
