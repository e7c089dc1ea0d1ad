"""A Hugging Face `tokenizer.json`, by the `tokenizers` library."""

import json
import os
import re

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import base

MODEL = "tokenizer.json"
# Beside a tokenizer.json alone, which names no roles: what the families call them, best first.
_ROLES = {
  "bos": ("<|begin_of_text|>", "<bos>", "<s>", "[CLS]", "<|startoftext|>"),
  "eos": ("<|end_of_text|>", "<eos>", "</s>", "[SEP]", "<|endoftext|>", "<|im_end|>"),
  "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
  "mask": ("<mask>", "[MASK]"),
  "unk": ("<unk>", "[UNK]"),
}


class HuggingFaceTokenizer(base.Tokenizer):
  """What `transformers` saves as a fast tokenizer, or its `tokenizer.json` alone.

  The roles of tokens are those that tokenizer_config.json and special_tokens_map.json name; `cls`
  and `sep` stand in for bos and eos (BERT), eos for a bos that there is not (Qwen, T5). Without
  these files the post-processor tells, or the usual names. Whether a text comes back exactly is
  up to the vocabulary: byte-level ones give back any text, BERT's folds case and white space.
  """

  kind = "huggingface"

  def __init__(self, files, name="the tokenizer"):
    """Takes the bytes of the files.

    Args:
      files: {name: bytes}, `MODEL` among them; the others are as in `base.HF_FILES`.
      name: what error messages call it.

    Raises:
      UserError: `tokenizers` is not installed, can't read the file, or no token ends a text.
    """
    try:
      import tokenizers
    except ImportError as e:
      raise UserError(f"{name} needs the tokenizers library: pip install 'jaxgpt[data]'") from e
    try:
      inner = tokenizers.Tokenizer.from_str(files[MODEL].decode())
    except Exception as e:  # the library raises no narrower one
      raise UserError(
        f"{name} is no tokenizer.json that tokenizers {tokenizers.__version__} reads "
        f"({e}); save it anew with transformers, or update tokenizers"
      ) from e
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True  # their names in a text are text
    self._inner, self._files = inner, dict(files)
    self.vocab_size = max(inner.get_vocab().values(), default=-1) + 1
    self.digest = base.files_digest(self._files)
    self.chat_template = base.chat_template(self._files)
    self._set_specials(name)

  def _set_specials(self, name):
    inner = self._inner
    self.special_ids = {
      token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special
    }
    roles = base.role_tokens(self._files)
    frame = {} if roles else _frame(json.loads(self._files[MODEL]).get("post_processor"))

    def pick(role, substitute=None):
      own = [roles.get(role), roles.get(substitute), frame.get(role)]
      names = [token for token in own if token] or ([] if roles else _ROLES[role])
      return next((token for token in names if inner.token_to_id(token) is not None), None)

    tokens = {
      "bos": pick("bos", "cls"),
      "eos": pick("eos", "sep"),
      "pad": pick("pad"),
      "mask": pick("mask"),
      "unk": pick("unk"),
    }
    ids = {role: token and inner.token_to_id(token) for role, token in tokens.items()}
    if ids["eos"] is None and ids["bos"] is None:
      raise UserError(
        f'{name} names no token that ends a text; add an "eos_token" to the '
        f"{base.CONFIG} beside it (its specials: "
        f"{', '.join(list(self.special_ids)[:10]) or 'none'})"
      )
    self.special_ids |= {token: ids[role] for role, token in tokens.items() if token}
    self.bos_id = ids["eos"] if ids["bos"] is None else ids["bos"]
    self.eos_id = ids["bos"] if ids["eos"] is None else ids["eos"]
    self.pad_id, self.mask_id, self.unk_id = ids["pad"], ids["mask"], ids["unk"]
    self._kept_from_text = np.array([i for i in self.special_ids.values() if i != self.unk_id])

  def encode_batch(self, texts):
    encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
    out = [np.array(e.ids, np.int32) for e in encoded]
    for i, ids in enumerate(out):
      if np.isin(ids, self._kept_from_text).any():
        out[i] = self._spelled_out(texts[i])
    return out

  def _spelled_out(self, text):
    """A text whose model knows a special's name as a word, as Unigram ones do: cut within it."""
    names = "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True)))
    parts = [
      part
      for piece in re.split(f"({names})", text)
      for part in ((piece[:1], piece[1:]) if piece in self.special_ids else (piece,))
    ]
    encoded = self._inner.encode_batch_fast(parts, add_special_tokens=False)
    return np.array([i for e in encoded for i in e.ids], np.int32)

  def _decode(self, ids):
    return self._inner.decode(ids.tolist(), skip_special_tokens=False)

  def files(self):
    return dict(self._files)

  def __reduce__(self):
    return HuggingFaceTokenizer, (self._files,)


def _frame(processor):
  """{'bos', 'eos': token} that a post-processor puts around a text."""
  kind = (processor or {}).get("type")
  if kind == "Sequence":
    found = {}
    for inner in processor["processors"]:
      found |= _frame(inner)
    return found
  if kind in ("BertProcessing", "RobertaProcessing"):
    return {"bos": processor["cls"][0], "eos": processor["sep"][0]}
  if kind != "TemplateProcessing":
    return {}
  names = [
    part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in processor["single"]
  ]
  place = names.index(None)
  return ({"bos": names[0]} if place else {}) | (
    {"eos": names[place + 1]} if place + 1 < len(names) else {}
  )


def read(folder):
  """The tokenizer of a folder, or of a tokenizer.json alone.

  Args:
    folder: an `epath.Path`.
  """
  if folder.is_file():
    return HuggingFaceTokenizer({MODEL: folder.read_bytes()}, repr(os.fspath(folder)))
  return HuggingFaceTokenizer(
    base.read_files(folder, (MODEL, *base.HF_FILES)), os.fspath(folder / MODEL)
  )
