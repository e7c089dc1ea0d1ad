"""SentencePiece: trained here, or any `.model` file."""

import hashlib
import io
import itertools
import re

import numpy as np
import sentencepiece

from jaxgpt.errors import UserError
from jaxgpt.text.readers import documents
from jaxgpt.text.tokenizers import base, word_cache

_SPACE_MARK = "▁"  # U+2581, which SentencePiece writes for a space and can't tell from one
_CHUNK = 1 << 18  # characters encoded at a time: bounds memory, and shares a long text out
MODEL = "tokenizer.model"
KNOWN_MARKS = (
  base.MASK,
  *base.CHAT_MARKS,
  "<start_of_turn>",
  "<end_of_turn>",
  "<|im_start|>",
  "<|im_end|>",
)
_RESERVED = ("<pad>", "<unk>", "<s>", "</s>", base.MASK, *base.CHAT_MARKS)


class SentencePieceTokenizer(base.Tokenizer):
  """A SentencePiece model: one of `train_sentencepiece`, or any other.

  Models of `train_sentencepiece` give each text back exactly. Others do so as far as they were
  trained to: many fold white space or put a space in front.
  """

  kind = "sentencepiece"

  def __init__(self, model, name="the SentencePiece model", extras=None):
    """Takes the bytes of a `.model` file.

    Args:
      model: serialized ModelProto.
      name: what error messages call it.
      extras: {name: bytes} of what transformers keeps beside it, as in `base.HF_FILES`: tokens
        added to the model's own, and which of them begins and ends a text.

    Raises:
      UserError: the bytes are no SentencePiece model, no piece can end a text, or `extras` number
        the model's pieces in another way.
    """
    try:
      self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as e:
      raise UserError(
        f"{name} is no SentencePiece model ({len(model)} bytes); train one with "
        "--tokenizer=sentencepiece:4096 or name another file"
      ) from e
    self._model, self._extras = model, extras or {}
    added = base.added_tokens(self._extras)
    self._check_numbers(added, name)
    self.vocab_size = max([p.get_piece_size() - 1, *added.values()]) + 1
    self._set_specials(added, name)
    self.chat_template = base.chat_template(self._extras)
    self.digest = (
      base.files_digest(self.files()) if self._extras else hashlib.sha256(model).hexdigest()
    )
    # A model that puts a space in front of each text would put one in front of each chunk.
    halves = p.encode(["a\n", "b"])
    self._cuts_are_free = p.decode(halves[0] + halves[1]) == "a\nb"
    self._words = word_cache.WordCache(self._encode_lists) if self._is_cut_at_spaces() else None
    self._spelled = self._make_spelled() if self._cuts_are_free else {}
    self._pattern = self._spelled and re.compile(
      "(" + "|".join(map(re.escape, sorted(self._spelled, key=len, reverse=True))) + ")"
    )

  def _check_numbers(self, added, name):
    for token, i in added.items():
      if i < self._processor.get_piece_size() and self._processor.id_to_piece(i) != token:
        raise UserError(
          f"{name} calls piece {i} {self._processor.id_to_piece(i)!r}, the files beside it "
          f"{token!r}: this family numbers its pieces in its own way; name a folder that has a "
          "tokenizer.json too"
        )

  def _set_specials(self, added, name):
    p = self._processor
    self.special_ids = {
      p.id_to_piece(i): i for i in range(p.get_piece_size()) if p.is_control(i) or p.is_unknown(i)
    } | added
    for token in KNOWN_MARKS:  # some models have them as pieces that text may hold
      i = p.piece_to_id(token)
      if i != p.unk_id():
        self.special_ids[token] = i
    roles = base.role_tokens(self._extras)

    def pick(role, own, *names):
      if roles.get(role) in self.special_ids:
        return self.special_ids[roles[role]]
      return (
        own
        if own >= 0
        else next((self.special_ids[name] for name in names if name in self.special_ids), None)
      )

    bos = pick("bos", p.bos_id(), "<s>", "<bos>")
    eos = pick("eos", p.eos_id(), "</s>", "<eos>", "<|endoftext|>")
    if eos is None and bos is None:
      raise UserError(
        f"{name} has no piece that can close a document (eos_id=-1, bos_id=-1); "
        "train it with eos_id set"
      )
    self.eos_id = bos if eos is None else eos
    self.bos_id = self.eos_id if bos is None else bos
    self.pad_id = pick("pad", p.pad_id(), "<pad>")
    self.mask_id = pick("mask", -1, base.MASK, "[MASK]")
    self.unk_id = p.unk_id()

  def _is_cut_at_spaces(self):
    """Whether the tokens of a text are those of its words, for certain: see `word_cache`.

    Scores that are whole numbers tell BPE, which merges by rank. A unigram model adds scores up
    over the text, where rounding may break a tie in another way.
    """
    p = self._processor
    ids = [
      i
      for i in range(p.get_piece_size())
      if not (p.is_control(i) or p.is_unknown(i) or p.is_byte(i))
    ]
    return (
      self._cuts_are_free
      and p.encode("a  b") == p.encode("a") + p.encode("  b")
      and all(p.get_score(i).is_integer() for i in ids)
      and not any(re.search(f"[^{_SPACE_MARK}]{_SPACE_MARK}", p.id_to_piece(i)) for i in ids)
    )

  def _encode_lists(self, texts):
    return self._processor.encode(texts, num_threads=base.threads())

  def _make_spelled(self):
    """{text: ids} of the texts that SentencePiece would read as something else than text."""
    p = self._processor
    spelled = {}
    mark = [p.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    if all(map(p.is_byte, mark)):
      spelled[_SPACE_MARK] = np.array(mark, np.int32)
    for token, i in self.special_ids.items():
      if i in p.encode(token):
        spelled[token] = np.array(p.encode(token[:1]) + p.encode(token[1:]), np.int32)
    return spelled

  def encode_batch(self, texts):
    runs, plan = [], []  # what is encoded in one call; its place there, or ids that are known
    ends = []
    for text in texts:
      for i, part in enumerate(self._pattern.split(text) if self._pattern else [text]):
        if i % 2:
          plan.append(self._spelled[part])
          continue
        chunks = list(documents.chunks(part, _CHUNK)) if self._cuts_are_free else [part]
        plan.extend(range(len(runs), len(runs) + len(chunks)))
        runs.extend(chunks)
      ends.append(len(plan))
    encoded = (
      self._words(runs)
      if self._words
      else self._processor.encode(runs, return_type="numpy", num_threads=base.threads())
    )
    ids = [encoded[item] if isinstance(item, int) else item for item in plan]
    return [
      ids[start] if end - start == 1 else np.concatenate(ids[start:end])
      for start, end in zip([0, *ends[:-1]], ends)
    ]

  def _decode(self, ids):
    return self._processor.decode(ids[ids < self._processor.get_piece_size()].tolist())

  def files(self):
    return {MODEL: self._model, **self._extras}

  def __reduce__(self):
    return SentencePieceTokenizer, (self._model, "the SentencePiece model", self._extras)


def train_sentencepiece(texts, *, vocab_size, model_type="bpe", sample_bytes=4_000_000, symbols=()):
  """Trains a tokenizer whose `decode(encode(x))` is `x`, for any x, and that suits code.

  White space is text like any other (no normalization, no dummy prefix, runs of spaces are
  pieces), each digit is a piece, pieces may join letters and punctuation ('self.', '):\\n') but
  don't go on over a space, and what is in no piece falls back to UTF-8 bytes.

  Args:
    texts: iterable of strings, read until `sample_bytes` are there.
    vocab_size: pieces, with the 9 specials (pad 0, unk 1, bos 2, eos 3, then `<mask>` and the
      marks of a chat), the symbols and the 256 bytes.
    model_type: 'bpe', 'unigram' (20 to 30 times slower to train) or 'char' (as few pieces as
      there are characters, whatever vocab_size allows).
    sample_bytes: UTF-8 bytes of text to learn from.
    symbols: texts that are one piece each wherever they occur, such as '<h1>'.

  Returns:
    A SentencePieceTokenizer.

  Raises:
    UserError: no text, or a vocab_size that is too small for the characters of the text or
      larger than what its repetitions support (but for 'char'), with the limit.
  """
  check_training(model_type, symbols)
  sentences = _sentences(texts, sample_bytes)
  first = next(sentences, None)
  if first is None:
    raise UserError("no text to train a tokenizer on; give more text, or --tokenizer=bytes")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=itertools.chain([first], sentences),
      model_writer=model,
      vocab_size=vocab_size,
      model_type=model_type,
      pad_id=0,
      unk_id=1,
      bos_id=2,
      eos_id=3,
      control_symbols=[base.MASK, *base.CHAT_MARKS],
      user_defined_symbols=[symbol.replace(" ", _SPACE_MARK) for symbol in symbols],
      byte_fallback=True,
      character_coverage=0.9995,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      split_digits=True,
      split_by_unicode_script=False,
      max_sentencepiece_length=24,
      max_sentence_length=1 << 24,
      num_threads=base.threads(),
      minloglevel=3,
    )
  except (RuntimeError, ValueError) as e:  # ValueError: more than its 32 bits hold
    raise _training_error(str(e), vocab_size, model_type, 9 + len(symbols)) from e
  return SentencePieceTokenizer(model.getvalue())


def _sentences(texts, sample_bytes):
  """Parts of 4,096 characters, line ends and all: what SentencePiece counts words in.

  It skips a whole part that holds U+0000 or U+2585, so parts are short.
  """
  left = sample_bytes
  for text in texts:
    for start in range(0, len(text), 4096):
      part = text[start : start + 4096]
      yield part
      left -= len(part.encode())
      if left <= 0:
        return


def check_training(model_type, symbols):
  """Raises the UserError of `train_sentencepiece` that needs no text."""
  if model_type not in ("bpe", "unigram", "char"):
    raise UserError(f"tokenizer model type {model_type!r}: choose one of bpe, unigram, char")
  for i, symbol in enumerate(symbols):
    if not symbol or symbol in symbols[:i] or symbol in _RESERVED or _SPACE_MARK in symbol:
      why = (
        "is empty"
        if not symbol
        else "is given twice"
        if symbol in symbols[:i]
        else f"holds {_SPACE_MARK!r}"
        if _SPACE_MARK in symbol
        else "is a special token"
      )
      raise UserError(f"the symbol {symbol!r} {why}; leave it out")


def _training_error(message, vocab_size, model_type, specials):
  """SentencePiece's complaint about the vocabulary's size, as a user can act on it."""
  way_out = "set it with --tokenizer=sentencepiece:SIZE, or take --tokenizer=bytes"
  if found := re.search(r"size too high \(\d+\)\D*(\d+)", message):
    return UserError(
      f"vocab_size={vocab_size} is more than this text supports: at most "
      f"{found[1]} pieces repeat in it; {way_out}, or give more text"
    )
  if found := re.search(r"\d+ vs (\d+)", message):
    return UserError(
      f"vocab_size={vocab_size} is too small: {specials} specials and "
      f"symbols, 256 bytes and the "
      f"characters of this text need {found[1]}; {way_out}"
    )
  if model_type == "char" and "vocab_size" in message:
    return UserError(
      f"vocab_size={vocab_size} is too small: {specials} specials and symbols "
      f"and 256 bytes need {specials + 256}, and each character one more; {way_out}"
    )
  return UserError(f"SentencePiece can't train on this text: {message.strip()}; {way_out}")
