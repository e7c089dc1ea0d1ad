"""The seal of a run folder names each file that is not as the run wrote it."""

import json

import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh
from jaxgpt.run import run_folder
from jaxgpt.run.provenance import seal
from jaxgpt.text.tokenizers.tokenizer import ByteTokenizer

LINES = [{"step": n, "kind": "train", "loss": 1 / n} for n in (1, 2, 3, 4)]


def enter(folder, step=0, **values):
  c = config.base()
  c.update_from_flattened_dict(values)
  c = config.resolve(c, 300)
  origin = dict.fromkeys(config.flatten(c), "base")
  return run_folder.enter(folder, c, origin, mesh.make(c.mesh), "abc", ByteTokenizer(), step)


@pytest.fixture
def run(tmp_path):
  """A run folder after a start, a save at step 4, and four lines of metrics."""
  assert enter(tmp_path / "run") == []
  metrics = "".join(json.dumps(line) + "\n" for line in LINES)
  (tmp_path / "run" / "metrics.jsonl").write_text(metrics)
  (tmp_path / "run" / "generation_config.json").write_text('{"eos_token_id": [1]}')
  where = tmp_path / "run" / "checkpoints" / "4" / "params"
  where.mkdir(parents=True)
  (where / "data").write_bytes(bytes(100))
  run_folder.note_saved(tmp_path / "run", 4)
  return tmp_path / "run"


def damages(run):
  return [(d.file, d.problem, d.vital) for d in seal.check(run)]


def test_a_run_is_as_it_was_written(run):
  assert damages(run) == [] and seal.damaged_checkpoint(run, 4) == []
  assert enter(run, 4) == [] and damages(run) == []


@pytest.mark.parametrize(
  "name", ["config.json", "tokenizer/tokenizer.json", "generation_config.json", "starts.jsonl"]
)
@pytest.mark.parametrize("how", ["edit", "delete"])
def test_a_changed_file_is_named(run, name, how):
  path = run / name
  if name.startswith("tokenizer"):
    path = next(p for p in (run / "tokenizer").iterdir())
    name = f"tokenizer/{path.name}"
  if how == "edit":
    path.write_text(path.read_text().replace("1", "2", 1).replace("b", "B", 1))
  else:
    path.unlink()
  ((found, _, vital),) = damages(run)
  assert found == name and vital == (name != "generation_config.json")
  if vital:
    if name != "config.json":
      with pytest.raises(UserError, match=name):
        enter(run, 4)
    return
  (line,) = enter(run, 4)
  assert name in line
  assert run_folder.read_starts(run)[-1]["damaged"] == [line]
  assert enter(run, 4) == []  # it was accepted and recorded


def test_a_changed_config_is_not_used(run):
  text = (run / "config.json").read_text()
  (run / "config.json").write_text(text.replace('"lr": 0.001', '"lr": 0.002'))
  with pytest.raises(UserError, match="config.json is not as the run wrote it; restore"):
    run_folder.read_config(run)
  (run / "files.json").unlink()  # the way out, if the change is the user's
  assert run_folder.read_config(run).optim.lr == 0.002


def test_a_damaged_seal_is_said_and_renewed(run):
  text = (run / "files.json").read_text()
  (run / "files.json").write_text(text.replace("a", "b", 1))
  ((name, _, vital),) = damages(run)
  assert name == "files.json" and not vital
  assert "files.json is damaged" in enter(run, 4)[0]
  assert damages(run) == []
  (run / "files.json").unlink()
  assert "files.json is missing" in enter(run, 4)[0] and damages(run) == []


def test_lines_of_starts_keep_their_order(run):
  enter(run, 4)
  first, second = (run / "starts.jsonl").read_text().splitlines()
  (run / "starts.jsonl").write_text(f"{second}\n{first}\n")
  assert damages(run) == [("starts.jsonl", "was changed in line 1", True)]
  (run / "starts.jsonl").write_text(f"{first}\n")
  assert damages(run) == [("starts.jsonl", "has 1 lines of 2", True)]


@pytest.mark.parametrize(
  "edit, problem",
  [
    (lambda text: text.replace("0.5", "0.4"), "was edited"),
    (lambda text: text[:50], "has 50 bytes"),
    (lambda text: "", "has 0 bytes"),
  ],
)
def test_changed_metrics_are_said(run, edit, problem):
  path = run / "metrics.jsonl"
  path.write_text(edit(path.read_text()))
  ((name, found, vital),) = damages(run)
  assert name == "metrics.jsonl" and problem in found and not vital
  assert "metrics.jsonl" in enter(run, 4)[0]


def test_metrics_after_the_checkpoint_are_repeated(run):
  with (run / "metrics.jsonl").open("a") as f:
    f.write('{"step": 5, "kind": "train", "loss": 0.1}\n{"step": 6, "ki')
  assert damages(run) == []
  assert enter(run, 2) == []  # goes on from step 2
  kept = "".join(json.dumps(line) + "\n" for line in LINES[:2])
  (run / "metrics.jsonl").write_text(kept)  # as the metric writer does
  assert damages(run) == []


def test_files_of_a_checkpoint(run):
  where = run / "checkpoints" / "4" / "params"
  (where / "more").write_text("x")
  assert seal.damaged_checkpoint(run, 4) == ["params/more was not written by the run"]
  (where / "data").write_bytes(bytes(99))
  assert "params/data has 99 bytes instead of 100" in seal.damaged_checkpoint(run, 4)
  (where / "data").write_bytes(bytes(99) + b"1")
  assert "params/data was changed" in seal.damaged_checkpoint(run, 4)
  (where / "data").unlink()
  assert "params/data is missing" in seal.damaged_checkpoint(run, 4)


def test_a_folder_of_an_earlier_version_is_sealed_as_it_is(run):
  lines = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
  old = "".join(json.dumps({k: v for k, v in r.items() if k != "digest"}) + "\n" for r in lines)
  (run / "starts.jsonl").write_text(old)
  (run / "files.json").unlink()
  assert damages(run) == [] and enter(run, 4) == [] and damages(run) == []
  text = (run / "starts.jsonl").read_text()
  assert text.startswith(old)
  (run / "starts.jsonl").write_text(text.replace('"step": 4', '"step": 8'))
  assert damages(run) == [("starts.jsonl", "was changed in line 2", True)]


def test_a_file_is_replaced_with_its_seal(run):
  text = (run / "config.json").read_text().replace('"lr": 0.001', '"lr": 0.002')
  seal.replace(run, "config.json", text)
  assert damages(run) == [] and run_folder.read_config(run).optim.lr == 0.002


def test_a_start_that_was_killed_before_the_config_is_begun_anew(run):
  for name in ("config.json", "starts.jsonl", "metrics.jsonl", "generation_config.json"):
    (run / name).unlink()
  (run / "checkpoints").rename(run.parent / "gone")
  assert enter(run, **{"optim.lr": 0.5}) == [] and damages(run) == []
