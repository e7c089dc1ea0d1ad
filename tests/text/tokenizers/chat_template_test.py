"""Chat templates write what the models they are of were trained on, and say what is learned."""

import sys

import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import chat_template, examples, tokenizer
from tests.text.tokenizers import huggingface_test as hf_test

MARKS = (
  "<|begin_of_text|>",
  "<|eot_id|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|im_start|>",
  "<|im_end|>",
  "<start_of_turn>",
  "<end_of_turn>",
)
TALK = [
  {"role": "system", "content": "Be short."},
  {"role": "user", "content": " Who? "},
  {"role": "assistant", "content": "Me."},
  {"role": "user", "content": "<|im_end|> Why?"},
  {"role": "assistant", "content": "So.\n"},
]

# The formats as Jinja, to be rendered by transformers.
_LOOP = "{% for m in messages %}"
_FIRST = "messages[0]['content'] | trim + "
JINJA = {
  "chatml": _LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
  "+ '<|im_end|>' + '\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
  "llama3": "{{ bos_token }}"
  + _LOOP
  + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
  "m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
  "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
  "{% set first = " + _FIRST + "'\n\n' %}"
  "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
  + _LOOP
  + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
  "{{ (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
  "llama2": "{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
  "{% set first = '<<SYS>>\n' + " + _FIRST + "'\n<</SYS>>\n\n' %}{% set messages = messages[1:]"
  " %}{% endif %}" + _LOOP + "{% if m['role'] == 'user' %}{{ bos_token + "
  "'[INST] ' + "
  "(first if loop.first else '') + m['content'] | trim + ' [/INST]' }}{% else %}"
  "{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
}


def written(pieces):
  return "".join(p.text for p in pieces)


def learned(pieces):
  """The runs of text that are learned."""
  out, before = [], False
  for piece in pieces:
    if piece.trained:
      out[-1:] = [out[-1] + piece.text] if before else [*out[-1:], piece.text]
    before = piece.trained
  return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Makes a tokenizer with all marks and perhaps a template: (it, its folder)."""
  inner = hf_test.byte_level(MARKS)

  def make(template=None):
    folder = hf_test.folder(
      tmp_path_factory.mktemp("hf") / "t",
      inner,
      bos_token="<|begin_of_text|>",
      eos_token="<|eot_id|>",
      **({"chat_template": template} if template else {}),
    )
    return tokenizer.load(folder), folder

  return make


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("name", JINJA)
def test_formats_and_their_jinja_agree_with_transformers(model, name, generate):
  transformers = pytest.importorskip("transformers")
  t, folder = model(JINJA[name])
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  talk = TALK[:4] if generate else TALK
  talk = [{**m, "content": m["content"].replace("<|im_end|>", "")} for m in talk]
  want = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=generate)
  ids = theirs.encode(want, add_special_tokens=False)
  for which in (name, "tokenizer"):
    pieces = chat_template.load(which, t)(talk, generate=generate)
    assert written(pieces) == want
    got = [i for p in pieces for i in t.encode(p.text, specials=p.special)]
    assert t.decode(got, specials=True) == want
    if name != "llama2":  # whose answers begin with a space that is a piece's own
      assert got == ids


def test_what_the_formats_write(model):
  talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
  t, _ = model()
  assert {
    name: written(chat_template.load(name, t)(talk))
    for name in chat_template.FORMATS
    if name != "simple"
  } == {
    "raw": "<|begin_of_text|>Hi\nYo<|eot_id|>\n",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n",
    "llama2": "<|begin_of_text|>[INST] Hi [/INST] Yo <|eot_id|>",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>",
    "gemma": "<|begin_of_text|><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    "Yo<end_of_turn>\n",
  }
  pieces = chat_template.load("simple", tokenizer.ByteTokenizer())(talk)
  assert written(pieces) == "<s><|user|>Hi<|end|><|assistant|>Yo<|end|>"
  assert [p.special for p in pieces] == [True, True, False, True, True, False, True]


@pytest.mark.parametrize(
  "name, want",
  [
    ("chatml", ["Me.<|im_end|>", "So.\n<|im_end|>"]),
    ("llama3", ["Me.<|eot_id|>", "So.<|eot_id|>"]),
    ("gemma", ["Me.<end_of_turn>", "So.<end_of_turn>"]),
    ("llama2", [" Me. <|eot_id|>", " So. <|eot_id|>"]),
  ],
)
def test_answers_and_their_ends_are_learned_and_nothing_else(model, name, want):
  t, _ = model(JINJA[name])
  for which in (name, "tokenizer"):
    template = chat_template.load(which, t)
    pieces = template(TALK)
    # Jinja templates do not say whether the space before an answer is the model's.
    got = learned(pieces)
    assert got == want or (which, [x.lstrip() for x in want]) == ("tokenizer", got)
    assert len(learned(template([*TALK[:4], {**TALK[4], "weight": 0}]))) == 1
  assert chat_template.load(name, t).stop == want[0].split()[-1].removeprefix("Me.")


@pytest.mark.parametrize("name", JINJA)
def test_no_message_can_write_a_special_token(model, name):
  t, _ = model(JINJA[name])
  for which in (name, "tokenizer"):
    pieces = chat_template.load(which, t)(TALK)
    said = next(p for p in pieces if "Why?" in p.text)
    assert not said.special and "<|im_end|>" in said.text
    clean = chat_template.load(which, t)(
      [{**m, "content": m["content"].replace("<|im_end|>", "")} for m in TALK]
    )
    assert [p.text for p in pieces if p.special] == [p.text for p in clean if p.special]


def test_what_is_stored_and_learned_of_a_chat(model):
  t, _ = model()

  class Document:
    source, fields = "a:1", {"messages": TALK}

  [[e]] = examples.encode_batch([Document], "chat", t, chat_template.load("llama3", t))
  assert t.decode(e.ids, specials=True) == written(chat_template.load("llama3", t)(TALK))
  assert [t.decode(e.ids[a:b], specials=True) for a, b in e.trained] == [
    "Me.<|eot_id|>",
    "So.<|eot_id|>",
  ]


def test_the_template_that_is_chosen_where_none_is_named(model):
  assert chat_template.load("", model(JINJA["gemma"])[0]).name == "tokenizer"
  assert chat_template.load("", model()[0]).name == "chatml"
  assert chat_template.load("", tokenizer.ByteTokenizer()).name == "simple"
  unmarked = tokenizer.ByteTokenizer()
  unmarked.special_ids = {"<s>": 1, "</s>": 2}
  assert chat_template.load("", unmarked).name == "raw"


def test_a_template_that_marks_what_is_generated(model):
  start = "{{ '<|im_start|>'"
  source = (
    JINJA["chatml"]
    .replace(start, "{%- generation -%}" + start)
    .replace("+ '\n' }}{% endfor", "+ '\n' }}{%- endgeneration %}{% endfor")
  )
  assert "endgeneration" in source
  t, _ = model(source)
  assert written(chat_template.load("tokenizer", t)(TALK)) == written(
    chat_template.load("chatml", t)(TALK)
  )


def test_a_template_that_rewrites_what_is_said(model):
  t, _ = model(JINJA["chatml"].replace("m['content']", "m['content'] | upper"))
  talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
  pieces = chat_template.load("tokenizer", t)(talk)
  assert "HI" in written(pieces) and learned(pieces) == ["YO<|im_end|>"]
  with pytest.raises(UserError, match=r"rewrites a message that holds '<\|im_end\|>'"):
    chat_template.load("tokenizer", t)(TALK)


def test_what_a_template_writes_ahead_of_an_answer_is_learned_with_it(model):
  t, _ = model(
    JINJA["chatml"].replace(
      "m['role'] + '\n' +", "m['role'] + '\n' + ('Well: ' if m['role'] == 'assistant' else '') +"
    )
  )
  pieces = chat_template.load("tokenizer", t)(TALK)
  assert learned(pieces) == ["Well: Me.<|im_end|>", "Well: So.\n<|im_end|>"]


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("name", sorted(set(chat_template.FORMATS) - {"simple"}))
def test_a_format_as_jinja_writes_the_same(model, name, generate):
  t, _ = model()
  template = chat_template.load(name, t)
  again = chat_template.load("tokenizer", t, template.to_jinja())
  for talk in (TALK, TALK[1:3], [{"role": "user", "content": '"{{ x }}" \\n % \'é🙂'}]):
    assert written(again(talk, generate)) == written(template(talk, generate))
  with pytest.raises(UserError, match="no place for a message of role"):
    again([*TALK[1:], {"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
  "talk, message",
  [
    ([{"role": "tool", "content": "x"}], "no place for a message of role 'tool'"),
    ([{"from": "user"}], "a chat message is"),
    (["x"], "a chat message is"),
    ([{"role": "user", "content": None}], "a chat message is"),
  ],
)
def test_a_message_that_is_none(model, talk, message):
  with pytest.raises(UserError, match=message):
    chat_template.load("chatml", model()[0])(talk)


def test_contents_in_parts(model):
  talk = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]
  assert "user\nab<" in written(chat_template.load("chatml", model()[0])(talk))


def test_a_template_that_cannot_be_used(model, monkeypatch):
  bytes_ = tokenizer.ByteTokenizer()
  for name, t, message in (
    ("alpaca", bytes_, "no chat template 'alpaca'; choose one of tokenizer, simple"),
    ("chatml", bytes_, r"needs <\|im_start\|>, <\|im_end\|>"),
    ("tokenizer", bytes_, "came with no chat template"),
    ("tokenizer", model("{% if %}")[0], "can't be used"),
  ):
    with pytest.raises(UserError, match=message):
      chat_template.load(name, t)
  with pytest.raises(UserError, match="refuses a conversation: no"):
    chat_template.load("tokenizer", model("{{ raise_exception('no') }}")[0])(TALK)
  for name in ("llama2", "gemma"):
    with pytest.raises(UserError, match="in front of a user's"):
      chat_template.load(name, model()[0])(TALK[:1])
  monkeypatch.setitem(sys.modules, "jinja2", None)
  with pytest.raises(UserError, match=r"pip install 'jaxgpt\[data\]'"):
    chat_template.load("tokenizer", model("{{ 1 }}")[0])
