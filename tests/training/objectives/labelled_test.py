"""Objectives of labelled data agree with their equations, and with every way to batch the examples.

The reference runs the model on each example alone, in a row of its own length without padding, and
computes the loss from the logits by its definition. The loss function under test gets batches of
rows that are padded, packed and in any order.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import config
from jaxgpt.data import layouts, packing, source
from jaxgpt.model import transformer
from jaxgpt.training import objectives
from jaxgpt.training.objectives import forward
from tests import quick
from tests.data.layouts_test import T as BYTES
from tests.data.layouts_test import write

ROWS, LENGTH, BOS, EOS = 4, 24, BYTES.bos_id, BYTES.eos_id
TAGS, CLASSES = ("B", "I", "O"), ("a", "b", "c")

# All texts of a kind are equally long, so that the reference is one program for all of them.
FIELDS = {
  "multi_label": [
    {"text": "one text", "labels": ["a"]},
    {"text": "and more", "labels": ["a", "c"]},
    {"text": "the last", "labels": []},
  ],
  "tagging": [
    {"words": ["Jim", "ran", "x"], "tags": ["B", "O", "O"]},
    {"words": ["inn", "Berne"], "tags": ["O", "B"]},
    {"words": ["a", "b", "c", "d", "e"], "tags": ["O", "I", "B", "B", "O"]},
  ],
  "question_answering": [
    {"question": "who", "context": "Jim ran far", "answers": [{"text": "Jim", "answer_start": 0}]},
    {"question": "to?", "context": "off to York", "answers": [{"text": "York", "answer_start": 7}]},
    {"question": "whens", "context": "then he r", "answers": []},
  ],
  "retrieval": [
    {"query": "first", "positive": "number one"},
    {"query": "a 2nd", "positive": "here is it"},
    {"query": "third", "positive": "and a last"},
  ],
}
KINDS = {
  "multi_label": "multi_label",
  "token_classification": "tagging",
  "question_answering": "question_answering",
  "contrastive": "retrieval",
}
CASES = [
  ("multi_label", False),
  ("token_classification", False),
  ("token_classification", True),
  ("question_answering", False),
  ("question_answering", True),
  ("contrastive", False),
  ("contrastive", True),
]


def make_config(name, causal):
  c = config.base()
  c.model.update(
    dict(
      vocab_size=BYTES.vocab_size,
      num_layers=1,
      width=8,
      num_heads=2,
      mlp_width=16,
      position="rotary",
      init_std=0.5,
      token_types=2,
      causal=causal,
      num_labels=2 if name == "question_answering" else 3,
      head_bias=name != "contrastive",
      pooling="last" if causal else "mean",
      head={"multi_label": "classifier", "contrastive": "none"}.get(name, "token_classifier"),
    )
  )
  c.objective.name = name
  c.objective.similarity_temperature = 0.5
  c.data.seq_len, c.data.batch_size = LENGTH, ROWS
  return config.resolve(c)


def stored(text):
  return [BOS, *BYTES.encode(text), EOS]


def inputs_of(kind):
  """A function from fields to (tokens, token types) of each text, written out by hand."""

  def inputs(fields):
    if kind == "question_answering":
      question, passage = stored(fields["question"]), [*BYTES.encode(fields["context"]), EOS]
      return [(question + passage, [0] * len(question) + [1] * len(passage))]
    if kind == "retrieval":
      found = [stored(fields[side]) for side in ("query", "positive")]
    else:
      found = [stored(fields["text"] if kind == "multi_label" else " ".join(fields["words"]))]
    return [(tokens, [0] * len(tokens)) for tokens in found]

  return inputs


def losses_of(kind, fields, logits, xp, symmetric=False):
  """The loss of each example, and its weight, by definition.

  Args:
    kind: Kind of the data.
    fields: The fields of each example.
    logits: For each example, the model's output for each of its texts, without a batch dimension.
    xp: numpy or jax.numpy.
    symmetric: For retrieval.
  """
  nll = lambda x, i: -xp.log(xp.exp(x[i]) / xp.exp(x).sum())
  if kind == "retrieval":
    unit = lambda x: x / xp.sqrt((x * x).sum())
    queries, positives = ([unit(x[side]) for x in logits] for side in (0, 1))
    s = xp.stack([xp.stack([(q * p).sum() / 0.5 for p in positives]) for q in queries])
    rows = [nll(s[i], i) for i in range(len(s))]
    columns = [nll(s[:, i], i) for i in range(len(s))]
    return [((a + b) / 2 if symmetric else a, 1) for a, b in zip(rows, columns)]
  out = []
  for f, (x,) in zip(fields, logits):
    if kind == "multi_label":
      y = np.array([float(name in f["labels"]) for name in CLASSES])
      p = 1 / (1 + xp.exp(-x))
      out.append(((-y * xp.log(p) - (1 - y) * xp.log(1 - p)).mean(), 1))
    elif kind == "tagging":
      at, total = 1, 0.0
      for word, tag in zip(f["words"], f["tags"]):
        total += nll(x[at], TAGS.index(tag))
        at += len(word) + 1
      out.append((total, len(f["words"])))
    else:
      start = end = 0
      if f["answers"]:
        start = len(f["question"]) + 2 + f["answers"][0]["answer_start"]
        end = start + len(f["answers"][0]["text"]) - 1
      out.append(((nll(x[:, 0], start) + nll(x[:, 1], end)) / 2, 1))
  return out


class Case(NamedTuple):
  kind: str
  split: source.Split
  layout: layouts.Layout
  params: Any
  alone: list[list[np.ndarray]]  # logits of each example, for each of its texts
  grads: Any  # of the mean loss, by definition
  loss: Any  # jitted (params, batch) -> ((loss sum, (weight sum, aux)), gradients)


@functools.cache
def case(name, causal, folder):
  kind = KINDS[name]
  c, fields = make_config(name, causal), FIELDS[kind]
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  params = transformer.init(model, jax.random.key(0))
  names = {"tagging": TAGS, "multi_label": CLASSES}.get(kind, ())
  path = folder / f"{kind}{causal}"
  split = source.open_split(write(path, kind, fields, names), "train")
  layout = layouts.make(objectives.OBJECTIVES[name].layout, [("data", split)])

  def run(params, tokens, types):
    """The output for one text, which is a row of its own."""
    positions = jnp.arange(len(tokens))[None]
    x = model.apply({"params": params}, tokens[None], positions, token_types_BT=types[None])
    if name != "contrastive":
      return x.logits[0]
    return x.logits[0, -1] if causal else x.logits[0].mean(0)

  texts = [
    [np.array(side) for side in zip(*of_side)] for of_side in zip(*map(inputs_of(kind), fields))
  ]

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def reference(params):
    sides = [jax.lax.map(lambda text: run(params, *text), side) for side in texts]
    logits = [[side[i] for side in sides] for i in range(len(fields))]
    found = losses_of(kind, fields, logits, jnp)
    return sum(loss for loss, _ in found) / sum(weight for _, weight in found), logits

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params, batch):
    total, weight, aux = forward.make(model, c)(params, None, batch, None)
    return total, (weight, aux)

  (_, logits), grads = reference(params)
  return Case(kind, split, layout, params, jax.tree.map(np.float64, logits), grads, loss)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("labelled")


def batch_of(example, rows):
  """A batch whose rows hold the given documents, () for a row of padding."""
  whole, _ = example.layout.index(example.split, "one_per_row", LENGTH)
  spans = [[np.concatenate(a) for a in zip(*map(whole.spans, row))] for row in rows if row]
  offsets = np.concatenate(([0], np.cumsum([len(doc) for doc, _, _ in spans]))).astype(np.int64)
  joined = [np.concatenate(arrays) for arrays in zip(*spans)]
  pack = packing.PackIndex(LENGTH, offsets, *joined)
  items = [layouts.Item(example.split, pack, row, row) for row in range(len(spans))]
  made = example.layout.batch(items, ROWS, LENGTH)
  # The layout puts rows of padding last. They may be anywhere.
  order = np.argsort([not row for row in [*rows, *[()] * (ROWS - len(rows))]], kind="stable")
  return jax.tree.map(lambda x: x[np.argsort(order)], made)


@pytest.mark.parametrize("name, causal", quick.first(CASES[::2] + CASES[1::2], 4))
def test_the_loss_and_its_gradients_are_those_of_the_equation(name, causal, folder):
  example = case(name, causal, folder)
  (total, (weight, aux)), grads = example.loss(
    example.params, batch_of(example, [(0,), (1,), (2,)])
  )
  by_definition = losses_of(example.kind, FIELDS[example.kind], example.alone, np)
  np.testing.assert_allclose(total, sum(loss for loss, _ in by_definition), rtol=1e-5)
  assert weight == sum(weight for _, weight in by_definition) and aux["nll"] == total
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(example.grads))
  assert largest > 1e-2
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(example.grads), strict=True):
    np.testing.assert_allclose(got / weight, want, atol=1e-5 * largest)


@pytest.mark.parametrize("name, causal", CASES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_padding_packing_and_company_change_no_examples_loss(name, causal, folder, data):
  example = case(name, causal, folder)
  documents = data.draw(st.permutations(range(3)), "order")[: data.draw(st.integers(1, 3), "count")]
  rows = [(d,) for d in documents]
  if example.kind == "tagging" and data.draw(st.booleans(), "packed"):
    rows = [tuple(documents[:2]), *rows[2:]]
  for place in data.draw(st.lists(st.integers(0, 3), max_size=ROWS - len(rows)), "padding"):
    rows.insert(place, ())
  (total, (weight, _)), grads = example.loss(example.params, batch_of(example, rows))
  fields = [FIELDS[example.kind][d] for d in documents]
  want = losses_of(example.kind, fields, [example.alone[d] for d in documents], np)
  np.testing.assert_allclose(total, sum(loss for loss, _ in want), rtol=1e-5, atol=1e-6)
  assert weight == sum(w for _, w in want)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
