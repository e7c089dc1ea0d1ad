"""Where recipes start: from scratch, or with the model of a run."""

import json
import pathlib

import pytest

from jaxgpt import config
from jaxgpt.errors import UserError

RECIPES = pathlib.Path(__file__).parents[2] / "configs" / "tasks"


@pytest.fixture(params=[True, False], ids=["decoder", "encoder"])
def run(request, tmp_path):
  """A run folder with a config and no weights."""
  c = config.base()
  c.model.update(dict(causal=request.param, num_layers=5, width=96, num_heads=6, max_len=300))
  c = config.resolve(c, 264)
  (tmp_path / "config.json").write_text(json.dumps({"config": c.to_dict()}))
  return tmp_path, c


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.py")))
def test_a_recipe_starts_from_a_run(recipe, run):
  folder, of_run = run
  c, origin = config.load(f"{RECIPES / recipe}.py:{folder}")
  assert c.init_from == str(folder) and origin["init_from"] == "file"
  for key in ("causal", "num_layers", "width", "num_heads", "max_len", "position", "norm"):
    assert c.model[key] == of_run.model[key]
  assert c.data.seq_len <= 384
  assert c.optim.lr < 1e-4 and c.train.steps == 1000
  # An encoder reads a text from its pooled tokens, a decoder from its last one.
  if c.model.head == "classifier":
    assert c.model.pooling == ("last" if of_run.model.causal else "mean")


@pytest.mark.parametrize("recipe", ["sentiment", "chat"])
def test_a_recipe_starts_from_scratch(recipe):
  c, _ = config.load(RECIPES / f"{recipe}.py")
  assert not c.init_from and c.model.position == "rotary"
  assert c.model.causal == (recipe == "chat") and c.optim.lr > 1e-3


def test_a_folder_without_a_run_is_an_error(tmp_path):
  with pytest.raises(UserError, match="holds no run"):
    config.load(f"{RECIPES / 'chat.py'}:{tmp_path}")
