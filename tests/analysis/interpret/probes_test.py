"""Linear probes: they find what is linear in activations, and control tasks tell memorizing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.analysis.interpret import explain, probe_layers, probes, taps
from jaxgpt.commands.models import probe as command
from jaxgpt.data import source
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.text.prepare import prepare


def test_a_probe_finds_a_linear_property_and_not_the_control_task():
  rng = np.random.default_rng(0)
  types = rng.integers(0, 100, 1500)
  labels = types % 2
  direction = rng.normal(size=16)
  x = rng.normal(size=(1500, 16)) + 3 * labels[:, None] * direction
  found = probes.probe(x, labels, types)
  assert found.accuracy > 0.97
  assert 0.4 < found.control < 0.65
  assert found.selectivity == found.accuracy - found.control > 0.3
  assert (found.classes, found.held_out) == (2, 450)
  assert found.majority < 0.6


def test_a_probe_of_noise_is_at_chance_on_examples_that_it_was_not_fitted_to():
  rng = np.random.default_rng(1)
  found = probes.probe(rng.normal(size=(1500, 16)), rng.integers(0, 2, 1500))
  assert 0.4 < found.accuracy < 0.6
  assert found.control is None and found.selectivity is None


def test_a_probe_needs_two_classes():
  with pytest.raises(UserError, match="got 1 classes and 9 examples"):
    probes.probe(np.zeros((9, 2)), np.zeros(9, int))


@pytest.fixture(scope="module")
def tagged(corpus, tmp_path_factory):
  """Words of the corpus, tagged by whether the word before begins with a vowel or is the first."""
  folder = tmp_path_factory.mktemp("tagged")
  rng = np.random.default_rng(0)
  words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs"]
  with (folder / "train.jsonl").open("w") as f:
    for _ in range(600):
      text = rng.choice(words, 5).tolist()
      tags = ["vowel" if before[0] in "oa" else "other" for before in ["x", *text[:-1]]]
      f.write(json.dumps({"words": text, "tags": tags}) + "\n")
  prepare.prepare(
    [folder / "train.jsonl"], folder / "data", kind="tagging", tokenizer="bytes", test=0
  )
  return folder / "data"


def table(out):
  """{layer: (accuracy, control, selectivity)} of what the command printed, in percent."""
  rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.endswith("% |")]
  return {row[0]: tuple(float(x.rstrip("%")) for x in row[1:]) for row in rows}


def test_the_command_prints_a_row_for_each_layer(trained, tagged, corpus, capsys):
  options = dict(workdir=str(trained), data=str(tagged), words=300)
  command.run(command.ProbeOptions(**options))
  out = capsys.readouterr().out
  found = table(out)
  assert list(found) == ["embeddings", "layer 0", "layer 1"] and "2 classes (other, vowel)" in out
  for accuracy, control, selectivity in found.values():
    assert selectivity == pytest.approx(accuracy - control, abs=0.11)
  with pytest.raises(UserError, match="is of kind 'text', and probes need words with tags"):
    command.run(command.ProbeOptions(**options | {"data": str(corpus)}))
  with pytest.raises(UserError, match="--tags=verb: there are other, vowel"):
    command.run(command.ProbeOptions(**options, tags="verb"))


def test_the_words_that_are_read_are_those_of_the_documents(trained, tagged):
  m = explain.of_run(load.load(trained, devices=jax.local_devices()[:1]))
  split = source.open_split(tagged, "train")
  words = probe_layers.read(m, split, 98)
  assert len(words.labels) == 100 and words.cut == 0
  tags = [split.tags(doc) for doc in range(words.documents)]
  np.testing.assert_array_equal(words.labels, np.concatenate(tags)[:, 1])
  ids = [split.read(doc, 0, split.lengths[doc] + 1)[tags[doc][:, 0]] for doc in range(len(tags))]
  np.testing.assert_array_equal(words.types, np.concatenate(ids))
  alone = jnp.asarray(split.read(3, 0, split.lengths[3] + 1))[None]
  only = probe_layers.read(m, split, 98, [1])
  np.testing.assert_array_equal(only.types, words.types[words.labels == 1])
  at = taps.read(m.model, m.params, taps.Inputs(alone), ("resid_final",)).at["resid_final"][0]
  before = sum(len(t) for t in tags[:3])
  np.testing.assert_allclose(
    words.streams[-1, before : before + len(tags[3])], at[tags[3][:, 0]], atol=1e-4
  )
