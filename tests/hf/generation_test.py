"""End tokens, sampling defaults and chat templates on their way in and out of a run."""

import json

import pytest

from jaxgpt.commands.actions import import_export
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.prompts import Prompts
from jaxgpt.run import generation
from jaxgpt.text.tokenizers import chat_template
from tests.hf import round_trip_test
from tests.text.tokenizers import huggingface_test

pytest.importorskip("transformers")

PUBLISHED = {
  "bos_token_id": 1,
  "eos_token_id": [2, 260],
  "do_sample": True,
  "temperature": 0.6,
  "top_k": 20,
  "repetition_penalty": 1.05,
  "no_repeat_ngram_size": 3,
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory, corpus):
  folder = tmp_path_factory.mktemp("generation")
  round_trip_test.make("llama2", folder / "theirs")
  (folder / "theirs" / "generation_config.json").write_text(json.dumps(PUBLISHED))
  import_export.import_model(folder / "theirs", folder / "run", tokenizer=corpus)
  return folder, load.load(folder / "run")


def test_what_a_published_model_says_of_its_texts_is_kept_and_followed(imported):
  folder, run = imported
  assert json.loads((folder / "run" / "generation_config.json").read_text()) == PUBLISHED
  assert run.generation.end_ids == (2, 260)
  settings, ignored = load.sampling_defaults(run)
  assert settings == load.Sampling(temperature=0.6, top_k=20, repetition_penalty=1.05)
  assert ignored == ["no_repeat_ngram_size"]
  import_export.export_run(folder / "run", folder / "out", certify=False)
  again = json.loads((folder / "out" / "generation_config.json").read_text())
  assert again == PUBLISHED | {"pad_token_id": 0}


def test_a_second_import_changes_nothing(imported, corpus):
  folder, _ = imported
  path = folder / "run" / "generation_config.json"
  before = path.read_text()
  path.write_text(json.dumps({"eos_token_id": [2, 7]}))
  with pytest.raises(UserError, match="holds this model already"):
    import_export.import_model(folder / "theirs", folder / "run", tokenizer=corpus)
  assert json.loads(path.read_text()) == {"eos_token_id": [2, 7]}
  path.write_text(before)


def test_an_exported_folder_has_the_template_that_the_run_was_trained_in(imported):
  folder, run = imported
  template = chat_template.load("simple", run.tokenizer).to_jinja()
  generation.write(folder / "run", generation.Generation(run.generation.values, template, "simple"))
  import_export.export_run(folder / "run", folder / "chat", certify=False)
  config = json.loads((folder / "chat" / "tokenizer_config.json").read_text())
  assert config["chat_template"] == template


def test_a_value_out_of_range_in_the_file_is_named(imported):
  _, run = imported
  bad = run._replace(generation=generation.Generation(PUBLISHED | {"top_p": 7}))
  with pytest.raises(UserError, match=r"top-p=7 must be in \(0, 1\]"):
    load.sampling_defaults(bad)


def test_prompts_begin_as_the_documents_of_the_run_do(imported, tmp_path):
  _, run = imported
  qwen = huggingface_test.folder(
    tmp_path / "qwen",
    huggingface_test.byte_level(huggingface_test.QWEN),
    bos_token=None,
    eos_token="<|im_end|>",
    add_bos_token=False,
  )
  qwen = load.tokenizer_lib.load(qwen)
  text = qwen.encode("def f")
  like = lambda **more: Prompts(run._replace(tokenizer=qwen, **more))
  assert like().text("def f") == text, "imported: as transformers encodes a text"
  assert like().text("") == [qwen.eos_id], "a model needs a token to begin with"
  assert like(data_digest="x").text("def f") == [qwen.eos_id, *text], "trained on texts"
  chats = chat_template.load("chatml", qwen)
  trained = generation.Generation({"eos_token_id": [0]}, chats.to_jinja(), "chatml")
  prompts = like(data_digest="x", generation=trained)
  assert prompts.text("def f") == text, "trained on conversations, which have no bos"
  ids = prompts.chat([{"role": "user", "content": "def f"}])
  want = "<|im_start|>user\ndef f<|im_end|>\n<|im_start|>assistant\n"
  assert qwen.decode(ids, specials=True) == want
  assert Prompts(run).text("a")[0] == run.tokenizer.bos_id
  with pytest.raises(UserError, match="has no chat template"):
    Prompts(run).chat([{"role": "user", "content": "x"}])


def test_a_prompt_has_its_row_s_tools_and_the_variables_of_the_template(imported):
  _, run = imported
  source = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"
    "{% if tools %}{{ tools | length }} tools {% endif %}"
    "{% if add_generation_prompt %}a:{% if not think %}skip{% endif %}{% endif %}"
  )
  like = run._replace(generation=generation.Generation({"eos_token_id": [2]}, source, "tokenizer"))
  text = lambda ids: run.tokenizer.decode(ids, specials=True).strip()
  messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "the answer"}]
  prompts = Prompts(like)
  assert text(prompts.row({"messages": messages})) == "user:x a:skip"
  full = {"messages": messages, "tools": [{}, {}], "chat_template_kwargs": {"think": True}}
  assert text(prompts.row(full)) == "user:x 2 tools a:"
  thinks = Prompts(like, {"think": True})
  assert text(thinks.row({"messages": messages})) == "user:x a:"
  own = {"messages": messages, "chat_template_kwargs": {"think": False}}
  assert text(thinks.row(own)) == "user:x a:skip", "a conversation's own come first"
  with pytest.raises(UserError, match="does not read the variable 'thnk'; it reads: think"):
    _ = Prompts(like, {"thnk": True}).template
