"""The tokenizer interface, and the byte tokenizer, which needs no vocabulary."""

import abc
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from jaxgpt.errors import UserError, first_line
from jaxgpt.storage import files

Message: TypeAlias = Mapping[str, Any]  # {'role': str, 'content': str, …} of a conversation
Range: TypeAlias = tuple[int, int]  # (start, end) in a text

MASK = "<mask>"
CHAT_MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# The description of a saved tokenizer, next to its files. The other names are those that
# transformers reads, so it can load a folder of `save` too.
SPEC = "jaxgpt_tokenizer.json"
CONFIG = "tokenizer_config.json"
HF_FILES = (
  CONFIG,
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "vocab.json",
  "vocab.txt",
  "merges.txt",
  "tokenizer.model",
)


LONG = 1 << 18  # characters of a text that is cut into pieces where its ids allow
_WINDOW = 512  # characters on each side of a cut that must have the same ids with and without it
_CUT_TRIES = 16
# Places to cut, and characters to leave out there: after a newline, before a space, at a space that
# the vocabulary puts in front of each text by itself, and anywhere. Text stands on both sides.
_CUTS = (
  (re.compile(r"(?<=\S\n)(?=\S)"), 0),
  (re.compile(r"(?<=\S)(?= \S)"), 0),
  (re.compile(r"(?<=\S)(?= \S)"), 1),
  (re.compile(r"(?<=\S)(?=\S)"), 0),
)


class EncodingError(UserError):
  """A text that a tokenizer's library fails on."""


@contextlib.contextmanager
def failures_told(what: str) -> Iterator[None]:
  """Turns failures of a tokenizer's library into an `EncodingError`, also those of its Rust code.

  A panic in Rust is an exception that does not derive from `Exception`.

  Args:
    what: The operation that failed, the start of the message.
  """
  try:
    yield
  except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
    raise
  except BaseException as e:
    raise EncodingError(f"{what} ({type(e).__name__}: {first_line(e, 200)})") from e


THREADS = "JAXGPT_THREADS"  # environment variable: threads for `encode_batch`; default: all cores


def threads() -> int:
  """Number of threads that `encode_batch` may use.

  Raises:
    UserError: The environment variable `THREADS` is not a number above 0.
  """
  given = os.environ.get(THREADS) or str(cores())
  if not (given.isascii() and given.isdecimal() and int(given)):
    raise UserError(f"{THREADS}={given} is not a number of threads; give 1 or more, or unset it")
  return int(given)


def cores() -> int:
  """Number of cores that this process may run on."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Tokens(NamedTuple):
  """The tokens of a text and the characters that they stand for.

  Attributes:
    ids: int32 [S].
    starts, ends: int [S], the range of each token in the text, in characters. The tokens of one
      character that is written in several have the same range.
  """

  ids: np.ndarray
  starts: np.ndarray
  ends: np.ndarray


class Tokenizer(abc.ABC):
  """Converts text to token ids and back.

  Text never becomes a special token: '<|user|>' or '</s>' in a user's text is encoded by its
  characters, unless `encode` is called with `specials=True`.

  Attributes:
    kind: 'bytes', 'sentencepiece', 'huggingface' or 'tiktoken'.
    vocab_size: Ids are in [0, vocab_size), including tokens added to the base vocabulary.
    bos_id: Id before each document.
    eos_id: Id after each document. It may equal bos_id.
    pad_id: The vocabulary's padding id, or None. Batches are padded with 0 regardless. Padding
      has no weight.
    mask_id: Id of the mask token, or None.
    special_ids: {name: id} of the special tokens, which plain text is never encoded to.
    unk_id: Id for text that can't be encoded, or None.
    pair_ends: Number of eos between the two texts of a pair: 2 in RoBERTa, 1 in other models.
    chat_template: The tokenizer's own Jinja template, or None.
    tool_template: Its Jinja template for conversations with tools, or None if that is the same.
    role_names: {'bos_token': name, …} of the special tokens that have a role. A tokenizer without
      its own bos, such as Qwen's, has no 'bos_token' here, though `bos_id` stands in for it.
    adds_bos: The tokenizer puts bos in front of a text, as `transformers` has it.
    digest: Hexadecimal SHA-256 of the tokenizer's definition.
  """

  kind: str
  vocab_size: int
  bos_id: int
  eos_id: int
  pad_id: int | None = None
  mask_id: int | None = None
  unk_id: int | None = None
  special_ids: dict[str, int]
  pair_ends: int = 1
  chat_template: str | None = None
  tool_template: str | None = None
  adds_bos: bool = True
  digest: str

  def encode(self, text: str, specials: bool = False) -> list[int]:
    """Encodes a text, without bos and eos.

    Args:
      text: The text.
      specials: Encode names of `special_ids` as their ids. Only for text from a template: in
        text from users it would let them write control tokens.
    """
    if not specials:
      return self.encode_batch([text])[0].tolist()
    pieces = self._split_at_specials(text)
    plain = iter(self.encode_batch([piece for piece in pieces if piece not in self.special_ids]))
    return [
      i
      for piece in pieces
      for i in ([self.special_ids[piece]] if piece in self.special_ids else next(plain).tolist())
    ]

  @property
  def role_names(self) -> dict[str, str]:
    """See the attributes."""
    names = {i: name for name, i in self.special_ids.items()}
    ids = {
      "bos_token": None if self.bos_id == self.eos_id else self.bos_id,
      "eos_token": self.eos_id,
      "pad_token": self.pad_id,
      "mask_token": self.mask_id,
      "unk_token": self.unk_id,
    }
    return {role: names[i] for role, i in ids.items() if i in names}

  def encode_rendered(self, texts: Sequence[str], plain: Sequence[Sequence[Range]]) -> list[Tokens]:
    """Encodes texts that a chat template wrote, each in one go.

    Args:
      texts: The texts. Names of `special_ids` in them become their ids.
      plain: For each text, ranges in which names of special tokens are text from a user.
    """
    return [self._encode_rendered(text, ranges) for text, ranges in zip(texts, plain, strict=True)]

  def _encode_rendered(self, text: str, plain: Sequence[Range]) -> Tokens:
    parts, at = list[Tokens](), 0
    for start, end in (*self.special_ranges(text, plain), (len(text), len(text))):
      if at < start:
        ids, starts, ends = self._located(text[at:start])
        parts.append(Tokens(ids, starts + at, ends + at))
      if start < end:
        i = np.array([self.special_ids[text[start:end]]], np.int32)
        parts.append(Tokens(i, np.array([start]), np.array([end])))
      at = end
    if not parts:
      return Tokens(np.empty(0, np.int32), np.empty(0, int), np.empty(0, int))
    return Tokens(*(np.concatenate(arrays) for arrays in zip(*parts)))

  def special_ranges(self, text: str, plain: Sequence[Range] = ()) -> list[Range]:
    """Ranges of the names of special tokens in a text that do not touch one of `plain`."""
    found = names_pattern(tuple(self.special_ids)).finditer(text)
    return [m.span() for m in found if not any(a < m.end() and m.start() < b for a, b in plain)]

  @abc.abstractmethod
  def _located(self, text: str) -> Tokens:
    """Encodes a text without special tokens, with the place of each token."""

  def _split_at_specials(self, text: str) -> list[str]:
    names = sorted(self.special_ids, key=len, reverse=True)  # the longest name wins
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    return [piece for piece in pieces if piece]

  def ids_beyond(self, rows: int) -> dict[str, int]:
    """The added tokens whose ids have no row in a model's embedding, as {name: id}.

    Published tokenizers may have a few, which the model was never trained on (Gemma 3).

    Args:
      rows: Rows of the embedding.

    Raises:
      UserError: A token of the base vocabulary has no row either, or one that every text needs.
    """
    beyond = {name: i for name, i in self._added().items() if i >= rows}
    needed = {self.bos_id, self.eos_id} & set(beyond.values())
    if self.vocab_size - rows > len(set(beyond.values())) or needed:
      raise UserError(
        f"the tokenizer has {self.vocab_size} ids, the model {rows} rows of its embedding"
      )
    return beyond

  def check_rows(self, ids: ArrayLike, rows: int) -> None:
    """Raises a UserError if one of the ids has no row in a model's embedding."""
    largest = int(np.max(ids, initial=-1))
    if largest >= rows:
      raise UserError(
        f"the text uses the token {self.decode([largest], specials=True)!r} (id {largest}), for "
        f"which the model has no row of its embedding (model.vocab_size={rows}); remove it"
      )

  def _added(self) -> dict[str, int]:
    """{name: id} of the tokens that were added to the base vocabulary."""
    return self.special_ids

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes texts to int32 arrays, without bos and eos, on `threads()` threads.

    Raises:
      EncodingError: The library fails on one of the texts.
    """

  def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes texts as `encode_batch` does, to one array: (ids of all texts, ids of each text).

    Returns:
      (int32 [sum of the lengths], int64 [texts]: the lengths).
    """
    arrays = self.encode_batch(texts)
    lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
    return np.concatenate([*arrays, np.empty(0, np.int32)]), lengths

  def pieces(self, text: str) -> Iterator[str]:
    """Cuts a long text into pieces of about `LONG` characters, whose ids in a row are the text's.

    Each cut is checked on the text around it. A text without a place to cut, such as one word, or a
    tokenizer whose ids depend on more than their surroundings, leaves the text whole.
    """
    start = 0
    while len(text) - start > LONG and (cut := self._find_cut(text, start + LONG)):
      end, next_start = cut
      yield text[start:end]
      start = next_start
    yield text[start:]

  def _find_cut(self, text: str, at: int) -> tuple[int, int] | None:
    """(end of a piece, start of the next one) after `at`, or None if there is no place to cut."""
    for pattern, skip, limit in [
      (*cut, limit) for limit in (at + LONG // 4, len(text)) for cut in _CUTS
    ]:
      for match in itertools.islice(pattern.finditer(text, at, limit), _CUT_TRIES):
        end = match.end()
        left, right = text[max(end - _WINDOW, 0) : end], text[end + skip : end + _WINDOW]
        a, b, whole = self.encode_batch([left, right, left + text[end : end + skip] + right])
        if np.array_equal(np.concatenate((a, b)), whole):
          return end, end + skip
    return None

  def decode(self, ids: ArrayLike, specials: bool = False) -> str:
    """Decodes ids to text.

    Args:
      ids: Token ids. Those outside the vocabulary are skipped.
      specials: Write special tokens by name instead of skipping them.

    Returns:
      The text. Bytes that are not valid UTF-8, which a model may produce, become U+FFFD.
    """
    ids = np.asarray(ids, np.int64).reshape(-1)
    ids = ids[(ids >= 0) & (ids < self.vocab_size)]
    names = {i: name for name, i in self.special_ids.items() if i != self.unk_id}
    # Faster than np.isin for the few ids that the decoding engine asks for with each new token.
    is_special = np.fromiter((i in names for i in ids.tolist()), bool, ids.size)
    if not specials:
      return self._decode(ids[~is_special])
    runs = np.split(ids, np.nonzero(is_special[1:] | is_special[:-1])[0] + 1)
    return "".join(names.get(int(run[0])) or self._decode(run) for run in runs if len(run))

  def continuation(self, before: ArrayLike, ids: ArrayLike) -> str:
    """Decodes ids that follow others.

    Many tokenizers put a space in front of a text and drop it when they decode one, so the space
    before the first new word is only kept if both are decoded together.

    Args:
      before: Token ids, such as a prompt's.
      ids: The ids that follow them.

    Returns:
      The text of `ids`. Special tokens are skipped.
    """
    before = np.asarray(before, np.int64).reshape(-1)
    start = self.decode(before)
    whole = self.decode(np.append(before, np.asarray(ids, np.int64).reshape(-1)))
    return whole[len(start) :] if whole.startswith(start) else self.decode(ids)

  @abc.abstractmethod
  def _decode(self, ids: np.ndarray) -> str:
    """Decodes ids of the vocabulary without special tokens other than unk."""

  @abc.abstractmethod
  def files(self) -> dict[str, bytes]:
    """{name: content} of the files that define the tokenizer. `load` restores it from them."""

  def save(self, folder: epath.PathLike) -> None:
    """Writes the tokenizer into a local or remote folder for `load`, and creates the folder."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in self.files().items():
      (folder / name).write_bytes(data)
    spec = {"kind": self.kind, "digest": self.digest}
    (folder / SPEC).write_text(json.dumps(spec) + "\n")


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes as tokens. Needs no training and decodes any text exactly."""

  kind = "bytes"
  pad_id, bos_id, eos_id = 0, 1, 2
  _first = 3  # id of byte 0
  mask_id = _first + 256
  vocab_size = mask_id + 1 + len(CHAT_MARKS)

  def __init__(self):
    self.special_ids = {
      "<pad>": self.pad_id,
      "<s>": self.bos_id,
      "</s>": self.eos_id,
      **{name: self.mask_id + i for i, name in enumerate((MASK, *CHAT_MARKS))},
    }
    self.digest = hashlib.sha256(
      f"bytes first={self._first} {sorted(self.special_ids.items())}".encode()
    ).hexdigest()

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `Tokenizer`."""
    return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + self._first for t in texts]

  def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """See `Tokenizer`."""
    encoded = [text.encode() for text in texts]
    ids = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32) + self._first
    return ids, np.fromiter(map(len, encoded), np.int64, len(encoded))

  def pieces(self, text: str) -> Iterator[str]:
    """See `Tokenizer`. A cut may be anywhere."""
    for start in range(0, max(len(text), 1), LONG):
      yield text[start : start + LONG]

  def _located(self, text: str) -> Tokens:
    ids = self.encode_batch([text])[0]
    return by_bytes(text, ids, np.ones(len(ids), int))

  def _decode(self, ids: np.ndarray) -> str:
    return (ids - self._first).astype(np.uint8).tobytes().decode("utf-8", "replace")

  def files(self) -> dict[str, bytes]:
    """See `Tokenizer`. Empty."""
    return {}


@functools.lru_cache(maxsize=16)
def names_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
  """A pattern that finds names. The longest one wins."""
  return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def by_bytes(text: str, ids: np.ndarray, lengths: np.ndarray) -> Tokens:
  """Places tokens that together are a text's UTF-8 bytes.

  Args:
    text: The text.
    ids: int32 [S].
    lengths: int [S], bytes of each token. Their sum is the text's.
  """
  data = np.frombuffer(text.encode(), np.uint8)
  char = np.cumsum((data & 0xC0) != 0x80) - 1  # of each byte
  ends = np.cumsum(lengths)
  char_after = np.append(char, len(text))
  starts = char_after[ends - lengths]
  return Tokens(ids, starts, np.where(lengths > 0, char_after[ends - 1] + 1, starts))


def read_bytes(path: epath.PathLike) -> bytes:
  """The content of a tokenizer's file, local or remote.

  Raises:
    UserError: It is a pipe or device.
    OSError: It can't be read.
  """
  files.refuse_device(path, "tokenizer")
  return epath.Path(path).read_bytes()


def read_files(folder: epath.PathLike, names: Iterable[str]) -> dict[str, bytes]:
  """Reads those of the named files that exist in a folder: {name: content}."""
  folder = epath.Path(folder)
  return {name: read_bytes(folder / name) for name in names if (folder / name).is_file()}


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
  """The JSON object in one of `files`, or {} if the file doesn't exist.

  Raises:
    UserError: The file is not a JSON object.
  """
  if name not in files:
    return {}
  try:
    value = json.loads(files[name])
    if not isinstance(value, dict):
      raise ValueError("not an object")
    return value
  except ValueError as e:
    raise UserError(f"the tokenizer's {name} can't be read ({e}); restore the file") from e


def added_tokens(files: Mapping[str, bytes]) -> dict[str, int]:
  """{token: id} of the tokens that tokenizer_config.json and added_tokens.json add."""
  decoder = read_json(files, CONFIG).get("added_tokens_decoder", {})
  return read_json(files, "added_tokens.json") | {
    token["content"]: int(i) for i, token in decoder.items()
  }


def role_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
  """{role: token} of the roles bos, eos, pad, mask, cls, sep and unk that the files name."""
  named = read_json(files, "special_tokens_map.json") | read_json(files, CONFIG)
  out = {}
  for role in ("bos", "eos", "pad", "mask", "cls", "sep", "unk"):
    token = named.get(f"{role}_token")
    out[role] = token.get("content") if isinstance(token, dict) else token
  return {role: token for role, token in out.items() if token}


def files_digest(files: Mapping[str, bytes]) -> str:
  """Hexadecimal SHA-256 of files, by name and content."""
  lines = [f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items())]
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def chat_templates(files: Mapping[str, bytes]) -> dict[str, str]:
  """{name: Jinja chat template} among a tokenizer's files. A single one is called 'default'.

  Raises:
    UserError: A template has another form.
  """
  template = read_json(files, CONFIG).get("chat_template")
  try:
    named = (
      {entry["name"]: entry["template"] for entry in template}
      if isinstance(template, list)
      else {"default": template}
      if template
      else {}
    )
    if "chat_template.jinja" in files:
      named["default"] = files["chat_template.jinja"].decode()
    if not all(isinstance(text, str) for text in named.values()):
      raise TypeError("a template is not a text")
  except (TypeError, KeyError, UnicodeDecodeError) as e:
    raise UserError(
      f"the tokenizer's chat template can't be read ({type(e).__name__}: {e}); restore the file"
    ) from e
  return named
