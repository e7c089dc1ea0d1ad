"""The harness on a run, against its own `hf` backend on the exported checkpoint.

Needs the extras [harness] and [bench]. The tasks are local files.
"""

import importlib.util
import json
import os

import numpy as np
import pytest

from jaxgpt.commands import main
from jaxgpt.commands.actions import import_export
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.tasks import harness, harness_model, in_training
from jaxgpt.training import evaluators
from tests import quick
from tests.parallel import distributed_test

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "green", "tree"]
CHAT = (
  "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
  "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = dict(
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=0,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=48,
  initializer_range=0.2,
)
FAMILIES = {  # family: (class, config, whether the tokenizer puts bos in front)
  "gpt2": (
    "GPT2LMHeadModel",
    dict(
      n_positions=48,
      n_embd=32,
      n_layer=2,
      n_head=4,
      bos_token_id=2,
      eos_token_id=2,
      initializer_range=0.2,
    ),
    False,
  ),
  "llama": ("LlamaForCausalLM", SIZES, True),
  "gemma": ("GemmaForCausalLM", dict(SIZES, head_dim=8), True),
}
TASKS = {
  "mini_choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
  "mini_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
  # The `hf` backend generates after padding alone where a prompt is empty.
  "mini_generate": """output_type: generate_until
doc_to_text: "on {{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n", "tree"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def sentence(draws, n):
  return " ".join(draws.choice(WORDS, n))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  """A folder with three tasks and their data."""
  os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf_home"))
  os.environ["HF_DATASETS_OFFLINE"] = "1"
  folder, draws = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
  docs = [
    {
      "question": ("" if i == 1 else sentence(draws, 3 + 9 * i)) + (" " if i == 2 else ""),
      "choices": [" " + sentence(draws, 1 + j) for j in range(3)],
      "answer": int(draws.integers(3)),
      "text": sentence(draws, 4 + 12 * i) + "\nend",
    }
    for i in range(6)
  ]
  (folder / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
  for name, text in TASKS.items():
    (folder / f"{name}.yaml").write_text(
      f"task: {name}\ndataset_path: json\n"
      f"dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\ntest_split: test\n{text}"
    )
  return folder


@pytest.fixture(scope="module", params=quick.first(FAMILIES))
def exported(request, tmp_path_factory):
  """(run folder, folder of its export) of a random model of a family."""
  torch = pytest.importorskip("torch", reason="needs the extra [bench]")
  transformers = pytest.importorskip("transformers", reason="needs the extra [bench]")
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

  name, values, adds_bos = FAMILIES[request.param]
  folder = tmp_path_factory.mktemp(request.param)
  inner = Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  marks = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=340, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
  )
  inner.train_from_iterator([" ".join(WORDS)] * 9, trainer)
  if adds_bos:
    inner.post_processor = processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 1)]
    )
  bos = {"bos_token": "<s>"} if adds_bos else {"bos_token": "</s>"}
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", **bos
  )
  tokenizer.chat_template = CHAT
  cls = getattr(transformers, name)
  torch.manual_seed(0)
  model = cls(cls.config_class(vocab_size=len(tokenizer), **values))
  model.save_pretrained(folder / "hf")
  tokenizer.save_pretrained(folder / "hf")
  import_export.import_model(folder / "hf", folder / "run")
  import_export.export_run(folder / "run", folder / "out", certify=False)
  return folder / "run", folder / "out"


needs_harness = pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is None, reason="needs the extra [harness]"
)


@pytest.mark.slow
@needs_harness
def test_answers_equal_those_of_the_hf_backend(exported, tasks):
  import lm_eval
  from lm_eval.models import huggingface
  from lm_eval.tasks import TaskManager

  run, out = exported
  theirs = huggingface.HFLM(pretrained=str(out), device="cpu", batch_size=3, dtype="float32")
  ours = harness.model(load.load(run), batch_size=4)
  for chat in (False, True):
    found = []
    for model in (ours, theirs):
      manager = TaskManager(include_path=str(tasks), include_defaults=False)
      results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=chat,
      )
      found.append(results["samples"])
    for name in TASKS:
      assert len(found[0][name]) == 6
      for a, b in zip(found[0][name], found[1][name], strict=True):
        assert a["arguments"] == b["arguments"]
        if name == "mini_generate":
          assert a["resps"] == b["resps"]
          continue
        for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
          x, y = (v if isinstance(v, tuple) else (v, True) for v in (x, y))
          assert x[0] == pytest.approx(y[0], abs=1e-4) and x[1] == y[1]


def test_windows_predict_each_token_once():
  # The example in the harness's documentation of `loglikelihood_rolling`.
  assert harness_model.windows(range(10), -1, 4) == [
    ([-1], [0, 1, 2, 3]),
    ([3], [4, 5, 6, 7]),
    ([5, 6, 7], [8, 9]),
  ]
  assert harness_model.windows([], -1, 4) == []


def test_settings_of_a_task_are_followed_or_refused():
  own = load.Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
  assert harness_model.settings({"do_sample": False, "temperature": 0.5}, own) == own._replace(
    temperature=0.0
  )
  assert harness_model.settings({"do_sample": True, "top_k": 3}, own) == own._replace(
    temperature=1.0, top_k=3
  )
  with pytest.raises(UserError, match="num_beams, which jaxgpt does not have"):
    harness_model.settings({"num_beams": 4}, own)


@pytest.mark.parametrize("exported", quick.first(FAMILIES), indirect=True)
@needs_harness
def test_the_command_prints_a_table_and_names_tasks(exported, tasks, capsys):
  run, _ = exported
  words = ["evaluate", f"--workdir={run}", "--tasks=mini_choice,mini_generate"]
  words += [f"--include-path={tasks}", "--limit=3"]
  assert main.main(words) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split() == ["task", "metric", "value", "±", "stderr"]
  assert [line.split()[:2] for line in lines[1:]] == [
    ["mini_choice", "acc"],
    ["mini_choice", "acc_norm"],
    ["mini_generate", "exact_match"],
  ]
  assert main.main([*words, "--split=test"]) == 2
  assert "--split" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("exported", FAMILIES, indirect=True)
@needs_harness
def test_two_processes_give_the_scores_of_one(exported, tasks, capsys):
  words = ["evaluate", f"--workdir={exported[0]}", f"--tasks={','.join(TASKS)}", "--json"]
  words += [f"--include-path={tasks}", "--batch-size=2"]
  assert main.main(words) == 0
  want = json.loads(capsys.readouterr().out)["tasks"]
  done = distributed_test.finish(
    distributed_test.start(None, "", 2, devices=2, command=words), seconds=300
  )
  assert [code for code, _, _ in done] == [0, 0], done
  outs = [text[text.find("{") :] if "{" in text else "" for _, text, _ in done]
  assert outs[1] == ""
  got = json.loads(outs[0])["tasks"]
  assert got.keys() == want.keys() == TASKS.keys()
  for task, values in want.items():
    assert got[task] == pytest.approx(values, rel=1e-4, nan_ok=True)


def test_without_the_extra_a_message_names_it(monkeypatch):
  monkeypatch.setattr(harness_model.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'jaxgpt\[harness\]'"):
    harness.check()


@pytest.mark.slow
@pytest.mark.parametrize("exported", FAMILIES, indirect=True)
@needs_harness
def test_tasks_in_training_give_the_scores_of_the_command(exported, tasks):
  loaded = load.load(exported[0])
  c = loaded.c.copy_and_resolve_references()
  c.eval.update(dict(tasks="mini_choice, mini_rolling", tasks_path=str(tasks), tasks_limit=2))
  context = evaluators.Context(
    c, exported[0], loaded.mesh, loaded.parts, loaded.tokenizer, loaded.data_digest
  )
  evaluate = in_training.make_harness(context)
  want = harness.evaluate(loaded, ["mini_choice", "mini_rolling"], str(tasks), limit=2)
  for _ in range(2):  # a second evaluation starts anew
    got = evaluate(loaded.params)
    assert got == pytest.approx(
      {
        f"{task}/{name}": value
        for task, values in want.items()
        for name, value in values.items()
        if not name.endswith("_stderr")
      }
    )
  c.eval.tasks = ""
  assert in_training.make_harness(context) is None
  c.eval.tasks = "mini_choise"
  with pytest.raises(UserError, match="eval.tasks=mini_choise: .* did you mean"):
    in_training.make_harness(context)
