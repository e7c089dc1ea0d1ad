"""Going on with another config: each key is classified, and a change is recorded."""

import json
import pathlib
import shutil

import pytest
from etils import epath

from jaxgpt import config
from jaxgpt.analysis import curves, restore_to, verify_run
from jaxgpt.config.keys import KEYS, SECTIONS
from jaxgpt.config.resolution import is_free_on_resume
from jaxgpt.errors import UserError
from jaxgpt.run import run_folder
from jaxgpt.training import loop


@pytest.mark.parametrize("node", [*KEYS.values(), *SECTIONS.values()])
def test_a_declaration_has_one_class(node):
  assert sum(map(bool, (node.free_on_resume, node.if_changed, node.fixed))) <= 1


def test_every_key_says_what_a_change_means():
  for key in KEYS:
    classes = is_free_on_resume(key), config.effect_of_change(key), config.why_fixed(key)
    assert sum(map(bool, classes)) == 1, (key, classes)


def changed(c, **changes):
  c = config.from_dict(c.to_dict())
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  return c


def train(c, folder, accept=True):
  return loop.train(c, folder, config.flatten(c), accept_changes=accept)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
  """(config, folder) of a run of 4 steps."""
  c = tiny(train__steps=4, schedule__name="constant", checkpoint__keep=10)
  folder = epath.Path(tmp_path_factory.mktemp("finished") / "run")
  train(c, folder)
  return c, folder


def meta(folder, step):
  path = folder / "checkpoints" / str(step) / "meta" / "metadata"
  return json.loads(path.read_text())["extra"]["config"]


def test_a_finished_run_goes_on_with_more_steps_and_a_lower_rate(finished, tmp_path, capsys):
  c, done = finished
  folder = epath.Path(shutil.copytree(done, tmp_path / "run"))
  longer = changed(c, train__steps=6, optim__lr=1e-3)
  with pytest.raises(UserError, match=r"optim.lr was 0.01, is 0.001.*add --accept-changes to go"):
    train(longer, folder, accept=False)
  capsys.readouterr()
  assert train(longer, folder).step == 6
  out = capsys.readouterr().out
  assert "from step 4 on: optim.lr=0.001 instead of 0.01 (the learning rate)" in out
  assert "from step 4 on: train.steps=6 instead of 4" in out
  rates = [json.loads(line).get("lr") for line in (folder / "metrics.jsonl").open()]
  assert [rate for rate in rates if rate][-3:] == pytest.approx([1e-2, 1e-3, 1e-3])
  first, second = run_folder.read_starts(folder)
  assert second["changes"] == {
    "optim.adam_lr": [0.01, 0.001],
    "optim.lr": [0.01, 0.001],
    "train.steps": [4, 6],
  }
  assert second["step"] == 4
  assert (meta(folder, 4), meta(folder, 6)) == (first["config_digest"], second["config_digest"])
  before = json.loads((folder / "config_before_4.json").read_text())["config"]
  assert before["optim"]["lr"] == 0.01 and run_folder.read_config(folder).optim.lr == 0.001
  assert train(longer, folder).step == 6, "the same command again, as a launcher gives it"
  assert "changes" not in run_folder.read_starts(folder)[-1]


def test_a_run_goes_back_across_a_change_with_the_config_of_then(tiny, tmp_path):
  first = tiny(train__steps=4, schedule__name="constant", checkpoint__keep=10, checkpoint__every=2)
  second = changed(first, train__steps=6, optim__lr=1e-3)
  done = tmp_path / "done"
  train(first, done)
  train(second, done)
  damaged = epath.Path(shutil.copytree(done, tmp_path / "damaged"))
  for step in (4, 6):
    for path in pathlib.Path(damaged, "checkpoints", str(step), "params").rglob("*"):
      if path.is_file():
        path.write_bytes(b"")
  with pytest.raises(UserError, match=r"changed at step 4, but .* is of step 2; .*restore-to"):
    train(second, damaged, accept=False)
  for folder in (damaged, epath.Path(shutil.copytree(done, tmp_path / "run"))):
    lines = restore_to.restore_to(folder, 2)
    assert any("config from before the change at step 4" in line for line in lines)
    assert run_folder.changed_at(folder) == [] and not any(
      report.problems for report in verify_run.verify(folder)
    )
    assert run_folder.read_config(folder).optim.lr == 0.01
    starts = [(s["step"], "changes" in s) for s in run_folder.read_starts(folder)]
    assert starts[-1] == (2, False)
    with pytest.raises(UserError, match=r"optim.lr was 0.01, is 0.001.*add --accept-changes"):
      train(second, folder, accept=False)
  train(second, damaged)
  assert [run_folder.read_config(damaged, step).optim.lr for step in (1, 3)] == [0.01, 1e-3]
  rates = {step: r["lr"] for (kind, step), r in curves.read(damaged).items() if kind == "train"}
  assert rates[2] == pytest.approx(1e-2) and rates[3] == pytest.approx(1e-3)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"seed": 1}, "seed was 0, is 1, but it can't change: the batch at step N is computed"),
    ({"model__norm_eps": 0.1}, "model.norm_eps was .*, is 0.1, but it can't change: the weights"),
    ({"optim__ema": 0.9}, "optim.ema=0.9: with that the optimizer keeps other arrays"),
    ({"train__steps": 2}, "train.steps=2: the run has done 4 steps"),
  ],
)
def test_what_cannot_change_is_refused_with_the_reason(finished, change, words):
  c, folder = finished
  before = (folder / "config.json").read_text()
  with pytest.raises(UserError, match=words):
    train(changed(c, **change), folder)
  assert (folder / "config.json").read_text() == before
  assert len(run_folder.read_starts(folder)) == 1


def test_the_config_of_a_run_is_a_config_file(finished, tmp_path):
  """Values that the user did not set are derived again, from what an override changes."""
  c, folder = finished
  saved = json.loads((folder / "config.json").read_text())
  saved["origin"] = dict.fromkeys(saved["origin"], "base")
  (tmp_path / "config.json").write_text(json.dumps(saved))
  again, origin = config.load(tmp_path / "config.json", ["--config.model.width=64"])
  assert again.model.width == 64 and again.model.head_dim is None
  assert origin["model.width"] == "command line" and again.optim.lr == c.optim.lr
  assert config.resolve(again, vocab_size=264).model.head_dim == 16
  (tmp_path / "other.json").write_text("[]")
  with pytest.raises(UserError, match="not the config.json of a run folder"):
    config.load(tmp_path / "other.json")
