"""SentencePiece tokenizers: training, and reading any `.model` file."""

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import base, word_cache

# The same on all machines: the model file records the number, so that otherwise the digest of
# prepared data would depend on the cores. The scores of 'unigram' are sums over threads too.
_TRAINING_THREADS = 2
_SPACE_MARK = "▁"  # U+2581: SentencePiece writes it for a space and can't distinguish the two
_CUT = re.compile("(?<=[^ ]) ")  # a text may be cut before a run of spaces, see `word_cache`
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
  """A SentencePiece model, from `train_sentencepiece` or any other.

  Models from `train_sentencepiece` decode every text exactly. Many others fold white space or put a
  space in front.
  """

  kind = "sentencepiece"

  def __init__(
    self,
    model: bytes,
    name: str = "the SentencePiece model",
    extras: Mapping[str, bytes] | None = None,
  ):
    """Reads the content of a `.model` file.

    Args:
      model: A serialized ModelProto.
      name: Name in error messages.
      extras: {name: content} of the files that transformers keeps next to it, as in
        `base.HF_FILES`: added tokens, and the roles of tokens.

    Raises:
      UserError: The model can't be read, no piece can end a text, or `extras` number the pieces
        differently.
    """
    try:
      self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as e:
      raise UserError(
        f"{name} is not a SentencePiece model ({len(model)} bytes); train one with "
        "--tokenizer=sentencepiece:4096 or name another file"
      ) from e
    self._model, self._extras = model, extras or {}
    added = base.added_tokens(self._extras)
    self._check_numbers(added, name)
    self.vocab_size = max([p.get_piece_size() - 1, *added.values()]) + 1
    self._set_specials(added, name)
    templates = base.chat_templates(self._extras)
    self.chat_template, self.tool_template = templates.get("default"), templates.get("tool_use")
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

  def _check_numbers(self, added: Mapping[str, int], name: str) -> None:
    for token, i in added.items():
      if i < self._processor.get_piece_size() and self._processor.id_to_piece(i) != token:
        raise UserError(
          f"{name} calls piece {i} {self._processor.id_to_piece(i)!r}, the files next to it "
          f"{token!r}: this family numbers its pieces differently; name a folder that has a "
          "tokenizer.json too"
        )

  def _set_specials(self, added: Mapping[str, int], name: str) -> None:
    p = self._processor
    self.special_ids = {
      p.id_to_piece(i): i for i in range(p.get_piece_size()) if p.is_control(i) or p.is_unknown(i)
    } | dict(added)
    for token in KNOWN_MARKS:  # some models have them as ordinary pieces
      i = p.piece_to_id(token)
      if i != p.unk_id():
        self.special_ids[token] = i
    roles = base.role_tokens(self._extras)

    def pick(role: str, own: int, *names: str) -> int | None:
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
    self.eos_id = bos if eos is None else eos  # type: ignore[assignment]  # one of them is an id
    self.bos_id = self.eos_id if bos is None else bos
    add_bos = base.read_json(self._extras, base.CONFIG).get("add_bos_token")
    self.adds_bos = self.bos_id != self.eos_id and add_bos is not False
    self.pad_id = pick("pad", p.pad_id(), "<pad>")
    self.mask_id = pick("mask", -1, base.MASK, "[MASK]")
    self.unk_id = p.unk_id()

  def _is_cut_at_spaces(self) -> bool:
    """Whether the tokens of a text are certainly those of its words. See `word_cache`.

    Integer scores identify BPE, which merges by rank. A unigram model adds up scores over the whole
    text, so rounding could break a tie differently.
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

  def _encode_lists(self, texts: Sequence[str]) -> list[list[int]]:
    return self._processor.encode(texts, num_threads=base.threads())

  def _make_spelled(self) -> dict[str, np.ndarray]:
    """{text: ids} of the texts that SentencePiece would take for spaces or special tokens."""
    p = self._processor
    spelled: dict[str, np.ndarray] = {}
    mark = [p.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    if all(map(p.is_byte, mark)):
      spelled[_SPACE_MARK] = np.array(mark, np.int32)
    for token, i in self.special_ids.items():
      if i in p.encode(token):
        spelled[token] = np.array(p.encode(token[:1]) + p.encode(token[1:]), np.int32)
    return spelled

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `Tokenizer`."""
    runs: list[str] = []  # strings to encode in one call
    items: list[int | np.ndarray] = []  # all texts in order: an index into `runs`, or known ids
    ends = []  # end of each text in `items`
    for text in texts:
      for i, string in enumerate(self._pattern.split(text) if self._pattern else [text]):
        if i % 2:
          items.append(self._spelled[string])
          continue
        chunks = list(self.pieces(string))
        items.extend(range(len(runs), len(runs) + len(chunks)))
        runs.extend(chunks)
      ends.append(len(items))
    encoded = (
      self._words(runs)
      if self._words
      else self._processor.encode(runs, return_type="numpy", num_threads=base.threads())
    )
    ids = [encoded[item] if isinstance(item, int) else item for item in items]
    return [
      ids[start] if end - start == 1 else np.concatenate(ids[start:end])
      for start, end in zip([0, *ends[:-1]], ends)
    ]

  def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """See `Tokenizer`."""
    if (
      self._words is None
      or max(map(len, texts), default=0) > base.LONG
      or (self._pattern and self._pattern.search("\n".join(texts)))
    ):
      return super().encode_joined(texts)
    return self._words.joined(texts)

  def _find_cut(self, text: str, at: int) -> tuple[int, int] | None:
    if self._words is None:
      return super()._find_cut(text, at)
    found = _CUT.search(text, at, at + base.LONG)
    return (found.start(), found.start()) if found else super()._find_cut(text, at)

  def _located(self, text: str) -> base.Tokens:
    ids = self.encode_batch([text])[0]
    if self._cuts_are_free and self._decode(ids) == text:  # the pieces are the text
      lengths = [self._length(i) for i in ids.tolist()]
      if sum(lengths) == len(text.encode()):
        return base.by_bytes(text, ids, np.array(lengths, int))
    found, ranges, at = list[int](), list[tuple[int, int]](), 0
    for i, string in enumerate(self._pattern.split(text) if self._pattern else [text]):
      size = len(string.encode())
      if i % 2:
        more = self._spelled[string].tolist()
        spans = [(0, size)] * len(more)
      else:
        pieces = self._processor.encode(string, return_type="proto").pieces if string else []
        more, spans = [p.id for p in pieces], [(p.begin, p.end) for p in pieces]
      found += more
      ranges += [(at + a, at + b) for a, b in spans]
      at += size
    assert found == ids.tolist(), "tokens with and without places differ"
    char = np.cumsum((np.frombuffer(text.encode() + b"x", np.uint8) & 0xC0) != 0x80) - 1
    places = char[np.array(ranges, int).reshape(-1, 2)]
    return base.Tokens(ids, places[:, 0], places[:, 1])

  def _length(self, i: int) -> int:
    """UTF-8 bytes of the text that a piece stands for."""
    p = self._processor
    return 1 if p.is_byte(i) else len(p.id_to_piece(i).replace(_SPACE_MARK, " ").encode())

  def _decode(self, ids: np.ndarray) -> str:
    return self._processor.decode(ids[ids < self._processor.get_piece_size()].tolist())

  def files(self) -> dict[str, bytes]:
    """See `Tokenizer`."""
    return {MODEL: self._model, **self._extras}

  def __reduce__(self) -> tuple[Any, ...]:
    return SentencePieceTokenizer, (self._model, "the SentencePiece model", self._extras)


def train_sentencepiece(
  texts: Iterable[str],
  *,
  vocab_size: int,
  model_type: str = "bpe",
  sample_bytes: int = 4_000_000,
  symbols: Sequence[str] = (),
) -> SentencePieceTokenizer:
  """Trains a tokenizer that decodes every text exactly and suits code.

  White space is ordinary text (no normalization, no dummy prefix, runs of spaces are pieces). Each
  digit is a piece. Pieces may join letters and punctuation ('self.', '):\\n') but never extend over
  a space. Characters outside the vocabulary fall back to UTF-8 bytes.

  Args:
    texts: Texts, read until there are `sample_bytes`.
    vocab_size: Number of pieces, including 9 special tokens (pad 0, unk 1, bos 2, eos 3, `<mask>`
      and the chat marks), the symbols and the 256 bytes.
    model_type: 'bpe', 'unigram' (20 to 30 times slower to train) or 'char' (one piece per
      character, up to vocab_size).
    sample_bytes: UTF-8 bytes of text to learn from.
    symbols: Texts such as '<h1>' that are one piece wherever they occur.

  Raises:
    UserError: There is no text, or vocab_size is too small for its characters or larger than its
      repetitions support (not for 'char'). The message gives the limit.
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
      num_threads=_TRAINING_THREADS,
      minloglevel=3,
    )
  except (RuntimeError, ValueError) as e:  # ValueError: more than its 32 bits hold
    raise _training_error(str(e), vocab_size, model_type, 9 + len(symbols)) from e
  return SentencePieceTokenizer(model.getvalue())


def _sentences(texts: Iterable[str], sample_bytes: int) -> Iterator[str]:
  """Cuts texts into "sentences" of 4,096 characters, including newlines.

  SentencePiece skips a whole sentence with U+0000 or U+2585, so sentences are short.
  """
  left = sample_bytes
  for text in texts:
    for start in range(0, len(text), 4096):
      sentence = text[start : start + 4096]
      yield sentence
      left -= len(sentence.encode())
      if left <= 0:
        return


def check_training(model_type: str, symbols: Sequence[str]) -> None:
  """Checks the arguments of `train_sentencepiece` before any text is read.

  Raises:
    UserError: An unknown model type, or a symbol that can't be a piece.
  """
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


def _training_error(message: str, vocab_size: int, model_type: str, specials: int) -> UserError:
  """Translates SentencePiece's message about the vocabulary size into a way out."""
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
