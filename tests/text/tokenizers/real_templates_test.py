"""Chat templates of published models: ids as in transformers, learned ranges, end tokens."""

import json
from typing import NamedTuple

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.readers.documents import Document
from jaxgpt.text.tokenizers import chat_template, examples, tokenizer
from tests.text.tokenizers import chat_templates
from tests.text.tokenizers import huggingface_test as hf_test

tokenizers = pytest.importorskip("tokenizers")

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
  {"role": "user", "content": "Two and two?"},
  {"role": "assistant", "reasoning_content": "I count.", "content": "Four. 🙂"},
  {"role": "user", "content": "And  three? é"},
  {"role": "assistant", "reasoning_content": "I add.", "content": "Seven."},
]
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLS = [
  {"role": "user", "content": "Rain?"},
  {
    "role": "assistant",
    "content": "",
    "thinking": "I look.",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}],
  },
  {"role": "tool", "content": "wet", "tool_call_id": "abcdefghi"},
  {"role": "assistant", "content": "Yes."},
]
JSON = '{"city": "Oslo"}'


class Case(NamedTuple):
  """A template, and what is to be learned of `CHAT` (after `SYSTEM`) and of `CALLS`."""

  template: str
  specials: tuple[str, ...]
  chat: list[str]
  calls: list[str] | None  # None: the template has no tools
  stops: tuple[str, ...]
  system: bool = True
  bos: str | None = "<s>"
  eos: str = "</s>"
  build: str = "bytes"
  flags: dict = {}  # noqa: RUF012 (never changed)


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CASES = {
  "llama_3": Case(
    chat_templates.LLAMA_3,
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    ["Four. 🙂<|eot_id|>", "Seven.<|eot_id|>"],
    [f'{{"name": "weather", "parameters": {JSON}}}<|eot_id|>', "Yes.<|eot_id|>"],
    ("<|eot_id|>",),
  ),
  "qwen_2": Case(
    chat_templates.QWEN_2,
    IM,
    ["Four. 🙂<|im_end|>", "Seven.<|im_end|>"],
    [
      f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call><|im_end|>',
      "Yes.<|im_end|>",
    ],
    ("<|im_end|>",),
    bos=None,
    eos="<|im_end|>",
  ),
  "qwen_3": Case(
    chat_templates.QWEN_3,
    IM,
    ["Four. 🙂<|im_end|>", "<think>\nI add.\n</think>\n\nSeven.<|im_end|>"],
    [
      '<think>\nI look.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": '
      f"{JSON}}}\n</tool_call><|im_end|>",
      "<think>\n\n</think>\n\nYes.<|im_end|>",
    ],
    ("<|im_end|>",),
    bos=None,
    eos="<|im_end|>",
  ),
  "gemma_3": Case(
    chat_templates.GEMMA_3,
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    ["Four. 🙂<end_of_turn>", "Seven.<end_of_turn>"],
    None,
    ("<end_of_turn>",),
    bos="<bos>",
    eos="<eos>",
    build="metaspace never",
  ),
  "phi_3": Case(
    chat_templates.PHI_3,
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    ["Four. 🙂<|end|>", "Seven.<|end|>"],
    None,
    ("<|end|>",),
    eos="<|endoftext|>",
    build="prepend",
    flags={"rstrip": True},
  ),
  "phi_4": Case(
    chat_templates.PHI_4,
    ("<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    ["Four. 🙂<|im_end|>", "Seven.<|im_end|>"],
    None,
    ("<|im_end|>",),
    eos="<|im_end|>",
    flags={"lstrip": True, "rstrip": True},
  ),
  "mistral_1": Case(
    chat_templates.MISTRAL_1,
    (),
    ["Four. 🙂</s>", "Seven.</s>"],
    None,
    ("</s>",),
    system=False,
    build="prepend",
  ),
  "mistral_3": Case(
    chat_templates.MISTRAL_3,
    (
      "[INST]",
      "[/INST]",
      "[TOOL_CALLS]",
      "[AVAILABLE_TOOLS]",
      "[/AVAILABLE_TOOLS]",
      "[TOOL_RESULTS]",
      "[/TOOL_RESULTS]",
    ),
    [" Four. 🙂</s>", " Seven.</s>"],
    [
      f'[TOOL_CALLS] [{{"name": "weather", "arguments": {JSON}, "id": "abcdefghi"}}]</s>',
      " Yes.</s>",
    ],
    ("</s>",),
    build="metaspace first",
  ),
  "gpt_oss": Case(
    chat_templates.GPT_OSS,
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
    [
      "<|channel|>final<|message|>Four. 🙂<|end|>",
      "<|channel|>analysis<|message|>I add.<|end|>"
      "<|start|>assistant<|channel|>final<|message|>Seven.<|return|>",
    ],
    [
      f" to=functions.weather<|channel|>commentary json<|message|>{JSON}<|call|>",
      "<|channel|>final<|message|>Yes.<|return|>",
    ],
    ("<|return|>", "<|call|>"),
    eos="<|return|>",
  ),
  "deepseek_r1": Case(
    chat_templates.DEEPSEEK_R1,
    (
      "<｜begin▁of▁sentence｜>",
      "<｜end▁of▁sentence｜>",
      "<｜User｜>",
      "<｜Assistant｜>",
      *(f"<｜tool▁{kind}▁{side}｜>" for kind in ("calls", "call") for side in ("begin", "end")),
      *(f"<｜tool▁{kind}▁{side}｜>" for kind in ("outputs", "output") for side in ("begin", "end")),
      "<｜tool▁sep｜>",
    ),
    ["Four. 🙂<｜end▁of▁sentence｜>", "Seven.<｜end▁of▁sentence｜>"],
    [
      "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
      f"{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
      "Yes.<｜end▁of▁sentence｜>",
    ],
    ("<｜end▁of▁sentence｜>",),
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
  ),
  "smol_3": Case(
    chat_templates.SMOL_3,
    IM,
    [
      "<|im_start|>assistant\n<think>\nI count.\n</think>\nFour. 🙂<|im_end|>\n",
      "<|im_start|>assistant\n<think>\nI add.\n</think>\nSeven.<|im_end|>\n",
    ],
    [
      "<|im_start|>assistant\n<think>\nI look.\n</think>\n<tool_call>weather</tool_call>"
      "<|im_end|>\n",
      "<|im_start|>assistant\nYes.<|im_end|>\n",
    ],
    ("<|im_end|>",),
    bos=None,
    eos="<|im_end|>",
  ),
  "command_r": Case(
    chat_templates.COMMAND_R,
    (
      "<BOS_TOKEN>",
      "<|START_OF_TURN_TOKEN|>",
      "<|END_OF_TURN_TOKEN|>",
      "<|SYSTEM_TOKEN|>",
      "<|USER_TOKEN|>",
      "<|CHATBOT_TOKEN|>",
    ),
    ["Four. 🙂<|END_OF_TURN_TOKEN|>", "Seven.<|END_OF_TURN_TOKEN|>"],
    None,
    ("<|END_OF_TURN_TOKEN|>",),
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
  ),
  "granite_3": Case(
    chat_templates.GRANITE_3,
    ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
    ["Four. 🙂<|end_of_text|>", "Seven.<|end_of_text|>"],
    [
      f'<|tool_call|>[{{"name": "weather", "arguments": {JSON}}}]<|end_of_text|>',
      "Yes.<|end_of_text|>",
    ],
    ("<|end_of_text|>",),
    bos="<|end_of_text|>",
    eos="<|end_of_text|>",
  ),
}


def inner(case):
  """A small tokenizer of the kind that the template's models have."""
  if case.build == "bytes":
    t = hf_test.byte_level(())
  else:
    t = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    if case.build == "prepend":
      t.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
      )
    else:
      t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
        prepend_scheme=case.build.split()[1], split=False
      )
    t.train_from_iterator(
      [hf_test.TEXT[:20_000]],
      tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>"]),
    )
    written = json.loads(t.to_str())
    vocab = written["model"]["vocab"]
    vocab |= {f"<0x{b:02X}>": len(vocab) + b for b in range(256)}
    t = tokenizers.Tokenizer.from_str(json.dumps(written))
    t.decoder = tokenizers.decoders.Sequence(
      [
        tokenizers.decoders.Replace("▁", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
      ]
    )
  names = dict.fromkeys((*filter(None, (case.bos, case.eos)), *case.specials))
  t.add_special_tokens(
    [tokenizers.AddedToken(n, special=True, normalized=False, **case.flags) for n in names]
  )
  t.add_tokens([tokenizers.AddedToken(n, normalized=False) for n in ("<think>", "</think>")])
  return t


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """{name: (tokenizer, its folder)} of all cases, made once."""
  out = {}
  for name, case in CASES.items():
    config = {"bos_token": case.bos, "eos_token": case.eos, "chat_template": case.template}
    folder = hf_test.folder(tmp_path_factory.mktemp("hf") / name, inner(case), **config)
    out[name] = tokenizer.load(folder), folder
  return out


def conversations(case):
  """(messages, tools, what is learned) of the case's conversations."""
  yield ([SYSTEM] if case.system else []) + CHAT, None, case.chat
  yield CHAT[:2], None, None
  if case.calls:
    yield CALLS, TOOLS, case.calls
    yield [*CALLS, *CHAT[2:]], TOOLS, None


def learned(pieces):
  out, before = [], False
  for piece in pieces:
    if piece.trained:
      out[-1:] = [out[-1] + piece.text] if before else [*out[-1:], piece.text]
    before = piece.trained
  return out


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(loaded, name):
  transformers = pytest.importorskip("transformers")
  t, folder = loaded[name]
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  template = chat_template.load("tokenizer", t)
  for messages, tools, _ in conversations(CASES[name]):
    document = Document("a:1", "", fields={"messages": messages, "tools": tools})
    [[got]] = examples.encode_batch([document], "chat", t, template)
    want = theirs.apply_chat_template(
      messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    assert got.ids.tolist() == want["input_ids"]
    if "{% generation %}" in CASES[name].template:
      mask = np.zeros(len(got.ids), int)
      for start, end in got.trained:
        mask[start:end] = 1
      assert mask.tolist() == want["assistant_masks"]
    prompt = template(messages[:-1], generate=True, tools=tools)
    want = theirs.apply_chat_template(
      messages[:-1], tools=tools, add_generation_prompt=True, return_dict=False
    )
    assert examples.encode_pieces(prompt, t, template.in_one_go) == want


@pytest.mark.parametrize("name", CASES)
def test_the_whole_answer_and_its_end_are_learned_and_nothing_else(loaded, name):
  t, _ = loaded[name]
  template = chat_template.load("tokenizer", t)
  assert template.stops == CASES[name].stops and template.stop == CASES[name].stops[0]
  for messages, tools, want in conversations(CASES[name]):
    got = learned(template(messages, tools=tools))
    assert want is None or got == want
    assert len(got) == sum(m["role"] == "assistant" for m in messages)
    left_out = [{**m, "weight": 0} for m in messages[:-1]] + messages[-1:]
    assert learned(template(left_out, tools=tools)) == got[-1:]


@pytest.mark.parametrize("name", CASES)
def test_the_learned_tokens_stand_for_the_learned_text(loaded, name):
  """Only a white space at the border to a prompt may come along, where one token holds both."""
  t, _ = loaded[name]
  template = chat_template.load("tokenizer", t)
  for messages, tools, want in conversations(CASES[name]):
    document = Document("a:1", "", fields={"messages": messages, "tools": tools})
    [[got]] = examples.encode_batch([document], "chat", t, template)
    texts = [t.decode(got.ids[a:b], specials=True).strip() for a, b in got.trained]
    flat = lambda text: "".join(text.split())
    assert want is None or list(map(flat, texts)) == list(map(flat, want))


@pytest.mark.parametrize("name", CASES)
def test_names_of_special_tokens_in_messages_and_tools_stay_text(loaded, name):
  t, _ = loaded[name]
  template, mark = chat_template.load("tokenizer", t), CASES[name].stops[0]
  for messages, tools, _ in conversations(CASES[name]):
    bad = [{**m, "content": m["content"] and m["content"] + f" {mark} x"} for m in messages]
    schema = json.loads(json.dumps(tools).replace("object", f"{mark} object"))
    document = Document("a:1", "", fields={"messages": bad, "tools": schema})
    [[got]] = examples.encode_batch([document], "chat", t, template)
    count = sum(p.special and p.text == mark for p in template(messages, tools=tools))
    assert (got.ids == t.special_ids[mark]).sum() == count
    flat = lambda text: "".join(text.split())
    want = "".join(p.text for p in template(bad, tools=schema))
    assert flat(t.decode(got.ids, specials=True)) == flat(want)


def test_without_a_bos_of_its_own_a_conversation_does_not_begin_with_eos(loaded):
  t, _ = loaded["qwen_3"]
  for name in ("chatml", "tokenizer"):
    template = chat_template.load(name, t)
    pieces = template(CHAT[:1], generate=True)
    assert pieces[0].text == "<|im_start|>" and not template.begins_with_bos()
  assert "bos_token" not in t.role_names and not t.adds_bos


def test_a_template_that_loops_over_numbers_is_found_by_the_difference_of_renderings(loaded):
  t, _ = loaded["qwen_3"]
  source = (
    "{% for i in range(messages | length) %}{{ '<|im_start|>' + messages[i].role + '\n' }}"
    "{{ messages[i].content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
  )
  template = chat_template.load("tokenizer", t, source)
  assert learned(template(CHAT)) == ["Four. 🙂<|im_end|>", "Seven.<|im_end|>"]
  forgets = source.replace("{{ messages[i].content", "{{ messages[i].content[: loop.revindex]")
  with pytest.raises(UserError, match="does not say where message 2, an answer, begins"):
    chat_template.load("tokenizer", t, forgets)(CHAT)


def test_a_tool_template_is_taken_where_there_are_tools(tmp_path):
  case = CASES["phi_4"]
  named = [
    {"name": "default", "template": case.template},
    {"name": "tool_use", "template": "{{ tools | tojson }}" + case.template},
  ]
  t = tokenizer.load(
    hf_test.folder(tmp_path / "t", inner(case), eos_token=case.eos, chat_template=named)
  )
  template = chat_template.load("tokenizer", t)
  assert template(CHAT[:1])[0].special
  assert template(CHAT[:1], tools=TOOLS)[0].text == json.dumps(TOOLS)


@pytest.mark.parametrize("field", ["tool_calls", "reasoning_content"])
def test_a_format_without_a_place_for_what_is_said_refuses_it(loaded, field):
  template = chat_template.load("chatml", loaded["qwen_3"][0])
  with pytest.raises(UserError, match=f"'chatml' has no place for {field}"):
    template([{"role": "assistant", "content": "x", field: "y"}])
  with pytest.raises(UserError, match="'chatml' has no place for tools"):
    template(CHAT[:1], tools=TOOLS)
