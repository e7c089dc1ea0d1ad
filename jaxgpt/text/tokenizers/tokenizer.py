"""Tokenizers by name: making the one that `--tokenizer` names, and loading a saved one."""

import json
import os
from collections.abc import Callable, Iterable, Sequence

from etils import epath

from jaxgpt.errors import UserError, first_line
from jaxgpt.storage import files
from jaxgpt.text.tokenizers import base, huggingface, tiktoken
from jaxgpt.text.tokenizers.base import ByteTokenizer, Tokenizer
from jaxgpt.text.tokenizers.sentencepiece import (
  MODEL,
  SentencePieceTokenizer,
  check_training,
  train_sentencepiece,
)

__all__ = [
  "ByteTokenizer",
  "SentencePieceTokenizer",
  "Tokenizer",
  "from_spec",
  "load",
  "train_sentencepiece",
]

_EXTRAS = (base.CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def from_spec(
  spec: str,
  sample: Callable[[], Iterable[str]],
  *,
  sample_bytes: int = 4_000_000,
  symbols: Sequence[str] = (),
) -> Tokenizer:
  """Makes the tokenizer that `--tokenizer=SPEC` names.

  Args:
    spec: 'bytes', 'sentencepiece:SIZE', 'sentencepiece:SIZE:MODEL_TYPE', or an argument of `load`.
    sample: Returns texts to train on. It is called only for training.
    sample_bytes: See `train_sentencepiece`.
    symbols: See `train_sentencepiece`.

  Raises:
    UserError: The spec is unknown, or `train_sentencepiece` or `load` fails.
  """
  kind, _, rest = spec.partition(":")
  trains = kind == "sentencepiece"
  if symbols and not trains:
    raise UserError(
      f"symbols are for a tokenizer that is trained, tokenizer={spec!r} is not; leave them out"
    )
  if spec == "bytes":
    return ByteTokenizer()
  if not trains:
    if "\0" in spec or not epath.Path(spec).exists():
      raise UserError(
        f"tokenizer={spec!r} is neither bytes, sentencepiece:SIZE nor a tokenizer's "
        "file or folder that exists"
      )
    return load(spec)
  size, _, model_type = rest.partition(":")
  if not size.isdecimal() or not 0 < int(size) < 2**31:
    raise UserError(
      f"tokenizer={spec!r} names no vocabulary size; write it as "
      "sentencepiece:4096 or sentencepiece:4096:unigram"
    )
  check_training(model_type or "bpe", symbols)
  return train_sentencepiece(
    sample(),
    vocab_size=int(size),
    model_type=model_type or "bpe",
    sample_bytes=sample_bytes,
    symbols=tuple(symbols),
  )


def folder_of(folder: epath.PathLike) -> epath.Path | None:
  """The folder whose files `load` reads: the given one, its subfolder `tokenizer`, or None."""
  path = epath.Path(folder)
  for place in (path, path / "tokenizer"):
    names = (base.SPEC, huggingface.MODEL, MODEL)
    if any((place / name).is_file() for name in names) or tiktoken.find(place):
      return place
  return None


def load(folder: epath.PathLike) -> Tokenizer:
  """Loads a tokenizer that `Tokenizer.save` wrote, or that other tools' files define.

  Args:
    folder: A folder of `save` or a prepared data folder, local or remote. Also a folder with a
      tokenizer.json (Hugging Face), a tokenizer.model (SentencePiece), or a .tiktoken file next to
      a tiktoken.json, or the .json, .model or .tiktoken file itself.

  Raises:
    UserError: There is no tokenizer, its content does not match its digest, or the library that
      reads it is not installed.
  """
  path, name = epath.Path(folder), os.fspath(folder)
  files.refuse_device(path, "tokenizer")
  try:
    return _load_any(path, name)
  except OSError as e:
    reason = e.strerror or first_line(e)
    raise UserError(f"the tokenizer in {name!r} can't be read ({reason}); check the files") from e
  except (KeyError, TypeError, AttributeError, IndexError, UnicodeDecodeError) as e:
    raise UserError(
      f"the tokenizer in {name!r} is damaged ({type(e).__name__}: {first_line(e)}); get its files "
      "again"
    ) from e


def _load_any(path: epath.Path, name: str) -> Tokenizer:
  if path.is_file():
    return _load_file(path, name)
  if place := folder_of(path):
    if (place / base.SPEC).is_file():
      return _load_saved(place)
    if (place / huggingface.MODEL).is_file():
      return huggingface.read(place)
    if (place / MODEL).is_file():
      return _load_kind(SentencePieceTokenizer.kind, place)
    if found := tiktoken.find(place):
      return tiktoken.read(found)
  raise UserError(
    f"no tokenizer in {name!r}: it is neither a .model, .tiktoken or tokenizer.json file nor a "
    f"folder with {base.SPEC}, {huggingface.MODEL} or {MODEL}; run `jaxgpt data` to make one, or "
    "save another with transformers' save_pretrained"
  )


def _load_file(path: epath.Path, name: str) -> Tokenizer:
  if path.suffix == ".json":
    return huggingface.read(path)
  if path.suffix == ".tiktoken":
    return tiktoken.read(path)
  return SentencePieceTokenizer(base.read_bytes(path), repr(name))


def _load_saved(folder: epath.Path) -> Tokenizer:
  damaged = f"the tokenizer in {os.fspath(folder)!r} is damaged: {{}}; run `jaxgpt data` again"
  try:
    spec = json.loads(base.read_bytes(folder / base.SPEC))
    kind, digest = spec["kind"], spec["digest"]
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(damaged.format(f"{base.SPEC} can't be read ({e})")) from e
  try:
    tokenizer = _load_kind(kind, folder)
  except FileNotFoundError as e:
    raise UserError(damaged.format(f"{os.path.basename(e.filename)} is missing")) from e
  if tokenizer.digest != digest:
    raise UserError(damaged.format("its content does not match its digest"))
  return tokenizer


def _load_kind(kind: str, folder: epath.Path) -> Tokenizer:
  name = os.fspath(folder)
  if kind == ByteTokenizer.kind:
    return ByteTokenizer()
  if kind == SentencePieceTokenizer.kind:
    return SentencePieceTokenizer(
      base.read_bytes(folder / MODEL), os.fspath(folder / MODEL), base.read_files(folder, _EXTRAS)
    )
  if kind == huggingface.HuggingFaceTokenizer.kind:
    (folder / huggingface.MODEL).stat()
    return huggingface.read(folder)
  if kind == tiktoken.TiktokenTokenizer.kind:
    return tiktoken.read(folder / tiktoken.MODEL)
  raise UserError(
    f"tokenizer kind {kind!r} in {name!r} is not one that this version of jaxgpt "
    "knows (bytes, sentencepiece, huggingface, tiktoken); update jaxgpt"
  )
