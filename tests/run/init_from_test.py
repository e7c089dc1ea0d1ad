"""Initial weights from run folders and from sources that the caller passes."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from jaxgpt.run import checkpoints, init_from, run_folder
from jaxgpt.text.tokenizers.base import ByteTokenizer
from jaxgpt.text.tokenizers.huggingface import HuggingFaceTokenizer


class Numbers:
  """A source whose folders have a config.json with 'numbers'."""

  def recognizes(self, folder):
    return "numbers" in json.loads((folder / "config.json").read_text())

  def inspect(self, folder):
    if not json.loads((folder / "config.json").read_text())["numbers"]:
      raise UserError("no numbers")
    c = config.base()
    c.model.update_from_flattened_dict({"num_layers": 7, "vocab_size": 8})
    return init_from.Inspected(config.resolve(c).model, None)

  def load(self, folder, c_model, abstract):
    return init_from.Weights({"a": jnp.ones(2), "b/c": jnp.ones(3)}, ["d"])


def folder_with(tmp_path, value):
  (tmp_path / "config.json").write_text(value)
  return tmp_path


def test_a_source_is_chosen_by_the_folder_and_reported(tmp_path):
  folder = folder_with(tmp_path, '{"numbers": true}')
  init_from.inspect(folder, (Numbers(),))
  c = config.resolve(config.base(), vocab_size=8)
  abstract = {"a": 0, "b": {"c": 0, "e": 0}}
  given = init_from.load(folder, c.model, abstract, (Numbers(),))
  assert given.params.keys() == {"a", "b/c"}
  assert given.report["initialized"] == ["b/e"] and given.report["left"] == ["d"]
  assert given.report["changed"] == {
    "num_layers": [7, 6],
    "attention_pattern": [("global",) * 7, ("global",) * 6],
    "mlp_pattern": [("dense",) * 7, ("dense",) * 6],
  }
  text = "\n".join(init_from.describe(given.report))
  assert "2 parameters loaded" in text and "1 not used: d" in text
  assert "model.num_layers was 7 there, is 6" in text


def test_a_source_checks_its_folder(tmp_path):
  with pytest.raises(UserError, match="no numbers"):
    init_from.inspect(folder_with(tmp_path, '{"numbers": false}'), (Numbers(),))


@pytest.mark.parametrize(
  "text, words",
  [
    ('{"model_type": "gpt2"}', "is not a run folder.*weight_sources=jaxgpt.hf.weight_source"),
    ("{", "config.json is not valid JSON"),
    ("[]", "not valid JSON .not an object"),
  ],
)
def test_folders_without_a_source_are_refused(tmp_path, text, words):
  with pytest.raises(UserError, match=words):
    init_from.inspect(folder_with(tmp_path, text))


def test_a_folder_without_a_config_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds no config.json: name a run folder"):
    init_from.inspect(tmp_path)


def settings(**changes):
  """A config of a small encoder."""
  c = config.base()
  c.model.update(dict(num_layers=1, width=8, num_heads=2, mlp_width=16, vocab_size=264, max_len=16))
  c.model.causal = False
  c.data.seq_len = 16
  c.objective.name = "masked_lm"
  c.update_from_flattened_dict({f"model.{key}": value for key, value in changes.items()})
  c.objective.name = "classification" if c.model.head == "classifier" else c.objective.name
  return config.resolve(c)


def shapes(c):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
  leaves, _ = transformer.abstract(
    transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  )
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), leaves), mesh


def run_of(folder, c):
  """A run folder at step 0 whose weights are all ones."""
  abstract, mesh = shapes(c)
  origin = dict.fromkeys(config.flatten(c), "base")
  run_folder.enter(folder, c, origin, mesh, "", ByteTokenizer())
  saved = checkpoints.Checkpoints(folder / run_folder.CHECKPOINTS)
  params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract)
  saved.save({"step": np.int32(0), "nonfinite_step": np.int32(-1), "params": params})
  saved.close()
  return folder


BERT = dict(head_bias=True, head_transform="norm")
CLASSES = dict(head="classifier", head_bias=True, head_transform="tanh", num_labels=2)


@pytest.mark.parametrize(
  "old, new, left, fresh",
  [
    (  # a masked language model becomes a classifier
      BERT,
      CLASSES,
      "head_bias head_dense head_dense_bias head_norm/bias head_norm/scale",
      "head head_bias head_dense head_dense_bias",
    ),
    (  # ModernBERT's head has the same layer before the output in both
      BERT,
      CLASSES | {"head_transform": "norm"},
      "head_bias",
      "head head_bias",
    ),
    (  # a decoder becomes a classifier
      dict(causal=True, tie_embeddings=False),
      dict(causal=True, head="classifier", pooling="mean"),
      "head",
      "head",
    ),
    (CLASSES, CLASSES | {"num_labels": 3}, "head head_bias", "head head_bias"),
    (CLASSES, CLASSES, "", ""),
    (  # other classes, though as many
      CLASSES | {"label_names": ("a", "b")},
      CLASSES | {"label_names": ("x", "y")},
      "head head_bias",
      "head head_bias",
    ),
    (
      CLASSES | {"label_names": ("a", "b")},
      CLASSES | {"label_names": ("a", "b")},
      "",
      "",
    ),
    (CLASSES, BERT, "head head_bias head_dense head_dense_bias", "head_bias head_dense"),
  ],
)
def test_a_head_of_another_kind_is_passed_over_and_named(tmp_path, old, new, left, fresh):
  folder, c = run_of(tmp_path / "run", settings(**old)), settings(**new)
  found = init_from.load(folder, c.model, shapes(c)[0])
  assert found.report["left"] == left.split()
  assert set(fresh.split()) <= set(found.report["initialized"])
  assert all(path.startswith("head") for path in found.report["initialized"])
  assert all((np.asarray(x) == 1).all() for x in found.params.values())
  if left:
    assert f"not used: {', '.join(left.split())}" in "\n".join(init_from.describe(found.report))


def tokens_of(words):
  """A tokenizer of whole words, in which word i has the id i."""
  tokenizers = pytest.importorskip("tokenizers")
  vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.add_special_tokens(["<s>", "</s>"])
  return HuggingFaceTokenizer({"tokenizer.json": inner.to_str().encode()})


def test_tokens_are_the_same_only_if_every_word_has_its_id():
  words = [f"w{i}" for i in range(500)]
  a, b = tokens_of(words), tokens_of([*words[:400], *words[400:402][::-1], *words[402:]])
  assert a.digest != b.digest and a.encode("The year w3") == b.encode("The year w3")
  assert init_from.same_tokens(a, a) and init_from.same_tokens(a, tokens_of(words))
  assert not init_from.same_tokens(a, b), "two words swapped"
  assert not init_from.same_tokens(a, tokens_of(words[:-1])), "a word less"
  assert not init_from.same_tokens(a, ByteTokenizer())
