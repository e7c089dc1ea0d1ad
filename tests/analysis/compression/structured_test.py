"""Removal of layers, heads and columns: the smaller model is the larger one without them."""

import jax
import numpy as np
import pytest

from jaxgpt.analysis.compression import calibration, compressed_run, structured
from jaxgpt.commands.models import prune as command
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.run import run_folder

TEXT = compressed_run.Calibration(rows=8)


def logits(run, batch):
  with jax.set_mesh(run.mesh):
    names = ("tokens", "positions", "segment_ids")
    return run.parts.model.apply({"params": run.params}, *(batch[k] for k in names)).logits


def zeroed(run, found, method):
  """The larger model with the removed parts set to zero, by hand."""
  named = calibration.flat(run.params)
  for name in found.removed:
    layer, unit = map(int, name.split("."))
    if method == "columns":
      w = named["layers/mlp/down"] = named["layers/mlp/down"].copy()
      w[layer, unit] = 0
    else:  # two query heads for each key/value head
      w = named["layers/attn/o"] = named["layers/attn/o"].copy()
      w[layer, 2 * unit : 2 * unit + 2] = 0
  return run._replace(params=structured.tree.unflatten(named))


@pytest.mark.parametrize(("method", "count"), [("heads", 1), ("columns", 24)])
def test_the_smaller_model_is_the_larger_one_without_the_parts(
  trained, opened, text, method, count, tmp_path
):
  found = compressed_run.smaller(trained, tmp_path / "run", method, count, TEXT)
  run = load.load(tmp_path / "run")
  m = run.c.model
  sizes = {"heads": (m.num_heads, m.num_kv_heads, m.head_dim), "columns": (m.mlp_width,)}
  assert sizes[method] == {"heads": (2, 1, 8), "columns": (40,)}[method]
  expected = logits(zeroed(opened, found, method), text[0])
  np.testing.assert_allclose(logits(run, text[0]), expected, atol=2e-4)
  # Each layer loses the parts of the lowest scores.
  for layer in range(2):
    own = {k: v for k, v in found.scores.items() if k.startswith(f"{layer}.")}
    assert set(sorted(own, key=own.get)[:count]) == {k for k in found.removed if k in own}


def test_the_layer_of_least_influence_is_removed(trained, opened, text, tmp_path):
  found = compressed_run.smaller(trained, tmp_path / "run", "layers", 1, TEXT)
  c = run_folder.read_config(tmp_path / "run")
  kept = 1 - int(found.removed[0])
  assert c.model.num_layers == 1 and min(found.scores, key=found.scores.get) == found.removed[0]
  before = calibration.flat(opened.params)
  for path, x in calibration.flat(load.load(tmp_path / "run").params).items():
    old = before[path][kept : kept + 1] if path.startswith("layers/") else before[path]
    np.testing.assert_array_equal(x, old)


def test_what_cannot_be_removed_is_refused(opened, text, tiny):
  with pytest.raises(UserError, match="--method=layers --remove=2: the model has 2 layers"):
    structured.remove(opened, "layers", 2, text)
  c = opened.c.copy_and_resolve_references()
  c.model.attention_pattern = ("local", "global")
  with pytest.raises(UserError, match="layers of this model are of several kinds"):
    structured.remove(opened._replace(c=c), "layers", 1, text)
  c = opened.c.copy_and_resolve_references()
  c.model.qk_norm = "all"
  with pytest.raises(UserError, match="one norm over all heads can't lose heads"):
    structured.remove(opened._replace(c=c), "heads", 1, text)
  c = opened.c.copy_and_resolve_references()
  c.model.mlp_pattern = ("none",)
  with pytest.raises(UserError, match="the layers have no MLPs"):
    structured.remove(opened._replace(c=c), "columns", 1, text)
  with pytest.raises(UserError, match="--method=layers needs --remove"):
    command.PruneOptions(workdir="a", to="b", method="layers")
  with pytest.raises(UserError, match="--sparsity has no effect with --method=layers"):
    command.PruneOptions(workdir="a", to="b", method="layers", remove=1, sparsity="0.5")
