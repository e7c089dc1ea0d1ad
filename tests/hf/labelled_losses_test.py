"""Objectives of labelled data give the losses of transformers' models with the same weights."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.commands.actions import import_export
from jaxgpt.model import transformer
from jaxgpt.training.objectives import forward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROWS, LENGTH, VOCABULARY, LABELS = 3, 12, 50, 4


def batch_of(draw, name):
  """(our batch, the arguments of transformers). Rows without padding."""
  tokens = draw.integers(5, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
  types = (np.arange(LENGTH) >= 5).astype(np.int32) * np.ones((ROWS, 1), np.int32)
  ours = {
    "tokens": tokens,
    "segment_ids": np.ones_like(tokens),
    "positions": np.arange(LENGTH, dtype=np.int32) * np.ones_like(tokens),
    "token_types": types,
    "loss_weights": np.ones(ROWS, np.float32),
  }
  theirs = {"input_ids": tokens, "token_type_ids": types}
  if name == "multi_label":
    ours["labels"] = theirs["labels"] = draw.integers(0, 2, (ROWS, LABELS)).astype(np.float32)
  elif name == "token_classification":
    ours["targets"] = draw.integers(0, LABELS, (ROWS, LENGTH)).astype(np.int32)
    ours["loss_weights"] = draw.integers(0, 2, (ROWS, LENGTH)).astype(np.float32)
    theirs["labels"] = np.where(ours["loss_weights"] > 0, ours["targets"], -100)
  else:
    start, end = np.array([6, 0, 7]), np.array([8, 0, 11])
    for key, at in (("starts", start), ("ends", end)):
      ours[key] = (np.arange(LENGTH) == at[:, None]).astype(np.int32)
    theirs |= {"start_positions": start, "end_positions": end}
  as_torch = lambda x: torch.tensor(x, dtype=torch.float32 if x.dtype == np.float32 else torch.long)
  return jax.tree.map(jnp.array, ours), {key: as_torch(x) for key, x in theirs.items()}


@pytest.mark.parametrize(
  "name, architecture, head",
  [
    ("multi_label", "BertForSequenceClassification", "classifier"),
    ("token_classification", "BertForTokenClassification", "classifier"),
    ("question_answering", "BertForQuestionAnswering", "qa_outputs"),
  ],
)
def test_losses_equal_those_of_transformers(tmp_path, name, architecture, head):
  torch.manual_seed(0)
  theirs = getattr(transformers, architecture)(
    transformers.BertConfig(
      vocab_size=VOCABULARY,
      hidden_size=16,
      num_hidden_layers=1,
      num_attention_heads=2,
      intermediate_size=32,
      max_position_embeddings=32,
      initializer_range=0.3,
      num_labels=2 if name == "question_answering" else LABELS,
      problem_type="multi_label_classification" if name == "multi_label" else None,
    )
  ).eval()
  (theirs if name == "multi_label" else theirs.bert).save_pretrained(tmp_path)
  read = import_export.read_model(tmp_path)
  c = read.c.copy_and_resolve_references()
  assert (c.objective.name == "multi_label") == (name == "multi_label"), "as problem_type says"
  params = dict(read.params)
  if name != "multi_label":
    c.model.update(dict(head="token_classifier", head_transform="none", head_bias=True))
    c.model.num_labels = theirs.config.num_labels
    layer = getattr(theirs, head)
    params |= {"head": layer.weight.detach().numpy().T, "head_bias": layer.bias.detach().numpy()}
  c.objective.name = name
  c = config.resolve(c)
  batch, arguments = batch_of(np.random.default_rng(0), name)
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  loss, weight, _ = forward.make(model, c)(params, None, batch, None)
  np.testing.assert_allclose(loss / weight, theirs(**arguments).loss.item(), rtol=1e-5)
