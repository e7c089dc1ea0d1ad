"""Hugging Face tokenizers: a `tokenizer.json`, read by the `tokenizers` library."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import base

MODEL = "tokenizer.json"
# Usual names of the roles, best first, for a tokenizer.json without further files.
_ROLES = {
  "bos": ("<|begin_of_text|>", "<bos>", "<s>", "[CLS]", "<|startoftext|>"),
  "eos": ("<|end_of_text|>", "<eos>", "</s>", "[SEP]", "<|endoftext|>", "<|im_end|>"),
  "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
  "mask": ("<mask>", "[MASK]"),
  "unk": ("<unk>", "[UNK]"),
}


class HuggingFaceTokenizer(base.Tokenizer):
  """A fast tokenizer that `transformers` saved, or its `tokenizer.json` alone.

  tokenizer_config.json and special_tokens_map.json name the roles of tokens. `cls` and `sep` stand
  in for bos and eos (BERT), and eos for a missing bos (Qwen, T5). Without these files, the
  post-processor or the usual names determine the roles. Decoding is exact for byte-level
  vocabularies. Others may fold case and white space (BERT).
  """

  kind = "huggingface"

  def __init__(self, files: Mapping[str, bytes], name: str = "the tokenizer"):
    """Reads the content of the files.

    Args:
      files: {name: content} with `MODEL` and any of `base.HF_FILES`.
      name: Name in error messages.

    Raises:
      UserError: `tokenizers` is not installed or can't read the file, or no token ends a text.
    """
    try:
      import tokenizers
    except ImportError as e:
      raise UserError(f"{name} needs the tokenizers library: pip install 'jaxgpt[data]'") from e
    try:
      inner = tokenizers.Tokenizer.from_str(files[MODEL].decode())
    except Exception as e:  # the library raises no narrower one
      raise UserError(
        f"{name} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads "
        f"({e}); save it again with transformers, or update tokenizers"
      ) from e
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True  # their names in a text are text
    self._inner, self._files = inner, dict(files)
    self.vocab_size = max(inner.get_vocab().values(), default=-1) + 1
    self.digest = base.files_digest(self._files)
    self.chat_template = base.chat_template(self._files)
    self._set_specials(name)

  def _set_specials(self, name: str) -> None:
    inner = self._inner
    self.special_ids = {
      token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special
    }
    roles = base.role_tokens(self._files)
    frame = {} if roles else _frame(json.loads(self._files[MODEL]).get("post_processor"))

    def pick(role: str, substitute: str | None = None) -> str | None:
      own = [roles.get(role), roles.get(substitute or ""), frame.get(role)]
      names = [token for token in own if token] or ([] if roles else _ROLES[role])
      return next((token for token in names if inner.token_to_id(token) is not None), None)

    tokens = {
      "bos": pick("bos", "cls"),
      "eos": pick("eos", "sep"),
      "pad": pick("pad"),
      "mask": pick("mask"),
      "unk": pick("unk"),
    }
    ids: dict[str, Any] = {
      role: token and inner.token_to_id(token) for role, token in tokens.items()
    }  # ids or None
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
    processor = json.loads(self._files[MODEL]).get("post_processor")
    self.pair_ends = _pair_ends(processor, inner.id_to_token(self.eos_id))
    self._kept_from_text = np.array([i for i in self.special_ids.values() if i != self.unk_id])

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `Tokenizer`."""
    encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
    out = [np.array(e.ids, np.int32) for e in encoded]
    for i, ids in enumerate(out):
      if np.isin(ids, self._kept_from_text).any():
        out[i] = self._spelled_out(texts[i])
    return out

  def _added(self) -> dict[str, int]:
    added = self._inner.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items()} | self.special_ids

  def _spelled_out(self, text: str) -> np.ndarray:
    """Encodes a text that contains the name of a special token.

    Some models (Unigram) have the name as a word, so it is cut after its first character.
    """
    names = "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True)))
    strings = [
      string
      for piece in re.split(f"({names})", text)
      for string in ((piece[:1], piece[1:]) if piece in self.special_ids else (piece,))
    ]
    encoded = self._inner.encode_batch_fast(strings, add_special_tokens=False)
    return np.array([i for e in encoded for i in e.ids], np.int32)

  def _decode(self, ids: np.ndarray) -> str:
    return self._inner.decode(ids.tolist(), skip_special_tokens=False)

  def files(self) -> dict[str, bytes]:
    """See `Tokenizer`."""
    return dict(self._files)

  def __reduce__(self) -> tuple[Any, ...]:
    return HuggingFaceTokenizer, (self._files,)


def _frame(processor: Mapping[str, Any] | None) -> dict[str, str]:
  """{'bos', 'eos': token} that a post-processor puts around a text."""
  processor = processor or {}
  kind = processor.get("type")
  if kind == "Sequence":
    found: dict[str, str] = {}
    for inner in processor["processors"]:
      found |= _frame(inner)
    return found
  if kind in ("BertProcessing", "RobertaProcessing"):
    return {"bos": processor["cls"][0], "eos": processor["sep"][0]}
  if kind != "TemplateProcessing":
    return {}
  names: list[Any] = [
    item["SpecialToken"]["id"] if "SpecialToken" in item else None for item in processor["single"]
  ]
  place = names.index(None)
  return ({"bos": names[0]} if place else {}) | (
    {"eos": names[place + 1]} if place + 1 < len(names) else {}
  )


def _pair_ends(processor: Mapping[str, Any] | None, eos: str) -> int:
  """The number of eos that a post-processor puts between two texts, at least 1."""
  processor = processor or {}
  if processor.get("type") == "Sequence":
    return max((_pair_ends(inner, eos) for inner in processor["processors"]), default=1)
  if processor.get("type") == "RobertaProcessing":
    return 2
  if processor.get("type") != "TemplateProcessing":
    return 1
  names = [item.get("SpecialToken", {"id": None})["id"] for item in processor["pair"]]
  first, second = (i for i, name in enumerate(names) if name is None)
  return max(names[first:second].count(eos), 1)


def read(folder: epath.Path) -> HuggingFaceTokenizer:
  """Reads the tokenizer of a folder, or a tokenizer.json alone."""
  if folder.is_file():
    return HuggingFaceTokenizer({MODEL: folder.read_bytes()}, repr(os.fspath(folder)))
  return HuggingFaceTokenizer(
    base.read_files(folder, (MODEL, *base.HF_FILES)), os.fspath(folder / MODEL)
  )
