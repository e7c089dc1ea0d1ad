"""Conversion of a run's tokenizer to the files that transformers' AutoTokenizer loads.

Files that came from Hugging Face are written unchanged. Byte, SentencePiece and tiktoken tokenizers
are converted to a tokenizer.json, which is written only if it gives the same ids for the probes
below and for random tokens.

`tokenizers` below is the library of that name, which is optional and therefore an argument. `own`
are the files {name: bytes} that the run's tokenizer is stored in.
"""

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import sentencepiece

from jaxgpt.text.tokenizers import base, huggingface, tiktoken
from jaxgpt.text.tokenizers import sentencepiece as pieces

Files = dict[str, bytes]

PROBES = (
  "The quick brown fox jumps over the lazy dog.",
  "",
  " ",
  "  two  spaces   three",
  "\n\n\t\ttab\r\n",
  "def f(x):\n  return {k: v**2 for k, v in x.items() if v != 3.14159}\n",
  "1234567890 12 345",
  "naïve façade — “quoted” … 東京都 привет мир مرحبا 🙂🙃 👩‍👩‍👧 e\u0301 \u00a0\u200b",
  "aaaaaaaaaaaaaaaaaaaaaaa bbb abababab the the thethe  thethe",
  "x" * 40 + " y" * 20,
  "It's they're I'll DON'T [CLS] http://a.b/c?d=e&f=g#h <p class='x'>",
  "\x00\x07\x7f\ufffd",
)


def files(tokenizer: base.Tokenizer, max_len: int) -> tuple[Files, str]:
  """Converts a tokenizer.

  Args:
    tokenizer: The run's tokenizer.
    max_len: Longest context of the model, in tokens.

  Returns:
    ({name: bytes}, ''), or ({}, the reason why there are no files).
  """
  own = tokenizer.files()
  if tokenizer.kind == huggingface.HuggingFaceTokenizer.kind or base.CONFIG in own:
    return own | ({} if base.CONFIG in own else _config(tokenizer, max_len)), ""
  try:
    import tokenizers
  except ImportError:
    return {}, "the tokenizers library is not installed: pip install 'jaxgpt[data]'"
  inner = _MAKERS[tokenizer.kind](tokenizers, own)
  _add_specials(tokenizers, inner, tokenizer)
  found = _differences(inner, tokenizer)
  if not found:
    return {huggingface.MODEL: inner.to_str().encode()} | _config(tokenizer, max_len), ""
  return {}, (
    f"a tokenizer.json would not be exact: it splits {found[0][:60]!r} differently; "
    "encode with jaxgpt, or with the library that the tokenizer came from"
  )


def _differences(inner: Any, tokenizer: base.Tokenizer) -> list[str]:
  """Returns the texts that the two encode differently: probes and 64 random sequences."""
  rng = np.random.default_rng(0)
  drawn = rng.integers(0, tokenizer.vocab_size, (64, 256))
  texts = [*PROBES, *map(tokenizer.decode, drawn)]
  texts = [
    text.replace("▁", "") for text in texts
  ]  # SentencePiece cannot tell its mark from a space
  theirs = inner.encode_batch(texts, add_special_tokens=False)
  ours = tokenizer.encode_batch(texts)
  return [text for text, a, b in zip(texts, theirs, ours, strict=True) if a.ids != b.tolist()]


def _config(tokenizer: base.Tokenizer, max_len: int) -> Files:
  """Returns the tokenizer_config.json."""
  names = {i: name for name, i in tokenizer.special_ids.items()}
  roles = {
    f"{role}_token": names.get(getattr(tokenizer, f"{role}_id"))
    for role in ("bos", "eos", "pad", "mask", "unk")
  }
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": max_len,
    "clean_up_tokenization_spaces": False,
    **{k: v for k, v in roles.items() if v},
  }
  if tokenizer.chat_template:
    config["chat_template"] = tokenizer.chat_template
  return {base.CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def _add_specials(tokenizers: Any, inner: Any, tokenizer: base.Tokenizer) -> None:
  """Adds the special tokens, and bos at the start of each text, as in our documents."""
  by_id = sorted(tokenizer.special_ids.items(), key=lambda item: item[1])
  inner.add_special_tokens(
    [tokenizers.AddedToken(name, normalized=False, special=True) for name, _ in by_id]
  )
  bos = next(name for name, i in by_id if i == tokenizer.bos_id)
  inner.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, tokenizer.bos_id)]
  )


def _bytes(tokenizers: Any, own: Files) -> Any:
  """BPE without merges, whose byte fallback gives every byte its own token."""
  del own
  specials = base.ByteTokenizer()
  vocab = dict(specials.special_ids)
  vocab |= {f"<0x{b:02X}>": int(specials.encode_batch(["\0"])[0][0]) + b for b in range(256)}
  inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
  inner.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
  )
  return inner


def _pieces(own: Files) -> tuple[list[str], list[float], set[str], int]:
  """Returns the pieces by id, their scores, the pieces that are not text, and the id of unk."""
  p = sentencepiece.SentencePieceProcessor(model_proto=own[pieces.MODEL])
  ids = range(p.get_piece_size())
  no_text = {p.id_to_piece(i) for i in ids if p.is_control(i) or p.is_unknown(i) or p.is_byte(i)}
  return [p.id_to_piece(i) for i in ids], [p.get_score(i) for i in ids], no_text, p.unk_id()


def _spaces(tokenizers: Any, inner: Any) -> Any:
  """Adds SentencePiece's mark for a space. Like SentencePiece, there is no pre-tokenizer."""
  inner.normalizer = tokenizers.normalizers.Replace(" ", "▁")
  inner.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("▁", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
    ]
  )
  return inner


def _sentencepiece(tokenizers: Any, own: Files) -> Any:
  """BPE or unigram. Scores tell them apart: whole numbers in BPE, logarithms in unigram.

  A BPE model stores pieces with scores, but no merges. Every split of a piece into two pieces is a
  possible merge, and SentencePiece tries merges in the order of the resulting piece's score.
  """
  names, scores, no_text, unk = _pieces(own)
  if not all(s.is_integer() for name, s in zip(names, scores, strict=True) if name not in no_text):
    return _spaces(
      tokenizers,
      tokenizers.Tokenizer(
        tokenizers.models.Unigram(list(zip(names, scores, strict=True)), unk, byte_fallback=True)
      ),
    )
  rank = {name: (-scores[i], i) for i, name in enumerate(names) if name not in no_text}
  ranked = [
    (rank[name], rank[name[:k]], (name[:k], name[k:]))
    for name in rank
    for k in range(1, len(name))
    if name[:k] in rank and name[k:] in rank
  ]
  merges = [pair for _, _, pair in sorted(ranked)]
  vocab = {name: i for i, name in enumerate(names)}
  return _spaces(
    tokenizers,
    tokenizers.Tokenizer(
      tokenizers.models.BPE(vocab, merges, unk_token=names[unk], fuse_unk=True, byte_fallback=True)
    ),
  )


def _tiktoken(tokenizers: Any, own: Files) -> Any:
  """Byte-level BPE. tiktoken stores ranks of tokens, but no merges.

  The merge of a token is found by encoding it with the tokens of lower rank alone: the last two
  pieces left are the ones that it is merged from.
  """
  lines = [line.split() for line in own[tiktoken.MODEL].splitlines() if line]
  ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
  letters = _byte_letters()
  text = lambda token: "".join(letters[b] for b in token)
  merges = [
    tuple(map(text, halves))
    for token, rank in sorted(ranks.items(), key=lambda x: x[1])
    if len(halves := _halves(ranks, token, rank)) == 2
  ]
  settings = json.loads(own[tiktoken.SETTINGS])
  inner = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {text(token): rank for token, rank in ranks.items()}, merges, ignore_merges=True
    )
  )
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(settings["pattern"]), "isolated"),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  inner.decoder = tokenizers.decoders.ByteLevel()
  return inner


def _halves(ranks: dict[bytes, int], token: bytes, below: int) -> list[bytes]:
  """Encodes a token by BPE with the tokens whose rank is lower than `below`."""
  out = [token[i : i + 1] for i in range(len(token))]
  while len(out) > 1:
    rank, i = min((ranks.get(out[i] + out[i + 1], below), i) for i in range(len(out) - 1))
    if rank >= below:
      break
    out[i : i + 2] = [out[i] + out[i + 1]]
  return out


def _byte_letters() -> dict[int, str]:
  """Returns GPT-2's letter for each byte: the byte if printable, else a letter from U+0100 on."""
  printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = (b for b in range(256) if b not in printed)
  return {b: chr(b) for b in printed} | {b: chr(0x100 + i) for i, b in enumerate(others)}


_MAKERS: dict[str, Callable[[Any, Files], Any]] = {
  base.ByteTokenizer.kind: _bytes,
  pieces.SentencePieceTokenizer.kind: _sentencepiece,
  tiktoken.TiktokenTokenizer.kind: _tiktoken,
}
