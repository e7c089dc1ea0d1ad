"""Cached words give the tokens that the model gives for the whole text."""

import itertools
import pathlib
import random
import sys

import numpy as np
import pytest

from jaxgpt.text.tokenizers import word_cache
from jaxgpt.text.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

TEXT = pathlib.Path(word_cache.__file__).read_text(encoding="utf-8")
ODD = [
  "",
  " ",
  "   ",
  "a",
  " a",
  "a ",
  "a  b",
  "\n\n  x",
  "\t x\u00a0 y",
  "δέ \u0301x",
  "▁ a▁b",
  "x" * 99,
  "<|user|> </s> <mask>",
  "é " * 50,
  "\x00 \x00",
  "🙂 🙂🙂",
]


@pytest.fixture(scope="module", params=["bpe", "unigram", "char"])
def model(request):
  return train_sentencepiece([TEXT], vocab_size=450, model_type=request.param)


def same(got, want):
  return len(got) == len(want) and all(np.array_equal(a, b) for a, b in zip(got, want))


def texts():
  draw = random.Random(0)
  cuts = sorted(draw.sample(range(len(TEXT)), 40))
  return ODD + [TEXT[a:b] for a, b in itertools.pairwise(cuts)] + ODD


def test_words_that_were_met_before_change_nothing(model, monkeypatch):
  plain = SentencePieceTokenizer(model._model)
  plain._words = None
  want = plain.encode_batch(texts())
  assert same(model.encode_batch(texts()), want)
  assert same(model.encode_batch(texts()), want)
  assert all(ids.dtype == np.int32 for ids in model.encode_batch(["a b", ""]))


@pytest.mark.parametrize("most", [0, 1, 20])
def test_what_does_not_fit_is_forgotten(monkeypatch, most):
  monkeypatch.setattr(word_cache, "_MOST", most)
  cache = word_cache.WordCache(lambda words: [[ord(c) for c in word] for word in words])
  for _ in range(3):
    for text in texts():
      assert cache([text])[0].tolist() == [ord(c) for c in text]
    assert len(cache._numbers) == most
    assert all(len(word) <= word_cache._LONGEST for word in cache._numbers)


def test_its_size_does_not_depend_on_what_is_forgotten(monkeypatch):
  monkeypatch.setattr(word_cache, "_MOST", 1000)
  cache = word_cache.WordCache(lambda words: [[ord(c) for c in word] for word in words])
  sizes = set()
  for start in range(0, 20_000, 100):
    cache([" ".join(map(str, range(start, start + 100)))])
    if start >= 1000:
      sizes.add((sys.getsizeof(cache._numbers), len(cache._numbers.others), len(cache._pool)))
  assert len(sizes) == 1, sizes


@pytest.mark.parametrize("model_type, cut", [("bpe", True), ("unigram", False)])
def test_only_models_that_may_be_cut_are(model_type, cut):
  model = train_sentencepiece([TEXT], vocab_size=450, model_type=model_type)
  assert (model._words is not None) == cut


def test_a_symbol_with_a_space_in_it_turns_it_off():
  assert train_sentencepiece([TEXT], vocab_size=450)._words is not None
  symbols = train_sentencepiece([TEXT], vocab_size=450, symbols=("new york",))
  assert symbols._words is None
