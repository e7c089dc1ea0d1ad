"""Documents of each kind of data to the tokens that are stored, and what is learned of them."""

from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError


class Encoded(NamedTuple):
  """One stored document.

  Attributes:
    ids: int32 [S], all stored tokens, bos and eos among them.
    trained: int32 [R, 2], ranges (start, end) of the stored tokens that are predicted; None: all
      but the first.
    label: a class's number or, for a regression, a float; None: none.
    second: stored token at which the second text of a pair starts; None: there is one text.
  """

  ids: np.ndarray
  trained: np.ndarray | None = None
  label: float | None = None
  second: int | None = None


class Piece(NamedTuple):
  """A part of a document that is tokenized on its own."""

  text: str
  trained: bool = False  # whether its tokens are predicted
  special: bool = False  # the text is the name of a special token


def encode_batch(documents, kind, tokenizer, template=None, label_names=()):
  """Documents as they are stored: [bos, tokens…, eos], but a chat as its template has it.

  text            all of it is predicted
  classification  the text; or a pair as [bos, text…, eos, text_pair…, eos]
  seq2seq         input, a line feed, and the target, which alone is predicted
  chat            the messages as the template writes them, special tokens and all; what it says
                  the assistant says is predicted
  preference      two stored documents, prompt + chosen and prompt + rejected; the answers are
                  predicted. Where one of them is a list of messages, each is a `conversation`
                  as the template has it, and its last message is predicted

  Args:
    documents: of `read.documents`, with the `fields` of their kind.
    kind: A key of `readers.kinds.KINDS`.
    tokenizer: from `tokenizer.load`.
    template: chat, preference: a function (messages) -> [Piece], such as of `chat.load`.
    label_names: classification: names of the classes, in their order; (): labels are numbers.

  Returns:
    For each document the list of its `Encoded`, or the UserError with which the template
    refused it.

  Raises:
    UserError: a label that is not in label_names, or is no number.
  """
  plans = [_plan(document, kind, template) for document in documents]
  texts = [
    p.text
    for plan in plans
    if not isinstance(plan, UserError)
    for pieces in plan
    for p in pieces
    if not p.special
  ]
  tokens = iter(tokenizer.encode_batch(texts))
  return [
    plan
    if isinstance(plan, UserError)
    else [_join(pieces, tokens, tokenizer, kind, document, label_names) for pieces in plan]
    for document, plan in zip(documents, plans)
  ]


def label_names(labels):
  """Names of the classes that labels name: sorted; () where a label is a float (a regression).

  Args:
    labels: iterable of strings, integers or floats.
  """
  found = set(labels)
  if any(isinstance(x, float) for x in found):
    return ()
  # Integers in the order of their values, before any text.
  return tuple(dict.fromkeys(str(x) for x in sorted(found, key=lambda x: (isinstance(x, str), x))))


def _plan(document, kind, template):
  """The pieces of each stored document that a document becomes; bos and eos are not among them.

  A UserError in their place says why the template has none.
  """
  f = document.fields if kind != "text" else {}
  if kind == "text":
    return [[Piece(document.text)]]
  if kind == "classification":
    return [[Piece(f[name]) for name in ("text", "text_pair") if f.get(name) is not None]]
  if kind == "seq2seq":
    return [[Piece(f["input"] + "\n"), Piece(f["target"], trained=True)]]
  if is_chat(document, kind):
    try:
      return [
        template(messages) for messages in ([f["messages"]] if kind == "chat" else conversations(f))
      ]
    except UserError as e:
      return e
  prompt = [Piece(f["prompt"])] if f.get("prompt") is not None else []
  return [[*prompt, Piece(f[name], trained=True)] for name in ("chosen", "rejected")]


def is_chat(document, kind):
  """Whether a document's messages are written by a template."""
  return kind == "chat" or (
    kind == "preference" and any(isinstance(value, list) for value in document.fields.values())
  )


def conversations(fields):
  """The messages of the two answers of a preference, of which only the last are learned.

  Each of prompt, chosen and rejected is a text or a list of messages. An answer that begins with
  another message than the assistant's holds the prompt.

  Raises:
    UserError: an answer does not end with a message of the assistant.
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
    messages = answer if answer[0]["role"] != "assistant" else [*prompt, *answer]
    out.append([*({**message, "weight": 0} for message in messages[:-1]), messages[-1]])
  return out


def _join(pieces, tokens, tokenizer, kind, document, names):
  """The `Encoded` of pieces whose tokens come next."""
  bos, eos = ([np.array([i], np.int32)] for i in (tokenizer.bos_id, tokenizer.eos_id))
  framed = not is_chat(document, kind)  # a template writes its own ends
  parts, trained, second, at = list(bos) if framed else [], [], None, int(framed)
  for number, piece in enumerate(pieces):
    if kind == "classification" and number:
      parts += eos
      at += 1
      second = at
    ids = np.array([tokenizer.special_ids[piece.text]], np.int32) if piece.special else next(tokens)
    if piece.trained:
      trained.append((max(at, 1), at + len(ids)))  # nothing precedes the first
    parts.append(ids)
    at += len(ids)
  if framed and pieces and pieces[-1].trained:
    trained.append((at, at + 1))  # where to stop is part of what is learned
  stored = np.concatenate(parts + eos if framed else parts)
  if kind == "text":
    return Encoded(stored)
  if kind == "classification":
    return Encoded(stored, label=_label(document, names), second=second)
  return Encoded(stored, trained=_merged(trained))


def _merged(ranges):
  """Adjacent ranges joined, empty ones left out: int32 [R, 2]."""
  out = []
  for start, end in ranges:
    if out and out[-1][1] == start:
      out[-1][1] = end
    elif end > start:
      out.append([start, end])
  return np.array(out, np.int32).reshape(-1, 2)


def _label(document, names):
  label = document.fields["label"]
  if names:
    if str(label) not in names:
      raise UserError(
        f"{document.source}: label {label!r} is none of {', '.join(names[:20])}; "
        "name the column of the labels with --field label=COLUMN"
      )
    return names.index(str(label))
  try:
    return float(label)
  except (TypeError, ValueError) as e:
    raise UserError(f"{document.source}: label {label!r} is no number, where others are") from e
