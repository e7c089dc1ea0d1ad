"""Training examples: encodes documents of each kind of data, and marks the tokens to train on."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.text.readers.documents import Document
from jaxgpt.text.tokenizers import labels, passages, tagged_words
from jaxgpt.text.tokenizers.base import EncodingError, Message, Range, Tokenizer
from jaxgpt.text.tokenizers.encoded import Encoded
from jaxgpt.text.tokenizers.labels import Numbering


class Piece(NamedTuple):
  """A piece of a document that is tokenized on its own."""

  text: str
  trained: bool = False  # its tokens are trained on
  special: bool = False  # the text is the name of a special token


# (messages) -> pieces. It is called with the keywords `tools` and `variables` if a conversation has
# some. With an
# attribute `in_one_go` that is true, a conversation is tokenized as a whole.
Template: TypeAlias = Callable[..., list[Piece]]


def encode_batch(
  documents: Sequence[Document],
  kind: str,
  tokenizer: Tokenizer,
  template: Template | None = None,
  label_names: Sequence[str] = (),
) -> list[list[Encoded] | UserError]:
  """Encodes documents as [bos, tokens…, eos], or a chat as its template writes it.

  text            all of it is trained on
  classification  the text, or a pair as [bos, text…, eos, text_pair…, eos], with as many eos
                  between the texts as the tokenizer puts there
  multi_label     as classification
  retrieval       two stored documents, the query and its positive
  tagging         see `tagged_words`
  question_answering  see `passages`
  seq2seq         input, a newline and the target. Only the target is trained on
  chat            the messages in the template's form with its special tokens. The assistant's
                  turns are trained on
  preference      two stored documents, prompt + chosen and prompt + rejected. The answers are
                  trained on. If one of the fields is a list of messages, both are `conversations`
                  in the template's form, and the last message is trained on

  Args:
    documents: Documents with the `fields` of their kind.
    kind: A key of `readers.kinds.KINDS`.
    tokenizer: The tokenizer.
    template: For chat and preference: a function (messages) -> pieces, such as
      `chat_template.Template`.
    label_names: Names of the classes in order, or () if labels are numbers or there are none.

  Returns:
    For each document its encoded documents, or the UserError with which the template refused it, or
    a `Refused` if its labels have no tokens.

  Raises:
    UserError: A label is not in label_names, or is not a number.
  """
  numbering = Numbering(label_names)
  if kind == "tagging":
    return [*tagged_words.encode_documents(documents, tokenizer, numbering)]
  if kind == "question_answering":
    return [*passages.encode_documents(documents, tokenizer)]
  # One call tokenizes the pieces of all documents; `_join` takes the results in the same order.
  split = [_split(document, kind, template) for document in documents]
  whole = [
    getattr(template, "in_one_go", False) and is_chat(document, kind) for document in documents
  ]
  chosen = [(stored, w) for stored, w in zip(split, whole) if not isinstance(stored, UserError)]
  texts = [
    p.text for stored, w in chosen if not w for pieces in stored for p in pieces if not p.special
  ]
  tokens = iter(tokenizer.encode_batch(texts))
  rendered = iter(_rendered([pieces for stored, w in chosen if w for pieces in stored], tokenizer))
  out: list[list[Encoded] | UserError] = []
  for document, stored, w in zip(documents, split, whole):
    if isinstance(stored, UserError):
      out.append(stored)
      continue
    encoded = [
      next(rendered) if w else _join(pieces, tokens, tokenizer, kind, document, numbering)
      for pieces in stored
    ]
    out.append(encoded)
  return out


def nothing_learned(encoded: Sequence[Encoded]) -> str:
  """The reason why there is nothing to train on in what a conversation became, or ''."""
  if all(e.trained is not None and len(e.trained) for e in encoded):
    return ""
  return (
    "no token is trained on: it has no message of role 'assistant', or only ones of weight 0, or "
    "the template does not mark them"
  )


def equal(a: Encoded, b: Encoded) -> bool:
  """Whether two encoded documents have the same tokens."""
  return np.array_equal(a.ids, b.ids)


def encode_pieces(pieces: Sequence[Piece], tokenizer: Tokenizer, in_one_go: bool) -> list[int]:
  """The ids of a conversation, such as a prompt.

  Args:
    pieces: From a template.
    tokenizer: The tokenizer.
    in_one_go: See `chat_template.Template`.
  """
  if in_one_go:
    return _rendered([pieces], tokenizer)[0].ids.tolist()
  return [i for p in pieces for i in tokenizer.encode(p.text, specials=p.special)]


def _rendered(chats: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> list[Encoded]:
  """Encodes conversations as wholes. A token is trained on if any of its characters is."""
  texts, plain, learned = [], list[list[Range]](), list[list[Range]]()
  for pieces in chats:
    text = "".join(p.text for p in pieces)
    ends = np.cumsum([len(p.text) for p in pieces]).tolist()
    spans = list(zip([0, *ends[:-1]], ends))
    special = {span for p, span in zip(pieces, spans) if p.special}
    texts.append(text)
    plain.append([span for span in tokenizer.special_ranges(text) if span not in special])
    learned.append([span for p, span in zip(pieces, spans) if p.trained])
  out = []
  for tokens, ranges in zip(tokenizer.encode_rendered(texts, plain), learned):
    is_trained = np.zeros(len(tokens.ids), bool)
    for start, end in ranges:
      is_trained |= (tokens.ends > start) & (tokens.starts < end)
    is_trained[:1] = False  # the first token has no context to predict it from
    edges = np.flatnonzero(np.diff(np.concatenate(([0], is_trained, [0]))))
    out.append(Encoded(tokens.ids, trained=edges.astype(np.int32).reshape(-1, 2)))
  return out


def or_errors(
  documents: Sequence[Document],
  encode: Callable[[Sequence[Document]], list[list[Encoded] | UserError]],
) -> list[list[Encoded] | UserError]:
  """Encodes documents in one call, or in smaller ones if the tokenizer fails on one of them.

  Args:
    documents: The documents.
    encode: `encode_batch` with its other arguments.

  Returns:
    The results of `encode`. A document that the tokenizer fails on has its `EncodingError`.
  """
  try:
    return encode(documents)
  except EncodingError as e:
    if len(documents) == 1:
      return [e]
    half = len(documents) // 2
    return or_errors(documents[:half], encode) + or_errors(documents[half:], encode)


def _split(
  document: Document, kind: str, template: Template | None
) -> list[list[Piece]] | UserError:
  """The pieces of each stored document that a document becomes, without bos and eos.

  Returns a UserError if the template refuses the document.
  """
  f = document.fields if kind != "text" else {}
  if kind == "text":
    return [[Piece(document.text)]]
  if kind in _PAIRS:
    return [[Piece(f[name]) for name in ("text", "text_pair") if f.get(name) is not None]]
  if kind == "retrieval":
    return [[Piece(f[name])] for name in ("query", "positive")]
  if kind == "seq2seq":
    return [[Piece(f["input"] + "\n"), Piece(f["target"], trained=True)]]
  if is_chat(document, kind):
    assert template is not None, "chats need a template"
    try:
      chats = [f["messages"]] if kind == "chat" else conversations(f)
      more = {"tools": f.get("tools"), "variables": f.get("chat_template_kwargs")}
      given = {name: value for name, value in more.items() if value}
      return [template(messages, **given) for messages in chats]
    except UserError as e:
      return e
  prompt = [Piece(f["prompt"])] if f.get("prompt") is not None else []
  return [[*prompt, Piece(f[name], trained=True)] for name in ("chosen", "rejected")]


_PAIRS = ("classification", "multi_label")  # kinds with one text or two
_ANSWERS = ("prompt", "chosen", "rejected")


def is_chat(document: Document, kind: str) -> bool:
  """Whether a template writes the document."""
  return kind == "chat" or (
    kind == "preference" and any(isinstance(document.fields.get(name), list) for name in _ANSWERS)
  )


def conversations(fields: Mapping[str, Any]) -> list[list[Message]]:
  """The messages of the two answers of a preference. Only the last of each is trained on.

  Each of prompt, chosen and rejected is a text or a list of messages. An answer that does not begin
  with an assistant's message contains the prompt.

  Raises:
    UserError: An answer does not end with a message of the assistant, or follows one.
  """
  out = []
  for name in ("chosen", "rejected"):
    prompt, answer = fields.get("prompt", ""), fields[name]
    if isinstance(prompt, str):
      prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(answer, str):
      answer = [{"role": "assistant", "content": answer}]
    if not answer or answer[-1]["role"] != "assistant":
      raise UserError(f"{name} does not end with a message of role 'assistant'")
    if answer[0]["role"] == "assistant" and prompt and prompt[-1]["role"] == "assistant":
      raise UserError(
        f"the prompt ends with a message of role 'assistant', which {name} follows with another"
      )
    messages = answer if answer[0]["role"] != "assistant" else [*prompt, *answer]
    out.append([*({**message, "weight": 0} for message in messages[:-1]), messages[-1]])
  return out


def _join(
  pieces: Sequence[Piece],
  tokens: Iterator[np.ndarray],
  tokenizer: Tokenizer,
  kind: str,
  document: Document,
  numbering: Numbering,
) -> Encoded:
  """Encodes pieces. `tokens` yields the tokens of each that is not special."""
  bos, eos = ([np.array([i], np.int32)] for i in (tokenizer.bos_id, tokenizer.eos_id))
  framed = not is_chat(document, kind)  # a template writes its own bos and eos
  arrays, trained, second, at = (
    list(bos) if framed else [],
    list[tuple[int, int]](),
    None,
    int(framed),
  )
  for number, piece in enumerate(pieces):
    if kind in _PAIRS and number:
      # One eos ends the first text. Others begin the second, so that a cut row keeps them all.
      arrays += eos * tokenizer.pair_ends
      second = at + 1
      at += tokenizer.pair_ends
    ids = np.array([tokenizer.special_ids[piece.text]], np.int32) if piece.special else next(tokens)
    if piece.trained:
      trained.append(
        (max(at, 1), at + len(ids))
      )  # the first token has no context to predict it from
    arrays.append(ids)
    at += len(ids)
  if framed and pieces and pieces[-1].trained:
    trained.append((at, at + 1))  # the model also learns where to stop
  stored = np.concatenate(arrays + eos if framed else arrays)
  if kind in ("text", "retrieval"):
    return Encoded(stored)
  if kind == "classification":
    return Encoded(stored, label=_label(document, numbering), second=second)
  if kind == "multi_label":
    of = [numbering.of(x, document.source, "labels") for x in document.fields["labels"]]
    return Encoded(stored, labels=np.array(sorted(of), np.int32), second=second)
  return Encoded(stored, trained=_merged(trained))


def _merged(ranges: Iterable[tuple[int, int]]) -> np.ndarray:
  """Joins adjacent ranges and drops empty ones: int32 [R, 2]."""
  out: list[list[int]] = []
  for start, end in ranges:
    if out and out[-1][1] == start:
      out[-1][1] = end
    elif end > start:
      out.append([start, end])
  return np.array(out, np.int32).reshape(-1, 2)


def _label(document: Document, numbering: Numbering) -> float:
  label = document.fields["label"]
  if numbering.names:
    return numbering.of(label, document.source)
  if labels.kind_of(str(label)) == "text":
    raise UserError(f"{document.source}: label {label!r} is not a number, but others are")
  return float(label)
