"""Bytes of tokens: those of a text's tokens are the text, for every kind of tokenizer."""

import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import base, huggingface, sentencepiece, tiktoken, token_bytes

TEXTS = ["the cat  saw\n\n\tMünchen", ' 1234 {"a": [null]}', "日本 🐈"]


def byte_level():
  tokenizers = pytest.importorskip("tokenizers")
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["</s>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  inner.train_from_iterator(TEXTS * 3, trainer)
  inner.add_tokens(["München"])
  return huggingface.HuggingFaceTokenizer({"tokenizer.json": inner.to_str().encode()})


def with_fallback(decoder=None, normalizer=None):
  """Pieces with a mark for spaces, and bytes for all others, as Llama 2 has them."""
  tokenizers = pytest.importorskip("tokenizers")
  vocab = {"</s>": 0, "<unk>": 1, **{f"<0x{i:02X}>": 2 + i for i in range(256)}}
  for token in ("▁", "t", "h", "e", "▁t", "c", "a"):
    vocab[token] = len(vocab)
  inner = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab, [("▁", "t")], unk_token="<unk>", byte_fallback=True)
  )
  inner.normalizer = normalizer or tokenizers.normalizers.Replace(" ", "▁")
  steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
  inner.decoder = decoder or tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Fuse()])
  inner.add_special_tokens(["</s>", "<unk>"])
  return huggingface.HuggingFaceTokenizer({"tokenizer.json": inner.to_str().encode()})


def pieces():
  return sentencepiece.train_sentencepiece(TEXTS * 20, vocab_size=300)


def ranks():
  pytest.importorskip("tiktoken")
  import base64

  tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" c"]
  lines = b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))
  settings = b'{"pattern": "\\\\s?\\\\S+|\\\\s+", "special_tokens": {"<|endoftext|>": 259}}'
  return tiktoken.TiktokenTokenizer(lines, settings)


@pytest.mark.parametrize("make", [base.ByteTokenizer, byte_level, with_fallback, pieces, ranks])
def test_the_bytes_of_a_text_s_tokens_are_the_text(make):
  tokenizer = make()
  found = token_bytes.of(tokenizer)
  assert len(found) == tokenizer.vocab_size
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert b"".join(found[i] for i in ids).decode() == text
    assert max(len(found[i]) for i in ids) < len(text.encode())
  assert not any(found[i] for i in tokenizer.special_ids.values())


def test_a_token_outside_the_byte_level_alphabet_is_its_own_text():
  tokenizers = pytest.importorskip("tokenizers")
  inner = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, "日 x": 1, "Ġx": 2}, []))
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.add_special_tokens(["</s>"])
  tokenizer = huggingface.HuggingFaceTokenizer({"tokenizer.json": inner.to_str().encode()})
  assert token_bytes.of(tokenizer) == [b"", "日 x".encode(), b" x"]
  assert tokenizer.decode([1, 2]) == "日 x x"


def test_words_without_their_bytes_are_refused():
  tokenizers = pytest.importorskip("tokenizers")
  tokenizer = with_fallback(tokenizers.decoders.WordPiece())
  with pytest.raises(UserError, match="decoder .WordPiece. does not say which bytes"):
    token_bytes.of(tokenizer)
