"""Weights of a published model: its tokenizer and the names of its classes are read with them."""

import json

import pytest

from jaxgpt import config
from jaxgpt.commands.actions import import_export
from jaxgpt.errors import UserError
from jaxgpt.hf.weight_source import WEIGHT_SOURCES
from jaxgpt.inference import load
from jaxgpt.run import init_from
from jaxgpt.text.prepare import prepare, shards
from jaxgpt.text.tokenizers import tokenizer
from jaxgpt.text.tokenizers.base import ByteTokenizer

BERT = dict(
  model_type="bert",
  architectures=["BertForSequenceClassification"],
  vocab_size=288,
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=1,
  num_attention_heads=2,
  max_position_embeddings=64,
  type_vocab_size=2,
  layer_norm_eps=1e-12,
  hidden_act="gelu",
)


@pytest.fixture
def folder(tmp_path):
  """A model's folder with a byte-level tokenizer of its own, without weights."""
  T = pytest.importorskip("tokenizers")
  inner = T.Tokenizer(T.models.BPE())
  inner.pre_tokenizer = T.pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = T.pre_tokenizers.ByteLevel.alphabet()
  trainer = T.trainers.BpeTrainer(
    vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
  )
  inner.train_from_iterator(["some other text"], trainer)
  inner.save(str(tmp_path / "tokenizer.json"))
  roles = {"bos_token": "<s>", "eos_token": "</s>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
  (tmp_path / "config.json").write_text(json.dumps(BERT))
  return tmp_path


def run_from(folder):
  c = config.base()
  c.init_from, c.data.path = str(folder), "d"
  return c


def test_data_in_other_tokens_are_refused(folder):
  with pytest.raises(UserError, match=rf"another tokenizer .* jaxgpt data --tokenizer={folder}"):
    init_from.check_tokenizer(run_from(folder), ByteTokenizer(), WEIGHT_SOURCES)
  own = tokenizer.load(folder)
  assert init_from.check_tokenizer(run_from(folder), own, WEIGHT_SOURCES) == []


def test_a_folder_without_a_tokenizer_says_that_nothing_was_checked(folder):
  for name in ("tokenizer.json", "tokenizer_config.json"):
    (folder / name).unlink()
  [note] = init_from.check_tokenizer(run_from(folder), ByteTokenizer(), WEIGHT_SOURCES)
  assert "holds no tokenizer that can be read, so jaxgpt can't check" in note


@pytest.mark.parametrize(
  "labels, names",
  [
    ({"id2label": {"0": "good", "1": "bad", "2": "so-so"}}, ("good", "bad", "so-so")),
    ({}, ("LABEL_0", "LABEL_1")),
    ({"id2label": {"0": "x"}}, ()),
  ],
)
def test_the_names_of_its_classes_are_read(folder, labels, names):
  (folder / "config.json").write_text(json.dumps(BERT | labels))
  found = init_from.inspect(folder, WEIGHT_SOURCES).c_model
  assert found.label_names == names and found.num_labels == max(len(names), 1)


def test_an_imported_classifier_numbers_the_data_by_its_names(tmp_path, capsys):
  """Its labels are what transformers answers, so the accuracy is 1 in whatever order they come."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  names = ["zebra", "ant", "mole"]  # not in the order of their letters
  table = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
  torch.manual_seed(0)
  c = transformers.BertConfig(**(BERT | table | {"hidden_dropout_prob": 0.0, "num_labels": 3}))
  model = transformers.BertForSequenceClassification(c).eval()
  texts = [f"{i} " + "abcdefgh"[i % 8] * (1 + i % 9) for i in range(48)]
  bytes_ = ByteTokenizer()
  logits = []
  for text in texts:
    ids = torch.tensor([[bytes_.bos_id, *bytes_.encode(text), bytes_.eos_id]])
    with torch.no_grad():
      logits.append(model(ids).logits[0])
  with torch.no_grad():  # each class is the answer to some of the texts
    model.classifier.bias -= torch.stack(logits).mean(0)
  answers = [int((x - torch.stack(logits).mean(0)).argmax()) for x in logits]
  assert len(set(answers)) == 3
  model.save_pretrained(tmp_path / "hf")
  lines = [json.dumps({"text": t, "label": names[a]}) for t, a in zip(texts, answers)]
  (tmp_path / "in.jsonl").write_text("\n".join(lines))
  data = tmp_path / "data"
  prepare.prepare([tmp_path / "in.jsonl"], data, kind="classification", tokenizer="bytes")
  assert shards.read_manifest(data)["label_names"] == ["ant", "mole", "zebra"]

  import_export.import_model(tmp_path / "hf", tmp_path / "run", tokenizer=data)
  run = load.load(tmp_path / "run")
  assert run.c.model.label_names == tuple(names)
  assert load.evaluate_run(run, "train", data=str(data))["accuracy"] == 1.0
  import_export.export_run(tmp_path / "run", tmp_path / "back", certify=False)
  written = json.loads((tmp_path / "back" / "config.json").read_text())
  assert written["id2label"] == {str(i): name for i, name in enumerate(names)}
  assert transformers.AutoConfig.from_pretrained(tmp_path / "back").label2id == table["label2id"]

  # Other names: an error with both lists, and names that the user gives.
  lines = [line.replace("zebra", "horse") for line in lines]
  (tmp_path / "in.jsonl").write_text("\n".join(lines))
  other = tmp_path / "other"
  prepare.prepare([tmp_path / "in.jsonl"], other, kind="classification", tokenizer="bytes")
  with pytest.raises(
    UserError, match="classes ant, horse, mole, but the model has zebra, ant, mole"
  ):
    load.evaluate_run(run, "train", data=str(other))
  renamed = run._replace(c=run.c.copy_and_resolve_references())
  renamed.c.model.label_names = ("horse", "ant", "mole")
  assert load.evaluate_run(renamed, "train", data=str(other))["accuracy"] == 1.0
