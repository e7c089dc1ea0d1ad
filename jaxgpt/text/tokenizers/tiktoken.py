"""tiktoken vocabularies: a file of base64 tokens and ranks, a pattern and special tokens."""

import base64
import binascii
import collections
import importlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import base

MODEL = "vocabulary.tiktoken"
SETTINGS = "tiktoken.json"
_BOS = ("<|begin_of_text|>", "<|startoftext|>", "<s>")
# A run of white space of which a pattern such as `\s+(?!\S)` might overflow tiktoken's stack.
_LONG_RUN = 50_000
_RUN = re.compile(rf"\s{{{_LONG_RUN}}}")
_EOS = ("<|end_of_text|>", "<|endoftext|>", "</s>")


class TiktokenTokenizer(base.Tokenizer):
  """Byte-level BPE by tiktoken. Decodes any text exactly."""

  kind = "tiktoken"

  def __init__(self, vocabulary: bytes, settings: bytes, name: str = "the tiktoken vocabulary"):
    """Reads the content of both files.

    Args:
      vocabulary: Lines with a token in base64, a space and its rank.
      settings: JSON {"pattern": regular expression that cuts text into words,
        "special_tokens": {name: id}}, optionally with "bos_token", "eos_token", "pad_token" and
        "mask_token", which name special tokens.
      name: Name in error messages.

    Raises:
      UserError: tiktoken is not installed, or a file has another form.
    """
    try:
      import tiktoken
    except ImportError as e:
      raise UserError(f"{name} needs the tiktoken library: pip install 'jaxgpt[data]'") from e
    self._vocabulary, self._settings = vocabulary, settings
    ranks = _ranks(vocabulary, name)
    try:
      read = json.loads(settings)
      self.special_ids = {str(token): int(i) for token, i in read["special_tokens"].items()}
      self._pattern = read["pattern"]
      if not isinstance(self._pattern, str):
        raise TypeError(f"pattern is {self._pattern!r}, not text")
      with base.failures_told("tiktoken refuses it"):
        self._inner = tiktoken.Encoding(
          name, pat_str=self._pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
      raise UserError(
        f"the {SETTINGS} of {name} is not right ({type(e).__name__}: {e}); it holds "
        '{"pattern": REGEX, "special_tokens": {"<|endoftext|>": ID}}'
      ) from e
    ids = [*ranks.values(), *set(self.special_ids.values())]  # two special names may share an id
    if len(set(ids)) < len(ids):
      double = collections.Counter(ids).most_common(1)[0][0]
      raise UserError(
        f"two tokens of {name} have the id {double}; correct its special_tokens in {SETTINGS}, or "
        "the ranks"
      )
    self.vocab_size = max(ids) + 1
    self._is_token = np.zeros(self.vocab_size, bool)
    self._is_token[ids] = True
    self.digest = base.files_digest(self.files())
    roles = base.role_tokens({base.CONFIG: settings})

    def pick(role: str, *names: str) -> int | None:
      return next(
        (
          self.special_ids[token]
          for token in (roles.get(role), *names)
          if token is not None and token in self.special_ids
        ),
        None,
      )

    eos, bos = pick("eos", *_EOS), pick("bos", *_BOS)
    if eos is None and bos is None:
      raise UserError(
        f"the {SETTINGS} of {name} names no token that ends a text; add "
        '"eos_token", one of its special_tokens'
      )
    self.bos_id, self.eos_id = eos if bos is None else bos, bos if eos is None else eos  # type: ignore[assignment]  # one of them is not None
    self.adds_bos = bos is not None and bos != eos
    self.pad_id, self.mask_id = pick("pad"), pick("mask", base.MASK)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `Tokenizer`."""
    long = [i for i, text in enumerate(texts) if _has_long_run(text)]
    rest = [text for i, text in enumerate(texts) if i not in long] if long else list(texts)
    try:
      with base.failures_told("tiktoken fails on a text"):
        ids = iter(self._inner.encode_ordinary_batch(rest, num_threads=base.threads()))
    except base.EncodingError:  # panics of its regular expressions
      long, ids = list(range(len(texts))), iter(())
    return [
      np.array(self._encode_in_words(text) if i in long else next(ids), np.int32)
      for i, text in enumerate(texts)
    ]

  def _encode_in_words(self, text: str) -> list[int]:
    """Encodes a text that tiktoken's own regular expressions have no stack for.

    tiktoken cuts texts with the library `regex` in its tests, which does not recurse.
    """
    regex = importlib.import_module("regex")  # tiktoken depends on it
    core = self._inner._core_bpe
    with base.failures_told("tiktoken fails on the text"):
      return [
        i
        for word in regex.findall(self._pattern, text)
        for i in core.encode_single_piece(word.encode())
      ]

  def _located(self, text: str) -> base.Tokens:
    ids = self.encode_batch([text])[0]
    lengths = [len(self._inner.decode_single_token_bytes(i)) for i in ids.tolist()]
    return base.by_bytes(text, ids, np.array(lengths, int))

  def _decode(self, ids: np.ndarray) -> str:
    return self._inner.decode(ids[self._is_token[ids]].tolist(), errors="replace")

  def files(self) -> dict[str, bytes]:
    """See `Tokenizer`."""
    return {MODEL: self._vocabulary, SETTINGS: self._settings}

  def __reduce__(self) -> tuple[Any, ...]:
    return TiktokenTokenizer, (self._vocabulary, self._settings)


def _has_long_run(text: str) -> bool:
  return len(text) >= _LONG_RUN and _RUN.search(text) is not None


def _ranks(vocabulary: bytes, name: str) -> dict[bytes, int]:
  """{token: rank} of a vocabulary file."""
  ranks = {}
  for number, line in enumerate(vocabulary.splitlines(), 1):
    if not line.strip():
      continue
    try:
      token, rank = line.split()
      ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as e:
      raise UserError(
        f"{name}:{number} is not a base64 token and its rank; name a .tiktoken file"
      ) from e
  missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
  if missing:
    raise UserError(f"{name} has no token for byte {missing[0]}: it is not complete")
  return ranks


def find(folder: epath.Path) -> epath.Path | None:
  """The .tiktoken file next to a tiktoken.json in a folder, or None."""
  files = sorted(folder.glob("*.tiktoken")) if (folder / SETTINGS).is_file() else []
  return files[0] if len(files) == 1 else None


def read(path: epath.Path) -> TiktokenTokenizer:
  """Reads the tokenizer of a .tiktoken file and the tiktoken.json next to it."""
  settings = path.parent / SETTINGS
  if not settings.is_file():
    raise UserError(
      f"{os.fspath(path)!r} has no {SETTINGS} next to it: write one with "
      '{"pattern": REGEX, "special_tokens": {"<|endoftext|>": ID}}, as in the code '
      "that came with the vocabulary"
    )
  return TiktokenTokenizer(base.read_bytes(path), base.read_bytes(settings), os.fspath(path))
