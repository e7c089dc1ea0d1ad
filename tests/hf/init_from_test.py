"""Weights of a published model: its tokenizer and the names of its classes are read with them."""

import json

import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.hf.weight_source import WEIGHT_SOURCES
from jaxgpt.run import init_from
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
  assert "holds no tokenizer that can be read, so nobody checked" in note


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
