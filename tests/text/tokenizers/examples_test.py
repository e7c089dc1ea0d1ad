"""What is stored of each kind of document, and which of its tokens are learned."""

import numpy as np
import pytest

from jaxgpt.data import source
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import shards
from jaxgpt.text.readers import documents
from jaxgpt.text.tokenizers import chat_template, examples, tokenizer

T = tokenizer.ByteTokenizer()


class Document:
  """Like `documents.Document` with the fields of a labelled kind."""

  def __init__(self, **fields):
    self.source, self.fields, self.text = "file:1", fields, fields.get("text", "")


def encode(kind, fields, **over):
  return examples.encode_batch([Document(**fields)], kind, T, **over)[0]


def text(ids):
  """Bos as '<', eos as '>'."""
  return "".join("<" if i == T.bos_id else ">" if i == T.eos_id else T.decode([i]) for i in ids)


def trained(e):
  return [text(e.ids[a:b]) for a, b in e.trained]


def test_text_is_predicted_from_end_to_end():
  [e] = encode("text", {"text": "abc"})
  assert text(e.ids) == "<abc>" and e.ids.dtype == np.int32
  assert (e.trained, e.label, e.second) == (None, None, None)


def test_of_a_pair_of_sequences_only_the_target_and_its_end_are_predicted():
  [e] = encode("seq2seq", {"input": "in", "target": "out"})
  assert text(e.ids) == "<in\nout>"
  assert trained(e) == ["out>"]


def test_preferences_are_two_documents_with_one_prompt():
  chosen, rejected = encode("preference", {"prompt": "Q ", "chosen": "yes", "rejected": "no"})
  assert (text(chosen.ids), trained(chosen)) == ("<Q yes>", ["yes>"])
  assert (text(rejected.ids), trained(rejected)) == ("<Q no>", ["no>"])
  chosen, _ = encode("preference", {"chosen": "yes", "rejected": "no"})
  assert (text(chosen.ids), trained(chosen)) == ("<yes>", ["yes>"])


def named(ids):
  """The text with the names of special tokens."""
  names = {i: name for name, i in T.special_ids.items()}
  return "".join(names.get(i) or T.decode([i]) for i in ids.tolist())


def turns(*pairs):
  return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
  "prompt, chosen, rejected",
  [
    (turns(("user", "Q")), turns(("assistant", "yes")), turns(("assistant", "no"))),
    ("Q", turns(("assistant", "yes")), turns(("assistant", "no"))),
    (
      "other",
      turns(("user", "Q"), ("assistant", "yes")),
      turns(("user", "Q"), ("assistant", "no")),
    ),
    (turns(("user", "Q")), "yes", "no"),
  ],
)
def test_preferences_of_messages_go_through_the_template(prompt, chosen, rejected):
  fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
  a, b = encode("preference", fields, template=chat_template.load("simple", T))
  assert named(a.ids) == "<s><|user|>Q<|end|><|assistant|>yes<|end|>"
  assert [named(x.ids[slice(*x.trained[0])]) for x in (a, b)] == ["yes<|end|>", "no<|end|>"]


def test_of_preferences_only_the_last_answer_is_learned():
  both = turns(("user", "Q"), ("assistant", "A"), ("user", "R"))
  a, b = encode(
    "preference",
    {
      "prompt": "",
      "chosen": [*both, *turns(("assistant", "yes"))],
      "rejected": [*both, *turns(("assistant", "no"))],
    },
    template=chat_template.load("simple", T),
  )
  assert len(a.trained) == len(b.trained) == 1
  assert [named(x.ids[slice(*x.trained[0])]) for x in (a, b)] == ["yes<|end|>", "no<|end|>"]
  error = encode(
    "preference", {"chosen": both, "rejected": both}, template=chat_template.load("simple", T)
  )
  assert "chosen does not end with a message of role 'assistant'" in str(error)


def test_a_conversation_is_stored_as_its_template_writes_it():
  def template(messages):
    out = [examples.Piece("<s>", special=True)]
    for m in messages:
      trained = m["role"] == "assistant"
      out += [examples.Piece(m["content"], trained), examples.Piece("</s>", trained, special=True)]
    return out

  messages = [
    {"role": r, "content": c}
    for r, c in (
      ("user", "ab"),
      ("assistant", "c>d"),
      ("assistant", "e"),
      ("user", "f"),
      ("assistant", ""),
    )
  ]
  [e] = encode("chat", {"messages": messages}, template=template)
  assert text(e.ids) == "<ab>c>d>e>f>>"
  assert trained(e) == ["c>d>e>", ">"], "adjacent ranges are one; an empty answer still ends"
  [e] = encode("chat", {"messages": messages[:1]}, template=template)
  assert e.trained.shape == (0, 2)
  [e] = encode("chat", {"messages": messages}, template=lambda m: [examples.Piece("ab", True)])
  assert (text(e.ids), trained(e)) == ("ab", ["b"]), "no token precedes the first"


def test_classes_get_the_numbers_of_their_names():
  names = ("ham", "spam")
  [e] = encode("classification", {"text": "ab", "label": "spam"}, label_names=names)
  assert (text(e.ids), e.label, e.second) == ("<ab>", 1, None)
  [e] = encode(
    "classification", {"text": "ab", "text_pair": "c", "label": "ham"}, label_names=names
  )
  assert (text(e.ids), e.label, text(e.ids[e.second :])) == ("<ab>c>", 0, "c>")


@pytest.mark.parametrize("label", ["2.5", 2.5])
def test_a_number_is_a_number_in_text_too(label):
  [e] = encode("classification", {"text": "", "label": label})
  assert e.label == 2.5


def test_a_label_that_is_none():
  with pytest.raises(UserError, match=r"file:1: label 'x' is not one of a, b"):
    encode("classification", {"text": "t", "label": "x"}, label_names=("a", "b"))
  for label in ("x", "nan"):
    with pytest.raises(UserError, match=rf"file:1: label '{label}' is not a number"):
      encode("classification", {"text": "t", "label": label})


def write(folder, kind, encoded, label_names=()):
  folder.mkdir()
  writer = shards.SplitWriter(folder, "train", T, 1 << 20, kind)
  for e in encoded:
    writer.add(e, 1, "file")
  shards.write_manifest(
    folder,
    shards.make_manifest(T, {"train": writer.finish()}, documents.Dropped(), kind, label_names),
  )
  return source.open_split(folder, "train")


def test_what_was_encoded_is_read_back(tmp_path):
  fields = [{"input": "a" * n, "target": "b" * n} for n in range(5)]
  encoded = [encode("seq2seq", f)[0] for f in fields]
  encoded.append(encoded[0]._replace(trained=np.zeros((0, 2), np.int32)))
  s = write(tmp_path / "a", "seq2seq", encoded)
  assert s.kind == "seq2seq" and s.labels is None
  for doc, e in enumerate(encoded):
    np.testing.assert_array_equal(s.read(doc, 0, len(e.ids)), e.ids)
    np.testing.assert_array_equal(s.trained(doc), e.trained)
  pairs = [{"text": "a", "label": "x"}, {"text": "a", "text_pair": "b", "label": "y"}]
  s = write(
    tmp_path / "b",
    "classification",
    [encode("classification", f, label_names=("x", "y"))[0] for f in pairs],
    ("x", "y"),
  )
  assert (s.labels.tolist(), s.second.tolist(), s.label_names) == ([0, 1], [0, 3], ["x", "y"])
  assert s.trained(0) is None
