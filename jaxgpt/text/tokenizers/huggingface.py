"""Hugging Face tokenizers: a `tokenizer.json`, read by the `tokenizers` library."""

import functools
import itertools
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
      with base.failures_told("the library refuses it"):
        inner = tokenizers.Tokenizer.from_str(files[MODEL].decode())
    except base.EncodingError as e:
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
    templates = base.chat_templates(self._files)
    self.chat_template, self.tool_template = templates.get("default"), templates.get("tool_use")
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
        f"{base.CONFIG} next to it (its specials: "
        f"{', '.join(list(self.special_ids)[:10]) or 'none'})"
      )
    self._role_names = {
      f"{role}_token": token
      for role, token in (roles or tokens).items()
      if token and inner.token_to_id(token) is not None
    }
    self.special_ids |= {token: ids[role] for role, token in tokens.items() if token}
    self.bos_id = ids["eos"] if ids["bos"] is None else ids["bos"]
    self.eos_id = ids["bos"] if ids["eos"] is None else ids["eos"]
    self.pad_id, self.mask_id, self.unk_id = ids["pad"], ids["mask"], ids["unk"]
    processor = json.loads(self._files[MODEL]).get("post_processor")
    self.pair_ends = _pair_ends(processor, inner.id_to_token(self.eos_id))
    self.adds_bos = ids["bos"] is not None and self._puts_bos_in_front(ids["bos"])
    self._kept_from_text = np.array([i for i in self.special_ids.values() if i != self.unk_id])

  def _puts_bos_in_front(self, bos: int) -> bool:
    """As transformers does: `add_bos_token` of the config, else the post-processor."""
    said = base.read_json(self._files, base.CONFIG).get("add_bos_token")
    return said if isinstance(said, bool) else self._inner.encode("a").ids[:1] == [bos]

  @property
  def role_names(self) -> dict[str, str]:
    """See `Tokenizer`. The roles that the files name, as transformers has them."""
    return self._role_names

  def encode_rendered(
    self, texts: Sequence[str], plain: Sequence[Sequence[base.Range]]
  ) -> list[base.Tokens]:
    """See `Tokenizer`. Without plain ranges, the ids are those of transformers."""
    whole = [text for text, ranges in zip(texts, plain, strict=True) if not ranges]
    tokens = iter(self._with_specials(whole))
    return [
      self._around(text, ranges) if ranges else next(tokens)
      for text, ranges in zip(texts, plain, strict=True)
    ]

  @functools.cached_property
  def _with_names(self) -> Any:
    """The tokenizer once more, which takes names of special tokens for these tokens.

    That is a setting of the library's object, which several threads may use at once.
    """
    inner = type(self._inner).from_str(self._inner.to_str())
    inner.encode_special_tokens = False
    return inner

  def _with_specials(self, texts: Sequence[str]) -> list[base.Tokens]:
    """Encodes texts in which names of special tokens are these tokens."""
    with base.failures_told("the tokenizers library fails on a text"):
      encoded = self._with_names.encode_batch(list(texts), add_special_tokens=False)
    return [_tokens(e) for e in encoded]

  def _around(self, text: str, plain: Sequence[base.Range]) -> base.Tokens:
    """Encodes a text with names of special tokens that are text.

    The text is cut at these. Some tokenizers put a space in front of what they encode, so each cut
    piece but the first is encoded after a newline, whose tokens are left out (as transformers does
    for its `sanitize_control_tokens`).
    """
    newline = self.encode_batch(["\n"])[0]
    edges = sorted({0, len(text), *(x for span in plain for x in span)})
    parts = []
    for start, end in itertools.pairwise(edges):
      piece, lead = text[start:end], "\n" if start else ""
      if (start, end) in plain:
        ids = self._after(newline, lead + piece, piece)
        parts.append(base.Tokens(ids, np.full(len(ids), start), np.full(len(ids), end)))
        continue
      found = self._with_specials([lead + piece])[0]
      skip = len(newline) if lead else 0
      if not np.array_equal(found.ids[:skip], newline[:skip]):
        found, lead, skip = self._with_specials([piece])[0], "", 0
      shift = start - len(lead)
      parts.append(
        base.Tokens(found.ids[skip:], found.starts[skip:] + shift, found.ends[skip:] + shift)
      )
    return base.Tokens(*(np.concatenate(arrays) for arrays in zip(*parts)))

  def _after(self, newline: np.ndarray, text: str, alone: str) -> np.ndarray:
    """The ids of a text from a user, without the newline that it was put after."""
    ids = self.encode_batch([text])[0]
    if text != alone and np.array_equal(ids[: len(newline)], newline):
      return ids[len(newline) :]
    return self.encode_batch([alone])[0]

  def _located(self, text: str) -> base.Tokens:
    return self._around(text, [(0, len(text))])

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `Tokenizer`."""
    with base.failures_told("the tokenizers library fails on a text"):
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
    with base.failures_told("the tokenizers library fails on a text"):
      encoded = self._inner.encode_batch_fast(strings, add_special_tokens=False)
    return np.array([i for e in encoded for i in e.ids], np.int32)

  def _decode(self, ids: np.ndarray) -> str:
    return self._inner.decode(ids.tolist(), skip_special_tokens=False)

  def files(self) -> dict[str, bytes]:
    """See `Tokenizer`."""
    return dict(self._files)

  def __reduce__(self) -> tuple[Any, ...]:
    return HuggingFaceTokenizer, (self._files,)


def _tokens(encoding: Any) -> base.Tokens:
  places = np.array(encoding.offsets, int).reshape(-1, 2)
  return base.Tokens(np.array(encoding.ids, np.int32), places[:, 0], places[:, 1])


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


def _pair_ends(processor: Mapping[str, Any] | None, eos: str | None) -> int:
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
    return HuggingFaceTokenizer({MODEL: base.read_bytes(folder)}, repr(os.fspath(folder)))
  return HuggingFaceTokenizer(
    base.read_files(folder, (MODEL, *base.HF_FILES)), os.fspath(folder / MODEL)
  )
