"""Text to token ids and back, exactly.

Every tokenizer has the same few attributes and methods, those of `Tokenizer`; `load` reads back
what `save` wrote, and also a plain SentencePiece `.model` file.
"""

import abc
import hashlib
import io
import itertools
import json
import os
import pathlib
import re

import numpy as np
import sentencepiece

from jaxgpt.errors import UserError
from jaxgpt.text import read

_SPACE_MARK = "▁"  # U+2581, which SentencePiece writes for a space and can't tell from one
_CHUNK = 1 << 18  # characters encoded at a time: bounds memory, and shares a long text out

# The description of a saved tokenizer, next to its files.
_SPEC = "tokenizer.json"
_MODEL = "sentencepiece.model"


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Attributes:
    kind: 'bytes' or 'sentencepiece'.
    vocab_size: ids are in [0, vocab_size).
    bos_id, eos_id: put before and after each document; they may be equal.
    pad_id: fills rows up; always 0, and of zero weight wherever it is used.
    digest: sha256, in hex, of what defines the tokenizer.
  """
  kind: str
  vocab_size: int
  bos_id: int
  eos_id: int
  pad_id = 0
  digest: str

  def encode(self, text):
    """Token ids of a text, as a list of ints, without bos and eos."""
    return self.encode_batch([text])[0].tolist()

  @abc.abstractmethod
  def encode_batch(self, texts):
    """Token ids of each text, as int32 arrays, without bos and eos; uses all cores."""

  @abc.abstractmethod
  def decode(self, ids):
    """The text of ids; specials are skipped, and so are ids outside the vocabulary.

    Bytes that are no valid UTF-8, as a model may well produce, become U+FFFD.
    """

  @abc.abstractmethod
  def save(self, folder):
    """Writes what `load` needs into a folder, which is made where there is none."""


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes: nothing to train, and any text comes back as it was."""
  kind = "bytes"
  bos_id = 1
  eos_id = 2
  _first = 3  # id of byte 0
  vocab_size = _first + 256
  digest = hashlib.sha256(f"bytes first={_first} bos={bos_id} eos={eos_id}".encode()).hexdigest()

  def encode_batch(self, texts):
    return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + self._first for t in texts]

  def decode(self, ids):
    ids = np.asarray(ids, np.int64).reshape(-1)
    ids = ids[(ids >= self._first) & (ids < self.vocab_size)] - self._first
    return ids.astype(np.uint8).tobytes().decode("utf-8", "replace")

  def save(self, folder):
    _save_spec(folder, self)


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model: one of `train_sentencepiece`, or any other.

  Models of `train_sentencepiece` give each text back exactly. Others do so as far as they were
  trained to: many fold white space or put a space in front.
  """
  kind = "sentencepiece"

  def __init__(self, model, name="the SentencePiece model"):
    """Takes the bytes of a `.model` file.

    Args:
      model: serialized ModelProto.
      name: what error messages call it.

    Raises:
      UserError: the bytes are no SentencePiece model, or it has no end-of-text piece.
    """
    try:
      self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as e:
      raise UserError(f"{name} is no SentencePiece model ({len(model)} bytes); train one with "
                      "--tokenizer=sentencepiece:4096 or name another file") from e
    self._model = model
    self.vocab_size = p.get_piece_size()
    if p.eos_id() < 0:
      raise UserError(f"{name} has no end-of-text piece (eos_id=-1), which must close each "
                      "document; train it with eos_id set")
    self.eos_id = p.eos_id()
    self.bos_id = p.bos_id() if p.bos_id() >= 0 else p.eos_id()
    self.digest = hashlib.sha256(model).hexdigest()
    mark = [p.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    self._mark_ids = np.array(mark, np.int32) if all(map(p.is_byte, mark)) else None
    # A model that puts a space in front of each text would put one in front of each chunk.
    halves = p.encode(["a\n", "b"])
    self._cuts_are_free = p.decode(halves[0] + halves[1]) == "a\nb"

  def encode_batch(self, texts):
    runs, marks = [], []  # what is encoded in one call; whether a space mark precedes it
    ends = []
    for text in texts:
      pieces = text.split(_SPACE_MARK) if self._mark_ids is not None else [text]
      for i, piece in enumerate(pieces):
        chunks = list(read.chunks(piece, _CHUNK)) if self._cuts_are_free else [piece]
        runs.extend(chunks)
        marks.extend([i > 0] + [False] * (len(chunks) - 1))
      ends.append(len(runs))
    encoded = self._processor.encode(runs, return_type="numpy", num_threads=os.cpu_count() or 1)
    encoded = [np.concatenate((self._mark_ids, ids)) if mark else ids
               for ids, mark in zip(encoded, marks)]
    return [encoded[start] if end - start == 1 else np.concatenate(encoded[start:end])
            for start, end in zip([0, *ends[:-1]], ends)]

  def decode(self, ids):
    ids = np.asarray(ids, np.int64).reshape(-1)
    return self._processor.decode(ids[(ids >= 0) & (ids < self.vocab_size)].tolist())

  def save(self, folder):
    _save_spec(folder, self)
    pathlib.Path(folder, _MODEL).write_bytes(self._model)

  def __reduce__(self):
    return SentencePieceTokenizer, (self._model,)


def _save_spec(folder, tokenizer):
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  spec = {"kind": tokenizer.kind, "digest": tokenizer.digest}
  (folder / _SPEC).write_text(json.dumps(spec) + "\n", encoding="utf-8")


def load(folder) -> Tokenizer:
  """The tokenizer that `save` wrote into a folder, or that a SentencePiece file defines.

  Args:
    folder: a folder of `save`, a prepared data folder with a `tokenizer` in it, or a `.model`
      file.

  Raises:
    UserError: there is no such thing, or its content is not what its digest says.
  """
  path = pathlib.Path(folder)
  if path.is_file():
    return SentencePieceTokenizer(path.read_bytes(), repr(os.fspath(folder)))
  for place in (path, path / "tokenizer"):
    if (place / _SPEC).is_file():
      return _load_spec(place)
  raise UserError(f"no tokenizer in {os.fspath(folder)!r}: it is neither a SentencePiece .model "
                  f"file nor a folder with {_SPEC}; run `jaxgpt data` to make one")


def _load_spec(folder):
  damaged = f"the tokenizer in {str(folder)!r} is damaged: {{}}; run `jaxgpt data` again"
  try:
    spec = json.loads((folder / _SPEC).read_text(encoding="utf-8"))
    kind, digest = spec["kind"], spec["digest"]
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(damaged.format(f"{_SPEC} can't be read ({e})")) from e
  if kind == ByteTokenizer.kind:
    tokenizer = ByteTokenizer()
  elif kind == SentencePieceTokenizer.kind:
    if not (folder / _MODEL).is_file():
      raise UserError(damaged.format(f"{_MODEL} is missing"))
    tokenizer = SentencePieceTokenizer((folder / _MODEL).read_bytes(), str(folder / _MODEL))
  else:
    raise UserError(f"tokenizer kind {kind!r} in {str(folder)!r} is not one that this version "
                    "of jaxgpt knows (bytes, sentencepiece); update jaxgpt")
  if tokenizer.digest != digest:
    raise UserError(damaged.format("its content does not match its digest"))
  return tokenizer


def train_sentencepiece(texts, *, vocab_size, model_type="bpe", sample_bytes=4_000_000):
  """Trains a tokenizer whose `decode(encode(x))` is `x`, for any x, and that suits code.

  White space is text like any other (no normalization, no dummy prefix, runs of spaces are
  pieces), each digit is a piece, pieces may join letters and punctuation ('self.', '):\\n') but
  don't go on over a space, and what is in no piece falls back to UTF-8 bytes.

  Args:
    texts: iterable of strings, read until `sample_bytes` are there.
    vocab_size: pieces, with the 4 specials (pad 0, unk 1, bos 2, eos 3) and the 256 bytes.
    model_type: 'bpe', 'unigram' (20 to 30 times slower to train) or 'char' (as few pieces as
      there are characters, whatever vocab_size allows).
    sample_bytes: UTF-8 bytes of text to learn from.

  Returns:
    A SentencePieceTokenizer.

  Raises:
    UserError: no text, or a vocab_size that is too small for the characters of the text or
      larger than what its repetitions support (but for 'char'), with the limit.
  """
  if model_type not in ("bpe", "unigram", "char"):
    raise UserError(f"tokenizer model type {model_type!r}: choose one of bpe, unigram, char")
  sentences = _sentences(texts, sample_bytes)
  first = next(sentences, None)
  if first is None:
    raise UserError("no text to train a tokenizer on; give more text, or --tokenizer=bytes")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain([first], sentences), model_writer=model,
        vocab_size=vocab_size, model_type=model_type,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3,
        byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        split_digits=True, split_by_unicode_script=False, max_sentencepiece_length=24,
        max_sentence_length=1 << 24, num_threads=os.cpu_count() or 1, minloglevel=3)
  except (RuntimeError, ValueError) as e:  # ValueError: more than its 32 bits hold
    raise _training_error(str(e), vocab_size, model_type) from e
  return SentencePieceTokenizer(model.getvalue())


def _sentences(texts, sample_bytes):
  """Parts of 4,096 characters, line ends and all: what SentencePiece counts words in.

  It skips a whole part that holds U+0000 or U+2585, so parts are short.
  """
  left = sample_bytes
  for text in texts:
    for start in range(0, len(text), 4096):
      part = text[start:start + 4096]
      yield part
      left -= len(part.encode())
      if left <= 0:
        return


def _training_error(message, vocab_size, model_type):
  """SentencePiece's complaint about the vocabulary's size, as a user can act on it."""
  way_out = "set it with --tokenizer=sentencepiece:SIZE, or take --tokenizer=bytes"
  if found := re.search(r"size too high \(\d+\)\D*(\d+)", message):
    return UserError(f"vocab_size={vocab_size} is more than this text supports: at most "
                     f"{found[1]} pieces repeat in it; {way_out}, or give more text")
  if found := re.search(r"\d+ vs (\d+)", message):
    return UserError(f"vocab_size={vocab_size} is too small: 4 specials, 256 bytes and the "
                     f"characters of this text need {found[1]}; {way_out}")
  if model_type == "char" and "vocab_size" in message:
    return UserError(f"vocab_size={vocab_size} is too small: 4 specials and 256 bytes need 260, "
                     f"and each character one more; {way_out}")
  return UserError(f"SentencePiece can't train on this text: {message.strip()}; {way_out}")
