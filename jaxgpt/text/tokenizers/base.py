"""What every tokenizer offers, and the one that needs no vocabulary: bytes."""

import abc
import hashlib
import json
import os
import re

import numpy as np
from etils import epath

from jaxgpt.errors import UserError

MASK = "<mask>"
CHAT_MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# The description of a saved tokenizer, beside its files. The other names are those that
# transformers reads, so a folder of `save` is one that it loads too.
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


THREADS = "JAXGPT_THREADS"  # environment variable: threads that `encode_batch` uses; else all cores


def threads():
  """Threads that `encode_batch` may use."""
  return int(os.environ.get(THREADS) or cores())


def cores():
  """Cores that this process may run on."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Text is text: a user's '<|user|>' or '</s>' is encoded by its characters, never as the special
  id of that name, unless `encode` is told otherwise.

  Attributes:
    kind: 'bytes', 'sentencepiece', 'huggingface' or 'tiktoken'.
    vocab_size: ids are in [0, vocab_size), tokens added to the base vocabulary included.
    bos_id, eos_id: put before and after each document; they may be equal.
    pad_id: what the vocabulary has for padding, or None. Batches are padded with 0, which has no
      weight, whatever this is.
    mask_id: stands for a masked token, or None.
    special_ids: {name: id} of the tokens that no text is encoded to.
    unk_id: stands for what can't be encoded, or None.
    chat_template: the Jinja template that came with it, or None.
    digest: sha256, in hex, of what defines the tokenizer.
  """

  kind: str
  vocab_size: int
  bos_id: int
  eos_id: int
  pad_id: int | None = None
  mask_id: int | None = None
  unk_id: int | None = None
  special_ids: dict
  chat_template: str | None = None
  digest: str

  def encode(self, text, specials=False):
    """Token ids of a text, as a list of ints, without bos and eos.

    Args:
      text: a string.
      specials: turn each name of `special_ids` in the text into its id. For text that a template
        wrote; in text of others it lets them write what only the program may.
    """
    if not specials:
      return self.encode_batch([text])[0].tolist()
    parts = self._split_at_specials(text)
    plain = iter(self.encode_batch([part for part in parts if part not in self.special_ids]))
    return [
      i
      for part in parts
      for i in ([self.special_ids[part]] if part in self.special_ids else next(plain).tolist())
    ]

  def _split_at_specials(self, text):
    names = sorted(self.special_ids, key=len, reverse=True)  # the longest name wins
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    return [part for part in parts if part]

  @abc.abstractmethod
  def encode_batch(self, texts):
    """Token ids of each text, as int32 arrays, without bos and eos; on `threads()`."""

  def decode(self, ids, specials=False):
    """The text of ids.

    Args:
      ids: integers. Those outside the vocabulary are skipped.
      specials: write specials by their names; else they are skipped too.

    Returns:
      A string. Bytes that are no valid UTF-8, as a model may well produce, become U+FFFD.
    """
    ids = np.asarray(ids, np.int64).reshape(-1)
    ids = ids[(ids >= 0) & (ids < self.vocab_size)]
    names = {i: name for name, i in self.special_ids.items() if i != self.unk_id}
    is_special = np.isin(ids, list(names))
    if not specials:
      return self._decode(ids[~is_special])
    runs = np.split(ids, np.nonzero(is_special[1:] | is_special[:-1])[0] + 1)
    return "".join(names.get(int(run[0])) or self._decode(run) for run in runs if len(run))

  @abc.abstractmethod
  def _decode(self, ids):
    """The text of ids of the vocabulary among which is no special one but for unk."""

  @abc.abstractmethod
  def files(self):
    """{name: bytes} of the files that define it; `load` makes the same tokenizer of them."""

  def save(self, folder):
    """Writes what `load` needs into a folder, local or remote, which is made if need be."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in self.files().items():
      (folder / name).write_bytes(data)
    spec = {"kind": self.kind, "digest": self.digest}
    (folder / SPEC).write_text(json.dumps(spec) + "\n")


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes: nothing to train, and any text comes back as it was."""

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

  def encode_batch(self, texts):
    return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + self._first for t in texts]

  def _decode(self, ids):
    return (ids - self._first).astype(np.uint8).tobytes().decode("utf-8", "replace")

  def files(self):
    return {}


def read_files(folder, names):
  """{name: bytes} of those of `names` that a folder has."""
  folder = epath.Path(folder)
  return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def read_json(files, name):
  """The JSON object in one of `files`, or {} where there is no such file.

  Raises:
    UserError: it is no JSON object.
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


def added_tokens(files):
  """{token: id} of what tokenizer_config.json and added_tokens.json add to a vocabulary."""
  decoder = read_json(files, CONFIG).get("added_tokens_decoder", {})
  return read_json(files, "added_tokens.json") | {
    token["content"]: int(i) for i, token in decoder.items()
  }


def role_tokens(files):
  """{'bos', 'eos', 'pad', 'mask', 'cls', 'sep', 'unk': token}, those that the files name."""
  named = read_json(files, "special_tokens_map.json") | read_json(files, CONFIG)
  out = {}
  for role in ("bos", "eos", "pad", "mask", "cls", "sep", "unk"):
    token = named.get(f"{role}_token")
    out[role] = token.get("content") if isinstance(token, dict) else token
  return {role: token for role, token in out.items() if token}


def files_digest(files):
  """sha256, in hex, of files by name and content."""
  parts = [f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items())]
  return hashlib.sha256("".join(parts).encode()).hexdigest()


def chat_template(files):
  """The Jinja chat template among a tokenizer's files: the default one where there are several."""
  if "chat_template.jinja" in files:
    return files["chat_template.jinja"].decode()
  template = read_json(files, CONFIG).get("chat_template")
  if isinstance(template, list):
    named = {entry["name"]: entry["template"] for entry in template}
    return named.get("default")
  return template
