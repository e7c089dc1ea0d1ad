"""Texts of a prescribed form: JSON of a schema, a regular expression, one of several choices.

The library llguidance tells which tokens may follow. A row's text is checked token by token:

    prompt ──> mask of the tokens that may come first ──> draw ──> mask after it ──> …
               ends may come only where the text is complete

W words of 32 tokens.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.inference.engine.requests import CHOICE, JSON, REGEX, Constraint
from jaxgpt.text.tokenizers import base, token_bytes

_KEPT = 64  # grammars
_SHOWN = 300  # characters of the library's message
# No white space but at most a space after a comma or a colon: a model may write it without end.
_JSON_OPTIONS: Any = {
  "whitespace_flexible": False,
  "item_separator": ", ?",
  "key_separator": ": ?",
}


class Matcher:
  """The place of a text in a grammar."""

  def __init__(self, grammars: "Grammars", matcher: Any):
    """Args: grammars: Where it comes from. matcher: An `llguidance.LLMatcher`."""
    self._grammars, self._matcher = grammars, matcher

  def mask(self) -> np.ndarray:
    """The tokens that may follow, as bits: uint32 [W]. Bit i of word w is token 32 w + i.

    Raises:
      UserError: None may, or the library gives up.
    """
    ends = self._grammars.ends
    mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32) & ~self._grammars.never
    if self._matcher.is_accepting():
      mask |= ends
    else:
      mask &= ~ends
    if self._matcher.is_error():
      raise UserError(f"the text's form: {self._matcher.get_error()[:_SHOWN]}")
    if not mask.any():
      raise UserError("the text's form: no token of the vocabulary goes on with it")
    return mask

  def take(self, token: int) -> None:
    """Advances by a token that the mask allows."""
    self._matcher.consume_token(token)

  @property
  def is_complete(self) -> bool:
    """Whether nothing can follow."""
    return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class Grammars:
  """The grammars of a tokenizer's texts. May be used from several threads.

  Attributes:
    never: uint32 [W], special tokens and ids without a token.
    ends: uint32 [W], tokens that end a text.
  """

  def __init__(self, tokenizer: base.Tokenizer, ends: Collection[int]):
    """Prepares for a tokenizer. `ends` are the tokens that end a text."""
    self._tokenizer, self._ends = tokenizer, ends
    self._lock, self._reading = threading.Lock(), threading.Lock()
    self._vocabulary: Any = None
    self._found: OrderedDict[Constraint, Any] = OrderedDict()

  @property
  def num_words(self) -> int:
    """W."""
    return -(-self._tokenizer.vocab_size // 32)

  def matcher(self, constraint: Constraint) -> Matcher:
    """A matcher at the beginning of a text.

    Raises:
      UserError: The constraint is faulty, or llguidance is not installed.
    """
    with self._lock:
      found = self._found.get(constraint)
    if found is None:  # may take a second, for which no other thread waits
      found = self._made(constraint)
    with self._lock:
      self._found[constraint] = found
      self._found.move_to_end(constraint)
      if len(self._found) > _KEPT:
        self._found.popitem(last=False)
      return Matcher(self, found.deep_copy())

  def _made(self, constraint: Constraint) -> Any:
    try:
      import llguidance
    except ImportError as e:
      raise UserError(
        "a prescribed form of the text needs llguidance: pip install 'jaxgpt[guided]'"
      ) from e
    with self._reading:
      if self._vocabulary is None:
        self._vocabulary = self._read(llguidance)
    grammar = _grammar(llguidance.LLMatcher, constraint)
    made = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
    if made.is_error():
      message = " ".join(made.get_error().split())[:_SHOWN]
      raise UserError(f"{constraint.kind}: {message}; correct it")
    return made

  def _read(self, llguidance: Any) -> Any:
    """The vocabulary as the library has it."""
    tokens = token_bytes.of(self._tokenizer)
    self.never = _bits([i for i, data in enumerate(tokens) if not data], self.num_words)
    self.ends = _bits([i for i in self._ends if i < len(tokens)], self.num_words)
    vocabulary = _Vocabulary(tokens, self._tokenizer)
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))


class _Vocabulary:
  """A tokenizer with the attributes that llguidance reads."""

  def __init__(self, tokens: list[bytes], tokenizer: base.Tokenizer):
    self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
    self.special_token_ids = [i for i, data in enumerate(tokens) if not data]
    names = {i: name for name, i in tokenizer.special_ids.items()}
    # It tells tokens apart by their bytes. 0xFF is no byte of UTF-8, and marks special ones.
    self.tokens = [
      data or b"\xff" + names.get(i, f"[{i}]").encode() for i, data in enumerate(tokens)
    ]
    self._tokenizer = tokenizer

  def __call__(self, text: str | bytes) -> list[int]:
    return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)


def _bits(ids: Collection[int], num_words: int) -> np.ndarray:
  flags = np.zeros(32 * num_words, bool)
  flags[list(ids)] = True
  return np.packbits(flags, bitorder="little").view("<u4")


def _grammar(matcher: Any, constraint: Constraint) -> str:
  """The grammar of a constraint in llguidance's form.

  Raises:
    UserError: The schema is not JSON.
  """
  if constraint.kind == REGEX:
    return matcher.grammar_from_regex(constraint.value)
  if constraint.kind == CHOICE:
    choices = " | ".join(map(json.dumps, json.loads(constraint.value)))
    return matcher.grammar_from_lark(f"start: {choices}")
  try:
    return matcher.grammar_from_json_schema(constraint.value, defaults=_JSON_OPTIONS)
  except ValueError as e:
    raise UserError(f'{JSON}: {e}; give a JSON schema, such as {{"type": "object"}}') from e
