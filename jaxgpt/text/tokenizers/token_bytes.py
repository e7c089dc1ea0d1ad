"""The bytes that each token adds to a text, read from the files that define a tokenizer."""

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import sentencepiece

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import base

_SPACE_MARK = "▁"  # U+2581, which stands for a space
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def of(tokenizer: base.Tokenizer) -> list[bytes]:
  """The bytes of each token.

  A space in front of a whole text, which some tokenizers drop when they decode, is kept: the tokens
  are those of a text's continuation.

  Args:
    tokenizer: The tokenizer.

  Returns:
    The bytes of ids 0, 1, …. b'' for special tokens, and for ids without a token.

  Raises:
    UserError: The tokens of the tokenizer do not stand for bytes of a text each.
  """
  out = [b""] * tokenizer.vocab_size
  specials = {*tokenizer.special_ids.values(), tokenizer.unk_id}
  for i, data in _KINDS[tokenizer.kind](tokenizer):
    if i not in specials and i < len(out):
      out[i] = data
  return out


def _bytes(tokenizer: base.Tokenizer) -> Iterator[tuple[int, bytes]]:
  ids = tokenizer.encode_batch(["\x00"])[0]
  return ((int(ids[0]) + i, bytes([i])) for i in range(256))


def _tiktoken(tokenizer: base.Tokenizer) -> Iterator[tuple[int, bytes]]:
  for name, content in tokenizer.files().items():
    if not name.endswith(".json"):
      for line in content.splitlines():
        token, _, rank = line.partition(b" ")
        if rank:
          yield int(rank), base64.b64decode(token)


def _sentencepiece(tokenizer: base.Tokenizer) -> Iterator[tuple[int, bytes]]:
  p: Any = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files()["tokenizer.model"])
  for i in range(p.get_piece_size()):
    if not p.is_unused(i):
      yield i, _with_spaces(p.id_to_piece(i), falls_back=p.is_byte(i))


def _huggingface(tokenizer: base.Tokenizer) -> Iterator[tuple[int, bytes]]:
  read = json.loads(tokenizer.files()["tokenizer.json"])
  steps = set(_steps(read.get("decoder")))
  vocab = read["model"].get("vocab", {})
  if isinstance(vocab, list):  # Unigram: (token, score)
    vocab = {token: i for i, (token, _) in enumerate(vocab)}
  if "ByteLevel" in steps:
    of_char = byte_level_alphabet()
    # A token with other characters is not in the alphabet, but as it is.
    convert = lambda token: (
      bytes(of_char[c] for c in token) if of_char.keys() >= set(token) else token.encode()
    )
  elif steps & {"Metaspace", "Replace", "ByteFallback"}:
    convert = lambda token: _with_spaces(token, "ByteFallback" in steps)
  else:
    raise UserError(
      f"the tokenizer's decoder ({', '.join(sorted(steps)) or 'none'}) does not say which bytes a "
      "token stands for, so a text's form cannot be prescribed; use a model with a byte-level or "
      "SentencePiece vocabulary"
    )
  added = {token["id"]: token["content"] for token in read.get("added_tokens", ())}
  for token, i in vocab.items():
    if i not in added:
      yield i, convert(token)
  yield from ((i, content.encode()) for i, content in added.items())


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[str]:
  """Names of the steps of a decoder."""
  if decoder:
    yield decoder["type"]
    for inner in decoder.get("decoders", ()):
      yield from _steps(inner)


def _with_spaces(token: str, falls_back: bool) -> bytes:
  found = _BYTE.fullmatch(token) if falls_back else None
  return bytes([int(found[1], 16)]) if found else token.replace(_SPACE_MARK, " ").encode()


def byte_level_alphabet() -> dict[str, int]:
  """{character: byte} of byte-level vocabularies: printable Latin-1 is itself, the rest follows."""
  kept = [i for i in range(256) if 33 <= i <= 126 or 161 <= i <= 172 or 174 <= i <= 255]
  others = np.setdiff1d(np.arange(256), kept).tolist()
  return {chr(i): i for i in kept} | {chr(256 + n): i for n, i in enumerate(others)}


_KINDS: dict[str, Callable[[base.Tokenizer], Iterator[tuple[int, bytes]]]] = {
  "bytes": _bytes,
  "tiktoken": _tiktoken,
  "sentencepiece": _sentencepiece,
  "huggingface": _huggingface,
}
