"""A run's tokenizer as the files that transformers' AutoTokenizer loads.

Files that came from Hugging Face go back as they are. Bytes, SentencePiece and tiktoken are written
as a tokenizer.json, and only if it gives the same ids on texts that try it.
"""

import base64
import json

import numpy as np
import sentencepiece

from jaxgpt.text.tokenizers import base, huggingface, tiktoken
from jaxgpt.text.tokenizers import sentencepiece as pieces

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


def files(tokenizer, max_len):
  """What AutoTokenizer loads.

  Args:
    tokenizer: the run's.
    max_len: of the model, in tokens.

  Returns:
    ({name: bytes}, why): the files; why there are none, or ''.
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
    f"a tokenizer.json would not be exact: it splits {found[0][:60]!r} in another way; "
    "encode with jaxgpt, or with the library that the tokenizer came from"
  )


def _differences(inner, tokenizer):
  """Texts that the two encode to other ids, of the probes and of random tokens in a row."""
  rng = np.random.default_rng(0)
  drawn = rng.integers(0, tokenizer.vocab_size, (64, 256))
  texts = [*PROBES, *map(tokenizer.decode, drawn)]
  texts = [text.replace("▁", "") for text in texts]  # SentencePiece's space, which it can't tell
  theirs = inner.encode_batch(texts, add_special_tokens=False)
  ours = tokenizer.encode_batch(texts)
  return [text for text, a, b in zip(texts, theirs, ours, strict=True) if a.ids != b.tolist()]


def _config(tokenizer, max_len):
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


def _add_specials(tokenizers, inner, tokenizer):
  """The special tokens, and the bos in front of each text that our documents have."""
  by_id = sorted(tokenizer.special_ids.items(), key=lambda item: item[1])
  inner.add_special_tokens(
    [tokenizers.AddedToken(name, normalized=False, special=True) for name, _ in by_id]
  )
  bos = next(name for name, i in by_id if i == tokenizer.bos_id)
  inner.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, tokenizer.bos_id)]
  )


def _bytes(tokenizers, own):
  del own
  specials = base.ByteTokenizer()
  vocab = dict(specials.special_ids)
  vocab |= {f"<0x{b:02X}>": int(specials.encode_batch(["\0"])[0][0]) + b for b in range(256)}
  inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
  inner.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
  )
  return inner


def _pieces(own):
  """(pieces in the order of their ids, their scores, which of them are no text, id of unk)."""
  p = sentencepiece.SentencePieceProcessor(model_proto=own[pieces.MODEL])
  ids = range(p.get_piece_size())
  no_text = {p.id_to_piece(i) for i in ids if p.is_control(i) or p.is_unknown(i) or p.is_byte(i)}
  return [p.id_to_piece(i) for i in ids], [p.get_score(i) for i in ids], no_text, p.unk_id()


def _spaces(tokenizers, inner):
  """SentencePiece's mark for a space; no pre-tokenizer, as it has none."""
  inner.normalizer = tokenizers.normalizers.Replace(" ", "▁")
  inner.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("▁", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
    ]
  )
  return inner


def _sentencepiece(tokenizers, own):
  """BPE, whose scores are whole numbers, or unigram, whose scores are logarithms."""
  names, scores, no_text, unk = _pieces(own)
  if not all(s.is_integer() for name, s in zip(names, scores, strict=True) if name not in no_text):
    return _spaces(
      tokenizers,
      tokenizers.Tokenizer(
        tokenizers.models.Unigram(list(zip(names, scores, strict=True)), unk, byte_fallback=True)
      ),
    )
  rank = {name: (-scores[i], i) for i, name in enumerate(names) if name not in no_text}
  merges = [
    (rank[name], rank[name[:k]], (name[:k], name[k:]))
    for name in rank
    for k in range(1, len(name))
    if name[:k] in rank and name[k:] in rank
  ]
  merges = [pair for _, _, pair in sorted(merges)]
  vocab = {name: i for i, name in enumerate(names)}
  return _spaces(
    tokenizers,
    tokenizers.Tokenizer(
      tokenizers.models.BPE(vocab, merges, unk_token=names[unk], fuse_unk=True, byte_fallback=True)
    ),
  )


def _tiktoken(tokenizers, own):
  """Byte-level BPE: the merges are found by splitting each token with those of lower rank."""
  lines = [line.split() for line in own[tiktoken.MODEL].splitlines() if line]
  ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
  letters = _byte_letters()
  text = lambda token: "".join(letters[b] for b in token)
  merges = [
    tuple(map(text, parts))
    for token, rank in sorted(ranks.items(), key=lambda x: x[1])
    if len(parts := _halves(ranks, token, rank)) == 2
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


def _halves(ranks, token, below):
  """The parts that BPE makes of a token with the merges of lower rank alone."""
  parts = [token[i : i + 1] for i in range(len(token))]
  while len(parts) > 1:
    rank, i = min((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
    if rank >= below:
      break
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  return parts


def _byte_letters():
  """GPT-2's letter for each byte: itself where it can be printed, else one from U+0100 on."""
  printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = (b for b in range(256) if b not in printed)
  return {b: chr(b) for b in printed} | {b: chr(0x100 + i) for i, b in enumerate(others)}


_MAKERS = {
  base.ByteTokenizer.kind: _bytes,
  pieces.SentencePieceTokenizer.kind: _sentencepiece,
  tiktoken.TiktokenTokenizer.kind: _tiktoken,
}
