"""Conversion of a run's tokenizer to the files that transformers' AutoTokenizer loads.

Files that came from Hugging Face are written unchanged. Byte, SentencePiece and tiktoken tokenizers
are converted to a tokenizer.json, which is written only if it gives the same ids for the probes
below and for random tokens.

`tokenizers` below is the library of that name, which is optional and therefore an argument.
"""

import json
from typing import Any

import numpy as np

from jaxgpt.errors import first_line
from jaxgpt.hf import tokenizer_json
from jaxgpt.hf.tokenizer_json import Files
from jaxgpt.text.tokenizers import base, huggingface

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


def files(tokenizer: base.Tokenizer, max_len: int, template: str = "") -> tuple[Files, str]:
  """Converts a tokenizer.

  Args:
    tokenizer: The run's tokenizer.
    max_len: Longest context of the model, in tokens.
    template: Jinja source of the chat template that the model was trained in, or '': that of the
      tokenizer, if it has one.

  Returns:
    ({name: bytes}, ''), or ({}, the reason why there are no files).
  """
  found, why_not = _files(tokenizer, max_len)
  return (with_template(found, template) if template and found else found), why_not


def with_template(files: Files, template: str) -> Files:
  """The files with the template in place of the tokenizer's, unchanged if it is the same."""
  if base.chat_templates(files).get("default") == template:
    return files
  config = base.read_json(files, base.CONFIG) | {"chat_template": template}
  text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
  return {k: v for k, v in files.items() if k != "chat_template.jinja"} | {
    base.CONFIG: text.encode()
  }


def _files(tokenizer: base.Tokenizer, max_len: int) -> tuple[Files, str]:
  own = tokenizer.files()
  if tokenizer.kind == huggingface.HuggingFaceTokenizer.kind or base.CONFIG in own:
    return own | ({} if base.CONFIG in own else _config(tokenizer, max_len)), ""
  try:
    import tokenizers
  except ImportError:
    return {}, "the tokenizers library is not installed: pip install 'jaxgpt[data]'"
  try:
    inner = tokenizer_json.MAKERS[tokenizer.kind](tokenizers, own)
    _add_specials(tokenizers, inner, tokenizer)
    found = _differences(inner, tokenizer)
  except Exception as e:  # the library raises no narrower one, such as for a pattern it can't read
    return {}, f"the tokenizers library can't hold this vocabulary ({first_line(e, 100)})"
  if not found:
    return {huggingface.MODEL: inner.to_str().encode()} | _config(tokenizer, max_len), ""
  return {}, (
    f"a tokenizer.json would not be exact: it splits {found[0][:60]!r} differently; "
    "encode with jaxgpt, or with the library that the tokenizer came from"
  )


def _differences(inner: Any, tokenizer: base.Tokenizer) -> list[str]:
  """Returns the texts that the two encode differently.

  Compares the probes, random sequences of tokens, of the probes' characters, and of a few letters
  and spaces, in which the same pieces meet in many ways.
  """
  rng = np.random.default_rng(0)
  drawn = rng.integers(0, tokenizer.vocab_size, (64, 256))
  letters = list("".join(PROBES))
  few = [list("ab "), list("0123"), list(" \n\t"), list("the aeio\n")]
  texts = [*PROBES, *map(tokenizer.decode, drawn)]
  texts += ["".join(rng.choice(letters, 100)) for _ in range(64)]
  texts += ["".join(rng.choice(few[i % len(few)], 64)) for i in range(128)]
  # SentencePiece cannot tell its mark from a space.
  texts = [text.replace("▁", "") for text in texts]
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
