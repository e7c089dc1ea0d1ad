import base64
import json

import numpy as np
import pytest

from jaxgpt.hf import tokenizer as hf_tokenizer
from jaxgpt.text.tokenizers import chat_template, examples, tiktoken
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib

pytest.importorskip("tokenizers")

TEXT = "The cat sat on the mat; the dog saw two cats, and 12 mats.\n  def f(x): return x\n" * 40


def loaded(folder, tokenizer, template=""):
  transformers = pytest.importorskip("transformers")
  files, why = hf_tokenizer.files(tokenizer, 64, template)
  assert why == ""
  for name, data in files.items():
    (folder / name).write_bytes(data)
  (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
  return transformers.AutoTokenizer.from_pretrained(folder)


def tiktoken_vocabulary():
  words = ["th", "the", "ca", "cat", "at", " c", " ca", " cat", " the", "sa", "sat"]
  tokens = [bytes([b]) for b in range(256)] + [w.encode() for w in words]
  lines = "".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))
  settings = {"pattern": r"\s?\w+|[^\w\s]+|\s+", "special_tokens": {"<|endoftext|>": len(tokens)}}
  return tiktoken.TiktokenTokenizer(lines.encode(), json.dumps(settings).encode())


def make(kind):
  if kind == "bytes":
    return tokenizer_lib.ByteTokenizer()
  if kind == "tiktoken":
    pytest.importorskip("tiktoken")
    return tiktoken_vocabulary()
  size = {"char": 700, "bpe": 360, "unigram": 296}[kind]
  return tokenizer_lib.train_sentencepiece([TEXT], vocab_size=size, model_type=kind)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram", "char", "tiktoken"])
def test_transformers_loads_the_same_tokenizer(kind, tmp_path):
  ours = make(kind)
  theirs = loaded(tmp_path, ours)
  for text in (*hf_tokenizer.PROBES, TEXT):
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.encode(text) == [ours.bos_id, *ids]
    assert theirs.decode(ids) == ours.decode(ids)
  assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
  assert (theirs.mask_token_id, theirs.pad_token_id) == (ours.mask_id, ours.pad_id)


def test_random_texts_agree():
  tokenizers = pytest.importorskip("tokenizers")
  ours = make("bpe")
  inner = tokenizers.Tokenizer.from_str(hf_tokenizer.files(ours, 64)[0]["tokenizer.json"].decode())
  rng = np.random.default_rng(0)
  letters = list("the cat sat on mat\n,  123é東")
  for _ in range(200):
    text = "".join(rng.choice(letters, 40))
    assert inner.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_what_would_not_be_exact_is_not_written():
  ours = make("bytes")
  ours.encode_batch = lambda texts: [np.zeros(1, np.int32) for _ in texts]
  files, why = hf_tokenizer.files(ours, 64)
  assert not files and "would not be exact" in why


@pytest.mark.parametrize("kind", ["bytes", "bpe", "tiktoken"])
@pytest.mark.parametrize("name", ["simple", "raw"])
def test_the_chat_template_that_was_trained_in_is_published(tmp_path, kind, name):
  """transformers then writes the ids of a prompt that the model was trained on."""
  ours = make(kind)
  if kind == "tiktoken" and name == "simple":
    return  # it has no such special tokens
  template = chat_template.load(name, ours)
  theirs = loaded(tmp_path, ours, template.to_jinja())
  talk = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "the  mat?"},
  ]
  pieces = template(talk, generate=True)
  assert theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == "".join(
    p.text for p in pieces
  )
  got = theirs.apply_chat_template(talk[:2], add_generation_prompt=True, return_dict=False)
  assert got == examples.encode_pieces(template(talk[:2], generate=True), ours, False)


def test_the_trained_template_takes_the_place_of_the_tokenizers_own(tmp_path):
  own = {"tokenizer_config.json": b'{"eos_token": "</s>", "chat_template": "old"}'}
  assert hf_tokenizer.with_template(own, "old") == own
  (config,) = hf_tokenizer.with_template(own | {"chat_template.jinja": b"older"}, "new").values()
  assert json.loads(config) == {"eos_token": "</s>", "chat_template": "new"}
