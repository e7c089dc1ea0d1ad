"""End tokens, sampling defaults and the chat template of a run."""

import json

import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.run import generation
from jaxgpt.text.prepare import prepare
from jaxgpt.text.tokenizers import chat_template, tokenizer

T = tokenizer.ByteTokenizer()
END = T.special_ids["<|end|>"]
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  """A prepared folder of conversations."""
  folder = tmp_path_factory.mktemp("chats")
  (folder / "c.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 20)
  prepare.prepare(
    [folder / "c.jsonl"], folder / "data", kind="chat", tokenizer="bytes", validation=0, test=0
  )
  return folder / "data"


def causal(path, **more):
  c = config.base()
  c.update_from_flattened_dict({"data.path": str(path), "data.seq_len": 8, **more})
  return config.resolve(c, vocab_size=T.vocab_size)


def folder_with(path, **files):
  path.mkdir()
  for name, values in files.items():
    (path / f"{name}.json").write_text(values if isinstance(values, str) else json.dumps(values))
  return path


@pytest.mark.parametrize(
  "files, want",
  [
    ({"generation_config": {"eos_token_id": [5, 7, 5]}, "config": {"eos_token_id": 9}}, [5, 7]),
    ({"generation_config": {"eos_token_id": 5}}, [5]),
    ({"generation_config": {"top_k": 3}, "config": {"eos_token_id": [9, 8]}}, [9, 8]),
    ({"config": {}}, [T.eos_id]),
  ],
)
def test_end_tokens_of_a_folder(tmp_path, files, want):
  got = generation.read(folder_with(tmp_path / "m", **files), T)
  assert got.end_ids == tuple(want) and got.template == ""


@pytest.mark.parametrize(
  "content, message",
  [
    ("{", "can't be read"),
    ("[1]", "not an object"),
    ({"eos_token_id": "</s>"}, "eos_token_id='</s>' is neither a token id nor a list of them"),
    ({"eos_token_id": [1, None]}, "is neither a token id"),
  ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
  folder = folder_with(tmp_path / "m", generation_config=content)
  with pytest.raises(UserError, match=message) as error:
    generation.read(folder, T)
  assert "generation_config.json" in str(error.value)


def test_training_adds_the_ends_of_its_documents(tmp_path, chats, corpus):
  model = folder_with(
    tmp_path / "m", generation_config={"eos_token_id": [7, 8], "temperature": 0.3, "x": 1}
  )
  got, notices = generation.of_training(causal(chats, init_from=str(model)), T, tmp_path / "run")
  assert got.values == {"eos_token_id": [7, 8, END], "temperature": 0.3, "x": 1}
  assert (got.template_name, notices) == ("simple", [])
  got, _ = generation.of_training(causal(chats), T, tmp_path / "run")
  assert got.end_ids == (END,)
  t = tokenizer.load(corpus)
  got, _ = generation.of_training(causal(corpus), t, tmp_path / "run")
  assert got.end_ids == (t.eos_id,) and not got.template
  got, _ = generation.of_training(causal(f"{chats},{chats}"), T, tmp_path / "run")
  assert got.end_ids == (END,)


def test_a_run_keeps_what_it_has_and_a_model_without_texts_gets_nothing(tmp_path, chats):
  run = tmp_path / "run"
  run.mkdir()
  first, _ = generation.of_training(causal(chats), T, run)
  generation.write(run, first)
  assert generation.read(run, T) == first
  assert generation.of_training(causal(chats), T, run) == (None, [])
  encoder = {"model.causal": False, "objective.name": "masked_lm"}
  assert generation.of_training(causal(chats, **encoder), T, tmp_path) == (None, [])


def test_the_template_of_a_run_writes_what_it_was_trained_on(tmp_path, chats):
  pytest.importorskip("jinja2")
  made, _ = generation.of_training(causal(chats), T, tmp_path)
  generation.write(tmp_path, made)
  got = generation.read(tmp_path, T)
  again = chat_template.load("tokenizer", T, got.template)
  assert again(TALK) == chat_template.load("simple", T)(TALK)
  assert again.stop == "<|end|>" and got.template_name == "simple"


def test_what_is_published():
  got = generation.published(generation.Generation({"eos_token_id": [9], "top_p": 0.5}), T)
  assert got == {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 9, "top_p": 0.5}
  got = generation.published(generation.Generation({"eos_token_id": [9, 2], "pad_token_id": 5}), T)
  assert got == {"bos_token_id": 1, "pad_token_id": 5, "eos_token_id": [9, 2]}


NAMES = ("temperature", "top_k")


@pytest.mark.parametrize(
  "values, found, ignored",
  [
    ({}, {}, []),
    ({"temperature": 0.6, "top_k": None, "eos_token_id": [1]}, {"temperature": 0.6}, []),
    ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}, []),
    ({"do_sample": True, "num_beams": 1, "typical_p": 1.0, "min_length": 0}, {}, []),
    ({"num_beams": 4, "suppress_tokens": [1], "x": 2}, {}, ["num_beams", "suppress_tokens", "x"]),
  ],
)
def test_sampling_defaults(values, found, ignored):
  assert generation.sampling_defaults(values, NAMES) == (found, ignored)


def test_a_sampling_default_that_is_no_number():
  with pytest.raises(UserError, match="temperature='hot' is not a number"):
    generation.sampling_defaults({"temperature": "hot"}, NAMES)
