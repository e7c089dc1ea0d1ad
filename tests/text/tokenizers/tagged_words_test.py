"""Words as tokens: each word has its first token, in every kind of vocabulary."""

import functools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.text.readers.documents import Document
from jaxgpt.text.tokenizers import examples, huggingface, tagged_words, tokenizer
from jaxgpt.text.tokenizers.encoded import Refused
from tests.text.tokenizers import huggingface_test

WORDS = st.lists(
  st.text("abJim09.'</s>é\u0301日東🙂\u200b▁Ġ", min_size=1, max_size=8),
  min_size=1,
  max_size=8,
)


@functools.cache
def inner(name):
  return {
    "bert": huggingface_test.bert,
    "byte_level": lambda: huggingface_test.byte_level(["<|endoftext|>"]),
  }[name]()


@functools.cache
def vocabulary(name):
  """A tokenizer of some kind."""
  if name == "bytes":
    return tokenizer.ByteTokenizer()
  if name == "dummy prefix":
    return huggingface_test.sentencepiece_with_a_dummy_prefix()
  if name == "trained":
    return huggingface_test.trained()
  return huggingface.HuggingFaceTokenizer({"tokenizer.json": inner(name).to_str().encode()}, name)


@pytest.mark.parametrize("name", ["bytes", "byte_level", "trained", "bert", "dummy prefix"])
@settings(max_examples=30, deadline=None)
@example(words=["New York", "</s>", "é", "日本", "a"])
@given(words=WORDS)
def test_the_first_token_of_a_word_covers_its_beginning(name, words):
  t = vocabulary(name)
  (found,) = tagged_words.encode([words], t)
  text = " ".join(words)
  assert found.ids.tolist() == [t.bos_id, *t.encode(text), t.eos_id]
  firsts = found.firsts[found.firsts != tagged_words.NO_TOKEN]
  assert (np.diff(firsts) > 0).all() and len(found.firsts) == len(words)
  if name in ("bert", "dummy prefix"):
    return  # they change characters
  assert len(firsts) == len(words)
  for word, first, end in zip(words, firsts, [*firsts[1:], len(found.ids) - 1]):
    assert t.decode(found.ids[first:end]).strip() == word


@settings(max_examples=30, deadline=None)
@given(words=WORDS)
def test_firsts_are_those_of_the_tokenizers_library(words):
  """BERT's tokens of a word do not depend on the words around it, so both ways agree."""
  t = vocabulary("bert")._inner
  theirs = t.encode(words, is_pretokenized=True)
  (found,) = tagged_words.encode([words], vocabulary("bert"))
  assert found.ids.tolist() == theirs.ids
  of_words = theirs.word_ids
  want = [of_words.index(i) if i in of_words else -1 for i in range(len(words))]
  assert found.firsts.tolist() == want


def tagged(words, tags):
  return Document("a.jsonl:3", " ".join(words), fields={"words": words, "tags": tags})


def test_a_word_without_a_token_is_refused_with_its_document():
  t = vocabulary("bert")
  good, bad = tagged(["a", "b"], ["O", "X"]), tagged(["a", "\u200b\u200d", "c"], ["O", "X", "O"])
  found = examples.encode_batch([good, bad], "tagging", t, label_names=("O", "X"))
  assert found[0][0].tags.tolist() == [[1, 0], [2, 1]]
  assert isinstance(found[1], Refused) and found[1].rule == "unaligned tags"
  assert str(found[1]).startswith("word 2 of 3, ") and "has no token of its own" in str(found[1])


def test_two_words_in_one_token_have_one_of_them_without():
  starts, ends = np.array([0, 2, 4]), np.array([1, 3, 5])  # of the words of 'a b c'
  first = lambda *tokens: tagged_words._first_tokens(starts, ends, *map(np.array, zip(*tokens)))
  assert first((0, 1), (1, 3), (3, 5)).tolist() == [0, 1, 2]
  assert first((0, 3), (3, 5)).tolist() == [0, -1, 1]
  assert first((0, 1), (1, 2), (2, 3), (3, 4)).tolist() == [0, 2, -1]
  assert first((0, 3), (0, 3), (3, 5)).tolist() == [0, 1, 2]  # two tokens of one character


def test_a_tag_that_has_no_number_is_named():
  with pytest.raises(UserError, match="a.jsonl:3: label 'Y' is not one of O, X.*--field tags="):
    examples.encode_batch([tagged(["a"], ["Y"])], "tagging", vocabulary("bytes"), None, ("O", "X"))
