"""Conversion of byte, SentencePiece and tiktoken tokenizers to the `tokenizers` library.

`tokenizers` below is the library of that name, which is optional and therefore an argument. `own`
are the files {name: bytes} that the run's tokenizer is stored in. A conversion need not be exact:
`hf.tokenizer` compares it with the original and discards it if it is not.
"""

import base64
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from jaxgpt.errors import optional
from jaxgpt.text.tokenizers import base, tiktoken
from jaxgpt.text.tokenizers import sentencepiece as pieces

Files = dict[str, bytes]
_MARK = "▁"  # SentencePiece's sign for a space


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


def _sentencepiece(tokenizers: Any, own: Files) -> Any:
  """BPE or unigram, with the model's normalization of characters and spaces."""
  module = optional(
    "sentencepiece.sentencepiece_model_pb2", "data", "the export of a SentencePiece model"
  )
  proto = module.ModelProto.FromString(own[pieces.MODEL])
  kinds = module.ModelProto.SentencePiece
  names = [p.piece for p in proto.pieces]
  unk = next(i for i, p in enumerate(proto.pieces) if p.type == kinds.UNKNOWN)
  has_bytes = any(p.type == kinds.BYTE for p in proto.pieces)
  if proto.trainer_spec.model_type == module.TrainerSpec.BPE:
    text = [p for p in proto.pieces if p.type in (kinds.NORMAL, kinds.USER_DEFINED)]
    # Merges are tried in the order of the resulting piece's score.
    rank = {p.piece: (-p.score, i) for i, p in enumerate(text)}
    model = tokenizers.models.BPE(
      {name: i for i, name in enumerate(names)},
      _merges(rank, lambda split: rank[split[0]]),
      unk_token=names[unk],
      fuse_unk=True,
      byte_fallback=has_bytes,
    )
  else:
    scores = [(p.piece, p.score) for p in proto.pieces]
    model = tokenizers.models.Unigram(scores, unk, byte_fallback=has_bytes)
  inner = tokenizers.Tokenizer(model)
  inner.normalizer = tokenizers.normalizers.Sequence(_normalizers(tokenizers, proto))
  decoders = tokenizers.decoders
  inner.decoder = decoders.Sequence(
    [
      decoders.Replace(_MARK, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *([decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []),
    ]
  )
  symbols = [p.piece for p in proto.pieces if p.type == kinds.USER_DEFINED]
  inner.add_tokens([tokenizers.AddedToken(name, normalized=True) for name in symbols])
  return inner


def _normalizers(tokenizers: Any, proto: Any) -> list[Any]:
  """Steps of SentencePiece's normalization, in its order."""
  spec, steps = proto.normalizer_spec, tokenizers.normalizers
  out = []
  if spec.precompiled_charsmap:
    out.append(steps.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    out.append(steps.Replace(tokenizers.Regex(r"\A +| +\z"), ""))
    out.append(steps.Replace(tokenizers.Regex(" {2,}"), " "))
  if spec.add_dummy_prefix:
    out.append(steps.Prepend(_MARK))
  return [*out, steps.Replace(" ", _MARK)]


def _merges(rank: dict[Any, Any], order: Callable[[tuple[Any, Any]], Any]) -> list[tuple[Any, Any]]:
  """All splits of tokens into two tokens, by the rank of the token, then by `order`.

  A vocabulary with ranks merges any two neighbours that form a token. A list of merges does the
  same if it holds every split of every token.
  """
  return [
    split
    for token in sorted(rank, key=rank.__getitem__)
    for split in sorted(_splits(rank, token), key=order)
  ]


def _splits(rank: dict[Any, Any], token: Any) -> Iterable[tuple[Any, Any]]:
  for k in range(1, len(token)):
    if token[:k] in rank and token[k:] in rank:
      yield token[:k], token[k:]


def _tiktoken(tokenizers: Any, own: Files) -> Any:
  """Byte-level BPE.

  Of two overlapping merges to the same token, tiktoken takes the left one. If x + y = y + z, that
  is (x, y), whose second piece begins the token. So such splits come first, long x before short.
  """
  lines = [line.split() for line in own[tiktoken.MODEL].splitlines() if line.strip()]
  ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
  letters = _byte_letters()
  text = lambda token: "".join(letters[b] for b in token)
  border = lambda split: (not (split[0] + split[1]).startswith(split[1]), -len(split[0]))
  merges = [(text(a), text(b)) for a, b in _merges(ranks, border)]
  # The library reads {1,3}+ as a repeated {1,3}, tiktoken as one that gives nothing back.
  pattern = re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", json.loads(own[tiktoken.SETTINGS])["pattern"])
  inner = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {text(token): rank for token, rank in ranks.items()}, merges, ignore_merges=True
    )
  )
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  inner.decoder = tokenizers.decoders.ByteLevel()
  return inner


def _byte_letters() -> dict[int, str]:
  """Returns GPT-2's letter for each byte: the byte if printable, else a letter from U+0100 on."""
  printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = (b for b in range(256) if b not in printed)
  return {b: chr(b) for b in printed} | {b: chr(0x100 + i) for i, b in enumerate(others)}


MAKERS: dict[str, Callable[[Any, Files], Any]] = {
  base.ByteTokenizer.kind: _bytes,
  pieces.SentencePieceTokenizer.kind: _sentencepiece,
  tiktoken.TiktokenTokenizer.kind: _tiktoken,
}
