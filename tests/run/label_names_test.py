"""Which names number the classes of a run: its own, those of its source, or those of its data."""

import json

import jax
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.run import init_from, label_names, run_folder
from jaxgpt.text.prepare import prepare, shards
from jaxgpt.text.tokenizers.base import ByteTokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A function (classes) -> folder of data with these classes."""
  folder = tmp_path_factory.mktemp("labels")

  def make(*names):
    out = folder / "-".join(names)
    if not out.exists():
      rows = [{"text": f"text {i}", "label": names[i % len(names)]} for i in range(40)]
      (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
      prepare.prepare([folder / "in.jsonl"], out, kind="classification", tokenizer="bytes")
    return str(out)

  return make


def classifier(path="", source="", num_labels=2, names=(), head="classifier"):
  c = config.base()
  c.model.update(dict(num_layers=1, width=8, num_heads=2, causal=False, vocab_size=264))
  c.model.update(dict(head=head, num_labels=num_labels, label_names=names))
  c.objective.name = "classification" if head == "classifier" else "masked_lm"
  c.data.path, c.init_from = path, source
  return config.resolve(c)


class Source:
  """A source whose folder's name is that of its classes: 'a-b', or '' for none."""

  def recognizes(self, folder):
    return True

  def inspect(self, folder):
    names = tuple(folder.name.split("-")) if folder.name != "none" else ()
    return init_from.Inspected(classifier(num_labels=len(names) or 2, names=names).model, None)


@pytest.fixture
def source(tmp_path, monkeypatch):
  monkeypatch.setattr(init_from, "RunFolderSource", Source)

  def make(*names):
    folder = tmp_path / ("-".join(names) or "none")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    return str(folder)

  return make


@pytest.mark.parametrize(
  "of_source, of_data, settled",
  [
    (None, ("bad", "good"), ("bad", "good")),
    (("good", "bad"), ("bad", "good"), ("good", "bad")),
    (("GOOD", "BAD"), ("bad", "good"), ("GOOD", "BAD")),
    (("x", "y", "z"), ("bad", "good"), ("bad", "good")),  # three outputs: the new head has two
    (("LABEL_0", "LABEL_1"), ("1", "0"), ("0", "1")),
  ],
)
def test_the_names_of_the_weights_come_before_those_of_the_data(
  data, source, tmp_path, of_source, of_data, settled
):
  c = classifier(data(*of_data), source(*of_source) if of_source else "")
  found = label_names.settle(c, tmp_path / "run")
  assert found.c.model.label_names == settled and not found.notes
  assert c.model.label_names == ()


@pytest.mark.parametrize("of_source", [("LABEL_0", "LABEL_1"), ()])
def test_an_assumption_is_told(data, source, tmp_path, of_source):
  c = classifier(data("bad", "good"), source(*of_source))
  found = label_names.settle(c, tmp_path / "run")
  assert found.c.model.label_names == ("bad", "good")
  assert "its outputs are taken to be bad, good, in this order" in found.notes[0]


def test_other_classes_are_refused_with_both_lists(data, source, tmp_path):
  c = classifier(data("bad", "good"), source("no", "yes"))
  with pytest.raises(UserError, match="the classes bad, good, but .* have no, yes") as e:
    label_names.settle(c, tmp_path / "run")
  assert """--config.model.label_names="('bad', 'good')\"""" in str(e.value)
  c = classifier(data("bad", "good"), source("no", "yes"), names=("bad", "good"))
  assert label_names.settle(c, tmp_path / "run").c.model.label_names == ("bad", "good")


def test_the_classes_of_the_weights_keep_their_order(data, source, tmp_path):
  c = classifier(data("bad", "good"), source("good", "bad"), names=("bad", "good"))
  with pytest.raises(UserError, match="number these classes good, bad; leave model.label_names"):
    label_names.settle(c, tmp_path / "run")


def test_a_run_keeps_its_names(data, tmp_path):
  folder, path = tmp_path / "run", data("bad", "good")
  mesh = jax.sharding.Mesh(jax.devices()[:1], "data")

  def enter(c):
    origin = dict.fromkeys(config.flatten(c), "base")
    run_folder.enter(folder, c, origin, mesh, shards.read_manifest(path)["digest"], ByteTokenizer())

  enter(classifier(path))  # as an earlier version made it
  found = label_names.settle(classifier(path), folder)
  assert found.c.model.label_names == ()
  enter(found.c)
  digest = run_folder.read_starts(folder)[0]["data_digest"]
  c = run_folder.read_config(folder)
  assert label_names.of_run(c, digest) == ("bad", "good")
  assert label_names.of_run(c, "another") == ()
  c.data.path = str(tmp_path / "gone")
  assert label_names.of_run(c, digest) == ()


def test_other_heads_and_regressions_have_no_names(data, tmp_path):
  for c in (classifier(data("a", "b"), head="lm"), classifier(data("a", "b"), num_labels=1)):
    assert label_names.settle(c, tmp_path / "run").c is c


@pytest.mark.parametrize(
  "num, names, words",
  [
    (2, ("a", "b", "c"), "model.num_labels=2, but model.label_names has 3 classes"),
    (1, ("a",), "model.num_labels=1, but"),
    (2, ("a", "a"), "must be different names"),
    (2, (1, 2), "must be different names"),
  ],
)
def test_names_that_do_not_fit(num, names, words):
  with pytest.raises(UserError, match=words):
    classifier(num_labels=num, names=names)
