"""Checkpoints are listed, described, verified and compared as they are on disk."""

import shutil

import numpy as np
import pytest

from jaxgpt.analysis import checkpoint_files, restore_to, verify_run
from jaxgpt.errors import UserError
from jaxgpt.run import run_folder
from tests import trained as trained_lib


@pytest.fixture
def copy(trained, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  return tmp_path / "run"


def largest(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, at=None):
  data = bytearray(path.read_bytes())
  data[len(data) // 2 if at is None else at] ^= 4
  path.write_bytes(data)


def test_the_list_has_what_is_known_without_reading(trained, copy):
  entries = checkpoint_files.listed(trained)
  assert [(e.folder, e.step, e.items, e.note) for e in entries] == [
    ("checkpoints", 4, "params opt", ""),
    ("checkpoints", 8, "params opt", ""),
  ]
  assert all(e.bytes > 10_000 and e.date.startswith("20") for e in entries)
  flip(largest(copy / "checkpoints" / "8" / "opt"))
  name = largest(copy / "checkpoints" / "8" / "opt").relative_to(copy / "checkpoints" / "8")
  note = checkpoint_files.listed(copy)[1].note
  assert note == f"damaged: {name} was changed"


def test_verify_names_the_file_and_the_array(trained, copy):
  assert not any(report.problems for report in verify_run.verify(trained))
  for path in (copy / "checkpoints" / "8" / "params").glob("**/d/*"):
    flip(path)  # all of them: one file may hold values that a later one replaced
  reports = {report.part: report.problems for report in verify_run.verify(copy)}
  assert not reports["files"] and not reports["checkpoints/4"]
  lines = reports["checkpoints/8"]
  assert lines[0].startswith("params/") and lines[0].endswith("was changed")
  assert any("params" in line and ("differs" in line or "can't" in line) for line in lines[1:])
  with pytest.raises(UserError, match="there are: 4, 8"):
    list(verify_run.verify(copy, 5))


def test_verify_finds_what_only_the_arrays_tell(copy):
  """As in a folder that was damaged before its files were sealed."""
  (copy / "files.json").unlink()
  shutil.rmtree(copy / "checkpoints" / "8" / "params")
  source = copy / "checkpoints" / "4" / "params"
  shutil.copytree(source, copy / "checkpoints" / "8" / "params")
  reports = {report.part: report.problems for report in verify_run.verify(copy, 8)}
  assert "params/embed differs from what was saved" in reports["checkpoints/8"]


@pytest.mark.parametrize(
  "old, new, problem",
  [
    ('"step": 8', '"step": 7', "does not match its digest"),
    ('"digest"', '"digesu"', "unknown entry 'digesu'"),
    ("{", "[", "can't be read"),
  ],
)
def test_meta_is_verified(copy, old, new, problem):
  path = copy / "checkpoints" / "8" / "meta" / "metadata"
  path.write_text(path.read_text().replace(old, new, 1))
  reports = {report.part: report.problems for report in verify_run.verify(copy, 8)}
  assert any(problem in line for line in reports["checkpoints/8"])


def test_a_checkpoint_under_another_step_is_named_and_not_used(copy, trained_config):
  shutil.rmtree(copy / "checkpoints" / "8")
  shutil.copytree(copy / "checkpoints" / "4", copy / "checkpoints" / "8")
  reports = {report.part: report.problems for report in verify_run.verify(copy, 8)}
  assert "meta/metadata is that of step 4" in reports["checkpoints/8"]
  out = trained_lib.train(trained_config, copy)
  assert "is that of step 4" in out and "goes on from step 4" in out
  assert "is that of step 4" in checkpoint_files.listed(copy)[-1].note


def test_show(trained):
  saved, arrays = checkpoint_files.shown(trained)
  found = {a.name: a for a in arrays}
  assert saved.step == 8 and found["params/embed"].shape[1] == 32
  x = checkpoint_files.read(saved)["params/embed"].astype(np.float64)
  assert found["params/embed"].norm == pytest.approx(np.linalg.norm(x))
  assert found["params/embed"].greatest == x.max() and not found["params/embed"].not_finite


def test_diff_of_steps_and_runs(trained, other_trained):
  a, b, changes = checkpoint_files.compare_steps([trained])
  assert (a.step, b.step) == (4, 8)
  assert {c.name for c in changes} >= {"params/embed", "params/final_norm/scale"}
  assert [c.relative for c in changes] == sorted((c.relative for c in changes), reverse=True)
  a, b, changes = checkpoint_files.compare_steps([trained, other_trained])
  assert (a.step, b.step) == (4, 4) and changes
  assert checkpoint_files.compare_steps([trained], [8, 8])[2] == []
  for runs, steps, text in (
    ([other_trained], [], "has 1 checkpoint"),
    ([trained], [4], "name two steps"),
    ([trained, other_trained], [8, 8], "there are: 4"),
  ):
    with pytest.raises(UserError, match=text):
      checkpoint_files.compare_steps(runs, steps)


def test_arrays_are_compared_by_their_bits():
  one = {"a": np.float32([1, 2]), "b": np.float32([0.0]), "c": np.zeros(2), "d": np.zeros(2)}
  other = {"a": np.float32([1, 2.5]), "b": np.float32([-0.0]), "c": np.zeros(3)}
  other["e"] = np.float32([np.nan])
  found = {c.name: c for c in checkpoint_files.compare(one, other)}
  assert found["a"].largest == 0.5 and found["a"].changed == 0.5
  assert found["b"].largest == 0 and found["b"].changed == 1
  assert "float64 [2]" in found["c"].note and found["d"].note == "only in the first"
  assert found["e"].note == "only in the second"
  nan = checkpoint_files.compare({"x": np.float32([1])}, {"x": np.float32([np.nan])})
  assert nan[0].largest == np.inf
  assert len(checkpoint_files.change_lines(list(found.values()), 2)) == 4


def test_restore_to_sets_later_steps_aside_and_the_run_repeats_them(trained, copy, trained_config):
  lines = restore_to.restore_to(copy, 4)
  assert "the run is at step 4" in lines[-1]
  (aside,) = (copy / "set_aside").iterdir()
  assert (aside / "checkpoints" / "8" / "params").is_dir()
  whole = (trained / "metrics.jsonl").read_text()
  assert (aside / "metrics.jsonl").read_text() == whole
  assert whole.startswith((copy / "metrics.jsonl").read_text())
  assert not any(report.problems for report in verify_run.verify(copy))
  assert restore_to.restore_to(copy, 4) == [f"{copy} is at step 4 already: nothing is later"]
  out = trained_lib.train(trained_config, copy)
  assert "resumes at step 4 of 8" in out
  again = checkpoint_files.compare_steps([trained, copy])
  assert again[1].step == 8 and again[2] == []


def test_restore_to_refuses(copy):
  flip(largest(copy / "checkpoints" / "4" / "params"))
  with pytest.raises(UserError, match="the checkpoint is damaged"):
    restore_to.restore_to(copy, 4)
  with pytest.raises(UserError, match="there are: 4, 8"):
    restore_to.restore_to(copy, 6)
  assert run_folder.is_run(copy) and not (copy / "set_aside").exists()
