"""The learned tokens of 12 conversations, as a person marked them: «…» is learned.

The cases are text, to be read. `TOOLS` and `PLAIN` are written here in the style of current
published templates: reasoning of earlier turns is dropped, calls and results of tools have forms of
their own, and a generation prompt may close the reasoning (`enable_thinking`).
"""

import json

import pytest

from jaxgpt.commands.actions import inspect_data
from jaxgpt.data import pipeline
from jaxgpt.data.batch_source import Batching
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import prepare
from tests.text.tokenizers import huggingface_test as hf_test

TOOLS = """{%- if tools %}<|im_start|>system
Tools: {{ tools | map(attribute='name') | join(', ') }}<|im_end|>
{% endif %}{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|im_start|>assistant
{% if loop.index0 > ns.last and (m.reasoning_content or enable_thinking is defined) %}<think>
{{ m.reasoning_content or '' }}
</think>
{% endif %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}
<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<result>{{ m.content }}</result><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>
{% endif %}{% endif %}"""

GENERATION = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
ADD = [{"name": "add", "parameters": {}}]


def user(text):
  return {"role": "user", "content": text}


def said(text="", **more):
  return {"role": "assistant", "content": text, **more}


def result(text):
  return {"role": "tool", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
CASES = {  # name: (template, row, settings, the text as marked by hand)
  "one turn": (
    TOOLS,
    dict(messages=[user("Hi."), said("Hello.")]),
    {},
    "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n",
  ),
  "system and several turns": (
    TOOLS,
    dict(messages=[SYSTEM, user("1?"), said("One."), user("2?"), said("Two.")]),
    {},
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n"
    "<|im_start|>assistant\n«One.<|im_end|>»\n<|im_start|>user\n2?<|im_end|>\n"
    "<|im_start|>assistant\n«Two.<|im_end|>»\n",
  ),
  "only the last turn": (
    TOOLS,
    dict(messages=[SYSTEM, user("1?"), said("One."), user("2?"), said("Two.")]),
    dict(train_on="last"),
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n"
    "<|im_start|>assistant\nOne.<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n"
    "<|im_start|>assistant\n«Two.<|im_end|>»\n",
  ),
  "a call of a tool and its result": (
    TOOLS,
    dict(messages=[user("2+3?"), said(tool_calls=[CALL]), result("5"), said("5.")], tools=ADD),
    {},
    "<|im_start|>system\nTools: add<|im_end|>\n<|im_start|>user\n2+3?<|im_end|>\n"
    '<|im_start|>assistant\n«<call>{"name": "add", "arguments": {"a": 2, "b": 3}}</call>'
    "<|im_end|>»\n<|im_start|>user\n<result>5</result><|im_end|>\n"
    "<|im_start|>assistant\n«5.<|im_end|>»\n",
  ),
  "the last turn has a call and an answer": (
    TOOLS,
    dict(
      messages=[
        user("Hi."),
        said("Hello."),
        user("2+3?"),
        said(tool_calls=[CALL]),
        result("5"),
        said("5."),
      ]
    ),
    dict(train_on="last"),
    "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\n2+3?<|im_end|>\n"
    '<|im_start|>assistant\n«<call>{"name": "add", "arguments": {"a": 2, "b": 3}}</call>'
    "<|im_end|>»\n<|im_start|>user\n<result>5</result><|im_end|>\n"
    "<|im_start|>assistant\n«5.<|im_end|>»\n",
  ),
  "reasoning": (
    TOOLS,
    dict(messages=[user("2+3?"), said("5.", reasoning_content="2+3=5")]),
    {},
    "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
    "«<think>\n2+3=5\n</think>\n5.<|im_end|>»\n",
  ),
  "reasoning of an earlier turn is dropped": (
    TOOLS,
    dict(
      messages=[
        user("2+3?"),
        said("5.", reasoning="2+3=5"),
        user("1+1?"),
        said("2.", reasoning="1+1=2"),
      ]
    ),
    {},
    "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n«5.<|im_end|>»\n"
    "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    "«<think>\n1+1=2\n</think>\n2.<|im_end|>»\n",
  ),
  "a conversation without thinking": (
    TOOLS,
    dict(messages=[user("Hi."), said("Hello.")], chat_template_kwargs={"enable_thinking": False}),
    {},
    "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n"
    "«Hello.<|im_end|>»\n",
  ),
  "empty turns": (
    TOOLS,
    dict(messages=[user(""), said(""), user("2?"), said("Two.")]),
    {},
    "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n«<|im_end|>»\n"
    "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n«Two.<|im_end|>»\n",
  ),
  "a turn of weight 0, and marks in a user's text": (
    TOOLS,
    dict(
      messages=[
        user("<|im_end|>"),
        said("No.", weight=0),
        user("«2»?"),
        said("Two<|im_end|>.", weight=1),
      ]
    ),
    {},
    "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    "<|im_start|>user\n«2»?<|im_end|>\n<|im_start|>assistant\n«Two<|im_end|>.<|im_end|>»\n",
  ),
  "a template with generation marks": (
    GENERATION,
    dict(messages=[SYSTEM, user("1?"), said("One."), user("2?"), said("Two.")]),
    {},
    "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n1?<|im_end|>"
    "<|im_start|>assistant\n«One.<|im_end|>»<|im_start|>user\n2?<|im_end|>"
    "<|im_start|>assistant\n«Two.<|im_end|>»",
  ),
  "a built-in template": (
    "",
    dict(messages=[SYSTEM, user("1?"), said("One."), user("2?"), said("Two.")]),
    dict(template="chatml"),
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n"
    "<|im_start|>assistant\n«One.<|im_end|>»\n<|im_start|>user\n2?<|im_end|>\n"
    "<|im_start|>assistant\n«Two.<|im_end|>»\n",
  ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
  """{template: folder of a tokenizer that has it}."""
  inner = hf_test.byte_level(("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
  out = {}
  for template in (TOOLS, GENERATION, ""):
    more = {"chat_template": template} if template else {}
    folder = tmp_path_factory.mktemp("hf") / "t"
    out[template] = hf_test.folder(folder, inner, eos_token="<|endoftext|>", **more)
  return out


def prepared(row, folder, spec, **settings):
  """Prepares rows of a chat."""
  rows = row if isinstance(row, list) else [row]
  (folder / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return prepare.prepare(
    [folder / "c.jsonl"],
    folder / "data",
    kind="chat",
    tokenizer=str(spec),
    validation=0,
    test=0,
    **settings,
  )


def marked(folder):
  """The text of the first document of a folder, with its learned tokens in «»."""
  lines = inspect_data.show(str(folder / "data"), rows=1, seq_len=512, chars=0)
  found = [line.removeprefix("    | ") for line in lines if line.startswith("    | ")]
  return "\n".join(found)


@pytest.mark.parametrize("name", CASES)
def test_learned_tokens_are_those_that_a_person_marked(name, tokenizers, tmp_path):
  template, row, settings, want = CASES[name]
  prepared(row, tmp_path, tokenizers[template], **settings)
  assert marked(tmp_path) == want


def test_a_long_conversation_is_cut_and_each_row_learns_its_part(tmp_path):
  turns = [user("ab"), said("cdefgh"), user("i"), said("jk")]
  prepared(dict(messages=turns), tmp_path, "bytes")
  lines = inspect_data.show(str(tmp_path / "data"), rows=3, seq_len=8, chars=0)
  texts = {line.removeprefix("    | ") for line in lines if line.startswith("    | ")}
  assert texts == {
    "<s><|user|>ab<|end|><|assistant|>«cde»",
    "e«fgh<|end|>»<|user|>i<|end|><|assistant|>",
    "<|assistant|>«jk<|end|>»",
  }


def test_variables_are_of_the_folder_or_of_a_conversation(tokenizers, tmp_path):
  (tmp_path / "a").mkdir()
  row = dict(messages=[user("Hi."), said("Hello.")])
  manifest = prepared(
    row, tmp_path / "a", tokenizers[TOOLS], template_variables=(("enable_thinking", False),)
  )
  assert "<think>\n\n</think>\n«Hello.<|im_end|>»" in marked(tmp_path / "a")
  assert manifest["template_variables"] == {"enable_thinking": False}
  (tmp_path / "b").mkdir()
  prepared(
    row | {"chat_template_kwargs": '{"enable_thinking": true}'},
    tmp_path / "b",
    tokenizers[TOOLS],
    template_variables=(("enable_thinking", False),),
  )
  assert "assistant\n«<think>\n\n</think>\nHello.<|im_end|>»" in marked(tmp_path / "b")


@pytest.mark.parametrize(
  "spec, settings, said",
  [
    (
      "own",
      dict(template_variables=(("enable_think", 1),)),
      "does not read the variable 'enable_think'; it reads: enable_thinking",
    ),
    ("own", dict(template_variables=(("messages", 1),)), "'messages' is set by jaxgpt"),
    ("bytes", dict(template_variables=(("a", 1),)), "'simple' has no place for the variable 'a'"),
    ("bytes", dict(kind="text", train_on="last"), "train_on='last' is for kind=chat"),
  ],
)
def test_settings_without_effect_are_refused(spec, settings, said, tokenizers, tmp_path):
  (tmp_path / "c.jsonl").write_text(json.dumps(CASES["one turn"][1]))
  with pytest.raises(UserError, match=said):
    prepare.prepare(
      [tmp_path / "c.jsonl"],
      tmp_path / "data",
      tokenizer=str(tokenizers[TOOLS]) if spec == "own" else spec,
      **{"kind": "chat", **settings},
    )


def test_each_conversation_that_is_left_out_is_counted(tmp_path):
  rows = {
    "kept": [user("a"), said("b")],
    "two of a user": [user("a"), user("b"), said("c")],
    "assistant first": [said("b"), user("a"), said("c")],
    "late system": [user("a"), SYSTEM, said("b")],
    "result without a call": [user("a"), result("5"), said("b")],
    "empty answers": [user("a"), said(" "), user("b"), said("")],
    "no answer": [user("a")],
    "no messages": [],
  }
  manifest = prepared([dict(messages=m) for m in rows.values()], tmp_path, "bytes")
  assert manifest["dropped"] == {"empty": 2, "nothing learned": 1, "role order": 3}
  assert (manifest["read"], manifest["kept"]) == (8, 2)
  assert manifest["read"] == manifest["kept"] + sum(manifest["dropped"].values())


def test_a_target_longer_than_a_row_is_counted(tmp_path):
  turns = [[user("a"), said("b" * n)] for n in (3, 20, 40)]
  prepared([dict(messages=m) for m in turns], tmp_path, "bytes")
  for seq_len, count in ((64, 0), (32, 1), (21, 1), (20, 2)):  # with the mark of its end
    lines = pipeline.make(
      str(tmp_path / "data"), "train", Batching(seq_len=seq_len, batch_size=1)
    ).describe()
    assert [line.split(" documents")[0] for line in lines] == [f"{count} of 3"] * bool(count)
    assert all(f"a target longer than data.seq_len={seq_len}" in line for line in lines)
