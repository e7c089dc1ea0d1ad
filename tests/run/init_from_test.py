"""Initial weights from run folders and from sources that the caller passes."""

import json

import jax.numpy as jnp
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.run import init_from


class Numbers:
  """A source whose folders have a config.json with 'numbers'."""

  def recognizes(self, folder):
    return "numbers" in json.loads((folder / "config.json").read_text())

  def check(self, folder):
    if not json.loads((folder / "config.json").read_text())["numbers"]:
      raise UserError("no numbers")

  def load(self, folder, c_model, abstract):
    c = config.base()
    c.model.update_from_flattened_dict({"num_layers": 7, "vocab_size": 8})
    params = {"a": jnp.ones(2), "b/c": jnp.ones(3)}
    return init_from.Weights(params, ["d"], config.resolve(c).model, None)


def folder_with(tmp_path, value):
  (tmp_path / "config.json").write_text(value)
  return tmp_path


def test_a_source_is_chosen_by_the_folder_and_reported(tmp_path):
  folder = folder_with(tmp_path, '{"numbers": true}')
  init_from.check_source(folder, (Numbers(),))
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
    init_from.check_source(folder_with(tmp_path, '{"numbers": false}'), (Numbers(),))


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
    init_from.check_source(folder_with(tmp_path, text))


def test_a_folder_without_a_config_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds no config.json: name a run folder"):
    init_from.check_source(tmp_path)
