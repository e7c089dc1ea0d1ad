"""Added tokens beyond a model's embedding."""

import json

import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import base, huggingface, tokenizer

tokenizers = pytest.importorskip("tokenizers")


def with_added(*names, special=True):
  """A tokenizer of 4 words and </s>, with added tokens from id 5 on."""
  words = {"a": 0, "b": 1, "c": 2, "[UNK]": 3, "</s>": 4}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.add_special_tokens(["</s>"])
  inner.add_tokens([tokenizers.AddedToken(name, special=special) for name in names])
  files = {
    huggingface.MODEL: inner.to_str().encode(),
    base.CONFIG: json.dumps({"eos_token": "</s>"}).encode(),
  }
  return huggingface.HuggingFaceTokenizer(files)


def test_added_tokens_may_have_no_row():
  """As Gemma 3's <image_soft_token>: 262,145 ids for 262,144 rows."""
  t = with_added("<image>", "<audio>")
  assert t.ids_beyond(7) == {} and t.ids_beyond(6) == {"<audio>": 6}
  assert t.ids_beyond(5) == {"<image>": 5, "<audio>": 6}
  t.check_rows(t.encode("a b <image> c"), 5)  # text is text
  with pytest.raises(UserError, match=r"'<image>' \(id 5\), .*model.vocab_size=5\); remove it"):
    t.check_rows(t.encode("a b <image> c", specials=True), 5)


def test_words_and_the_end_need_rows():
  t = with_added("<image>")
  for rows in (4, 2):
    with pytest.raises(UserError, match=f"the tokenizer has 6 ids, the model {rows} rows"):
      t.ids_beyond(rows)
  assert with_added("plain", special=False).ids_beyond(5) == {"plain": 5}
  with pytest.raises(UserError):
    tokenizer.ByteTokenizer().ids_beyond(200)
