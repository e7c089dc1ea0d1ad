"""Text from tokens: whole characters, stop strings, and the same text as when decoded at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.inference.engine.requests import Token
from jaxgpt.inference.engine.text import Text
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.text.tokenizers.base import ByteTokenizer

BYTES = ByteTokenizer()


def pieces(ids, stop=(), tokenizer=BYTES, prompt=()):
  """(texts of the releases, the tokens, whether a stop string ended it)."""
  text, texts, tokens = Text(tokenizer, prompt, stop), [], []
  for i in ids:
    released, stopped = text.add(Token(i, ""))
    texts.append("".join(t.text for t in released))
    tokens += released
    if stopped:
      return texts, tokens, True
  last = text.end()
  return [*texts, "".join(t.text for t in last)], tokens + last, False


def test_a_character_is_released_whole():
  texts, tokens, _ = pieces(BYTES.encode("aé€😀b"))
  assert texts == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
  assert [t.text for t in tokens] == texts[:-1]


def test_bytes_that_are_no_character_are_shown_and_nothing_after_them_is_lost():
  ids = [i + 3 for i in b"a\xffb\xe2\x82c\xc3"]
  assert "".join(pieces(ids)[0]) == b"a\xffb\xe2\x82c\xc3".decode("utf-8", "replace")


@pytest.mark.parametrize(
  "text, stop, want, stopped",
  [
    ("one two", ["two"], "one ", True),
    ("one two", ["tw", "two", "e"], "on", True),
    ("one tw", ["two"], "one tw", False),
    ("aab", ["ab"], "a", True),
    ("ababac", ["abac"], "ab", True),
    ("x\n\ny", ["\n\n"], "x", True),
    ("naïve", ["ïv"], "na", True),
  ],
)
def test_a_text_ends_before_the_first_stop_string(text, stop, want, stopped):
  texts, tokens, ended = pieces(BYTES.encode(text), stop)
  assert ("".join(texts), ended) == (want, stopped)
  assert "".join(t.text for t in tokens) == want


def test_what_may_become_a_stop_string_is_held_back_and_no_more():
  texts, _, _ = pieces(BYTES.encode("abXYcXYZ"), ["XYZ"])
  assert texts == ["a", "b", "", "", "XYc", "", "", ""]


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_add_up_to_the_text_cut_at_the_first_stop_string(text, stop):
  whole = "".join(pieces(BYTES.encode(text), stop)[0])
  found = [text.find(s) for s in stop if s in text]
  # A stop string that ends first wins, so the cut may be later than another one's beginning.
  first = next((n for n in range(len(text) + 1) if any(s in text[:n] for s in stop)), len(text))
  want = text[: min((text[:first].find(s) for s in stop if s in text[:first]), default=len(text))]
  assert whole == want
  assert whole == text if not found else len(whole) <= len(text)


def test_words_of_a_tokenizer_with_spaces_in_front_of_them_keep_their_spaces():
  texts = ["the cat sat on a mat and saw two dogs"] * 20
  tokenizer = tokenizer_lib.train_sentencepiece(texts, vocab_size=290)
  prompt, ids = tokenizer.encode("the cat"), tokenizer.encode("the cat sat on a mat")
  new = ids[len(prompt) :]
  got, tokens, _ = pieces(new, (), tokenizer, prompt)
  assert "".join(got) == tokenizer.continuation(prompt, new) == " sat on a mat"
  assert [t.id for t in tokens] == new
