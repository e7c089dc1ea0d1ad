"""Vocabularies without a tokenizer.json: their export gives the original's ids, or none at all."""

import base64
import io
import json
import re

import numpy as np
import pytest
import sentencepiece

from jaxgpt.hf import tokenizer as hf_tokenizer
from jaxgpt.text.tokenizers import sentencepiece as pieces
from jaxgpt.text.tokenizers import tiktoken as tiktoken_lib

tokenizers = pytest.importorskip("tokenizers")

TEXT = "The cat sat on the mat; naïve façade 東京都 привет 12 1234567 it's they're def f(x): return"
WORDS = re.split(" ", TEXT)
LINES = [" ".join(np.random.default_rng(i).choice(WORDS, 30)) for i in range(200)]
PLAIN = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
MODELS = {  # as the families' own .model files are
  "llama": dict(model_type="bpe", vocab_size=340, byte_fallback=True, **PLAIN),
  "gemma": dict(
    model_type="bpe",
    vocab_size=350,
    byte_fallback=True,
    add_dummy_prefix=False,
    user_defined_symbols=["<start_of_turn>", "▁▁", "▁▁▁▁", "\n\n"],
    **PLAIN,
  ),
  "t5": dict(model_type="unigram", vocab_size=60),
  "folding": dict(model_type="bpe", vocab_size=60, normalization_rule_name="nmt_nfkc_cf"),
  "unigram": dict(model_type="unigram", vocab_size=60, normalization_rule_name="identity"),
}


def sentencepiece_model(**options):
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES), model_writer=out, minloglevel=2, **options
  )
  return pieces.SentencePieceTokenizer(out.getvalue())


def random_texts(letters, count=300, length=60):
  rng = np.random.default_rng(7)
  return ["".join(rng.choice(list(letters), length)) for _ in range(count)]


def exported(ours):
  files, why = hf_tokenizer.files(ours, 64)
  assert why == ""
  return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())


@pytest.mark.parametrize("name", MODELS)
def test_a_bare_sentencepiece_model_keeps_its_ids(name):
  ours = sentencepiece_model(**MODELS[name])
  theirs = exported(ours)
  for text in (*random_texts("the cat sat\n  12'é東京A"), *LINES[:20], "", " ", "   a  b "):
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False).ids == ids, text
    if ours.unk_id not in ids:  # SentencePiece writes its unknown token as ⁇
      assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)


def test_a_model_that_cannot_be_exact_is_not_written():
  ours = sentencepiece_model(model_type="bpe", vocab_size=60, treat_whitespace_as_suffix=True)
  files, why = hf_tokenizer.files(ours, 64)
  assert not files and "would not be exact: it splits" in why


# Patterns of published vocabularies: GPT-4's has possessive repetitions.
PATTERNS = (
  r"\s?\w+|[^\w\s]+|\s+",
  r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
  r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_bare_tiktoken_vocabulary_keeps_its_ids(pattern):
  """Learned from noise, so that most tokens can be merged from several pairs."""
  pytest.importorskip("tiktoken")
  from tiktoken import _educational

  text = "\n".join(LINES[:30]) + "".join(random_texts("abc 012\n", 40))
  ranks = _educational.bpe_train(text, 420, pattern, visualise=None)
  lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
  settings = {"pattern": pattern, "special_tokens": {"<|endoftext|>": len(ranks)}}
  ours = tiktoken_lib.TiktokenTokenizer(lines.encode(), json.dumps(settings).encode())
  theirs = exported(ours)
  for text in (*random_texts("abc 012\n"), *random_texts("ab"), *LINES[:20], " " * 99):
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text
