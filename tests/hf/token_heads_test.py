"""Published models with an output for each token: taggers, and models that find answers."""

import json

import numpy as np
import pytest

from jaxgpt.commands.actions import import_export
from jaxgpt.commands.main import main
from jaxgpt.errors import UserError
from jaxgpt.hf import convert
from jaxgpt.hf.weight_source import WEIGHT_SOURCES
from jaxgpt.inference import load
from jaxgpt.run import init_from, source_heads
from jaxgpt.text.prepare import prepare
from jaxgpt.text.tokenizers.base import ByteTokenizer
from tests import quick

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")

from tests.hf import variants  # noqa: E402

TAGS = ("O", "B-X", "I-X")
NAMED = dict(
  num_labels=3, id2label=dict(enumerate(TAGS)), label2id={name: i for i, name in enumerate(TAGS)}
)


def classes():
  """(family, class of transformers, values of its config) of all that transformers has."""
  for kind, values in (("QuestionAnswering", {}), ("TokenClassification", NAMED)):
    for family, (cls, _) in variants.FAMILIES.items():
      base = cls.removesuffix("ForCausalLM").removesuffix("LMHeadModel").removesuffix("ForMaskedLM")
      if hasattr(transformers, f"{base}For{kind}"):
        yield family, f"{base}For{kind}", values


# The first of these store tensors under names of their own.
FIRST = ["LlamaForQuestionAnswering", "RobertaForTokenClassification"]
CASES = sorted(classes(), key=lambda case: FIRST.index(case[1]) if case[1] in FIRST else len(FIRST))


@pytest.mark.parametrize("family, cls, values", quick.first(CASES, 2))
def test_logits_and_classes_come_in_and_go_out(family, cls, values, tmp_path):
  variant = variants.Variant(cls, cls, variants.FAMILIES[family][1] | values, {})
  kind, message = variants.outcome(variant, tmp_path)
  assert kind == "equal", message
  there, back = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("theirs", "back"))
  assert back["architectures"] == [cls] == there["architectures"]
  for key in ("id2label", "label2id") if values else ():
    assert back[key] == there[key]


def test_all_families_are_among_the_cases():
  assert len(CASES) > 25 and {case[0] for case in CASES} >= {"qwen3_moe", "camembert", "gemma2"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
  """A function (class, values) -> (transformers' model, its folder, the imported run)."""

  def make(cls, **values):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    c = transformers.BertConfig(
      vocab_size=288,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=1,
      num_attention_heads=4,
      max_position_embeddings=64,
      initializer_range=0.5,
      **values,
    )
    model = getattr(transformers, cls)(c).eval()
    model.save_pretrained(folder / "hf")
    return model, folder / "hf", folder / "run"

  return make


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
  """A data folder with the byte tokenizer."""
  folder = tmp_path_factory.mktemp("tokens")
  (folder / "a.txt").write_text("some text\n" * 9)
  prepare.prepare([folder / "a.txt"], folder / "data", tokenizer="bytes", cut_chars=0)
  return folder / "data"


def predicted(run, row, folder):
  """What `jaxgpt predict` writes for a row."""
  (folder / "in.jsonl").write_text(json.dumps(row) + "\n")
  out = folder / "out.jsonl"
  assert (
    main(["predict", f"--workdir={run}", f"--input={folder / 'in.jsonl'}", f"--output={out}"]) == 0
  )
  return json.loads(out.read_text())


def test_an_imported_tagger_predicts_the_tags_of_transformers(bert, tokens, tmp_path):
  model, folder, run = bert("BertForTokenClassification", **NAMED)
  words = ["Ann", "met", "Bob", "in", "York", "x", "yz"]
  text = ByteTokenizer()
  ids = [text.bos_id, *text.encode(" ".join(words)), text.eos_id]
  with torch.no_grad():  # each tag is that of some words
    model.classifier.bias -= model(torch.tensor([ids])).logits[0].mean(0)
    best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
  model.save_pretrained(folder)
  import_export.import_model(folder, run, tokenizer=tokens)
  firsts = np.cumsum([1, *(len(word) + 1 for word in words[:-1])])
  got = predicted(run, {"words": words}, tmp_path)
  assert got["tags"] == [TAGS[best[at]] for at in firsts] and len(set(got["tags"])) > 1
  assert load.load(run).c.model.label_names == TAGS


def test_an_imported_model_finds_the_answers_of_transformers(bert, tokens, tmp_path):
  model, folder, run = bert("BertForQuestionAnswering")
  import_export.import_model(folder, run, tokenizer=tokens)
  question, context = "Who met?", "Ann met Bob in York."
  text = ByteTokenizer()
  before = [text.bos_id, *text.encode(question), text.eos_id]
  ids = [*before, *text.encode(context), text.eos_id]
  types = [0] * len(before) + [1] * (len(ids) - len(before))
  with torch.no_grad():
    out = model(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
  starts, ends = out.start_logits[0].tolist(), out.end_logits[0].tolist()
  n, end = len(before), len(ids) - 1
  score, i, j = max((starts[i] + ends[j], i, j) for i in range(n, end) for j in range(i, end))
  want = context[i - n : j + 1 - n].strip() if score >= starts[0] + ends[0] else ""
  assert predicted(run, {"question": question, "context": context}, tmp_path)["answer"] == want
  certificate = import_export.export_run(run, tmp_path / "back").certificate
  assert certificate["checked"] and certificate["logits"]["max_abs"] < 1e-4
  assert certificate["architecture"] == "BertForQuestionAnswering"


def test_what_is_no_tagger_is_refused(bert, tmp_path):
  _, folder, _ = bert("BertForTokenClassification", num_labels=1)
  with pytest.raises(UserError, match="1 label for each token .* needs 2 or more"):
    import_export.read_model(folder)
  _, folder, _ = bert("BertForQuestionAnswering")
  with pytest.raises(UserError, match="labels=a,b: the model has no classes"):
    import_export.read_model(folder, labels=("a", "b"))


def test_each_output_gets_a_name_and_a_head_of_tokens_has_no_problem_type(bert):
  values = NAMED | {"problem_type": "multi_label_classification"}
  _, folder, _ = bert("BertForTokenClassification", **values)
  model = import_export.read_model(folder, labels=("a", "b", "c"))
  assert model.c.model.label_names == ("a", "b", "c")
  assert model.c.objective.name == "token_classification"
  for names in (("a", "b"), ("a", "b", "c", "d"), ("numbers",)):
    with pytest.raises(UserError, match=f"the model has 3 outputs, {len(names)} named"):
      import_export.read_model(folder, labels=names)


def test_a_family_without_the_class_is_no_tagger():
  values = variants.FAMILIES["olmo2"][1] | {"model_type": "olmo2"}
  with pytest.raises(UserError, match="'Olmo2ForTokenClassification' .*: of olmo2 are Olmo2ForC"):
    convert.read(values | {"architectures": ["Olmo2ForTokenClassification"]})
  fields = convert.read(values).fields | dict(head="token_classifier", head_bias=True)
  with pytest.raises(UserError, match="head='token_classifier', where the family has 'lm'"):
    convert.family_of(convert.configured(fields).model, "olmo2")


@pytest.mark.parametrize(
  "source, target",
  [
    (("BertForSequenceClassification", NAMED), ("BertForTokenClassification", NAMED)),
    (("BertForQuestionAnswering", {}), ("BertForTokenClassification", {})),
    (("BertForTokenClassification", {}), ("BertForQuestionAnswering", {})),
  ],
)
def test_a_head_with_another_meaning_is_not_taken(bert, source, target):
  """Two of these heads have the same shapes, and some the same names."""
  _, old, _ = bert(source[0], **source[1])
  _, new, _ = bert(target[0], **target[1])
  model = import_export.read_model(new)
  found = init_from.load(old, model.c.model, model.parts.state["params"], WEIGHT_SOURCES)
  assert found.report["initialized"] == ["head", "head_bias"]
  assert len([name for name in found.report["left"] if "bert." not in name]) == 2
  same = init_from.load(new, model.c.model, model.parts.state["params"], WEIGHT_SOURCES)
  assert not same.report["initialized"] and not same.report["left"]
  assert source_heads.same_output(model.c.model, model.c.model)
