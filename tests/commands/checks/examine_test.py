"""The doctor's findings on sound and on broken configs, data and run folders."""

import json
import shutil
import threading

import pytest

from jaxgpt import config
from jaxgpt.commands import main
from jaxgpt.commands.checks import examine, training, workdir
from jaxgpt.commands.checks.finding import OK, PROBLEM, WARNING, Known
from jaxgpt.training import loop


def said(findings, status, topic):
  return " | ".join(f.text for f in findings if (f.status, f.topic) == (status, topic))


def test_a_sound_run_has_no_problem(tiny, tmp_path):
  c = tiny()
  findings = list(examine.examine(lambda: c, tmp_path / "run"))
  assert {f.status for f in findings} == {OK}, findings
  assert [f.topic for f in findings] == [
    "versions",
    "processes",
    "devices",
    "config",
    "data",
    "data",
    "data",
    "mesh",
    "step",
    "workdir",
    "room",
  ]
  assert "8 x cpu" in said(findings, OK, "devices") and "data=8" in said(findings, OK, "mesh")
  assert "ms" in said(findings, OK, "step") and "an epoch has" in said(findings, OK, "data")
  assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


@pytest.mark.parametrize(
  "change, topic, words",
  [
    ({"data__path": ""}, "data", "data.path"),
    ({"data__path": "nowhere"}, "data", "nowhere"),
    ({"data__batch_size": 12}, "mesh", "data.batch_size=12 is not a multiple of"),
    ({"mesh__data": 3}, "mesh", "multiply to 3, but there are 8 devices"),
    (
      {"mesh__data": 1, "mesh__fsdp": 8, "model__width": 36, "model__num_heads": 2},
      "mesh",
      "does not divide dimension 'embed' = 36",
    ),
    ({"init_from": "nowhere"}, "init_from", "init_from='nowhere' holds no config.json"),
    ({"model__attention": "splash"}, "mesh", "a kernel for TPUs"),
  ],
)
def test_a_config_that_does_not_fit_is_a_problem(tiny, change, topic, words):
  c = tiny(**change)
  findings = list(examine.examine(lambda: c, step=False))
  assert words in said(findings, PROBLEM, topic), findings


def test_a_stream_is_read_up_to_its_first_batch(tiny, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n{broken\n')
  c = tiny(data__stream=str(tmp_path))
  findings = list(examine.examine(lambda: c, step=False))
  assert {f.status for f in findings} == {OK}, findings
  assert "data.stream has 1 files; " in said(findings, OK, "data")
  (tmp_path / "a.jsonl").write_text("{}")
  assert "no document with text" in said(examine.examine(lambda: c, step=False), PROBLEM, "data")


def test_damaged_data_is_a_problem(tiny, corpus, tmp_path):
  folder = shutil.copytree(corpus, tmp_path / "data")
  (shard,) = folder.glob("train-*.arrayrecord")
  good = shard.read_bytes()
  c = tiny(data__path=str(folder))
  shard.write_bytes(good[:-10])
  assert f"{len(good) - 10} bytes instead of" in said(
    examine.examine(lambda: c, step=False), PROBLEM, "data"
  )
  shard.write_bytes(bytes(len(good)))
  assert f"{shard} is not what `jaxgpt data` wrote" in said(
    examine.examine(lambda: c, step=False), PROBLEM, "data"
  )
  (folder / "manifest.json").write_text("{}")
  assert "manifest.json is damaged" in said(examine.examine(lambda: c, step=False), PROBLEM, "data")


def test_a_step_that_does_not_fit_into_memory_is_a_problem(tiny, monkeypatch):
  def full(*_):
    raise training.jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
    )

  monkeypatch.setattr(training.train_step, "first_state", full)
  c = tiny()
  text = said(examine.examine(lambda: c), PROBLEM, "step")
  assert "RESOURCE_EXHAUSTED" in text and "a smaller data.batch_size" in text


def test_a_step_that_cannot_be_made_is_a_problem(tiny, monkeypatch):
  def broken(*_):
    raise NotImplementedError("no rule for this")

  monkeypatch.setattr(training.train_step, "make", broken)
  c = tiny()
  findings = list(examine.examine(lambda: c))
  assert "NotImplementedError: no rule for this" in said(findings, PROBLEM, "step")


def test_a_compiled_step_that_is_not_there_is_a_problem(tiny, tmp_path):
  c = tiny(mesh__compiled_step=str(tmp_path / "none"))
  assert "cannot be read" in said(examine.examine(lambda: c), PROBLEM, "step")


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in (tmp_path / "file", tmp_path / "file" / "run"):
    assert "cannot be written" in said(workdir.run_folder(folder, Known()), PROBLEM, "workdir")


def test_a_bucket_that_does_not_answer_is_a_problem(monkeypatch):
  monkeypatch.setattr(workdir, "probe", lambda folder: threading.Event().wait())
  monkeypatch.setattr(workdir, "_PROBE_SECONDS", 0.1)
  assert "no answer within 0.1 s" in said(
    workdir.run_folder("gs://bucket/run", Known()), PROBLEM, "workdir"
  )


def test_a_folder_that_holds_something_else_is_a_problem(tmp_path):
  (tmp_path / "photo.jpg").write_text("")
  assert "holds no run" in said(workdir.run_folder(tmp_path, Known()), PROBLEM, "workdir")


def test_a_folder_of_another_run_is_a_problem(tiny, tmp_path):
  c = tiny(train__steps=2)
  loop.train(c, tmp_path / "run", config.flatten(c))
  assert "holds this run" in said(
    examine.examine(lambda: c, tmp_path / "run", step=False), OK, "workdir"
  )
  other = tiny(train__steps=2, optim__lr=0.5)
  assert "optim.lr was 0.01, is 0.5" in said(
    examine.examine(lambda: other, tmp_path / "run", step=False), PROBLEM, "workdir"
  )


@pytest.mark.parametrize("share, status", [(1.9, PROBLEM), (2.5, WARNING), (3.1, OK)])
def test_room_for_checkpoints(tiny, share, status):
  """Two are kept, and a third is whole before the first goes."""
  _, c = training.batches_lib.load_tokenizer_and_config(tiny())
  known = Known(c=c, parts=training.build_lib.build(c, training.mesh_lib.make(c.mesh)))
  one = training.state_bytes(known.parts.state)
  finding = workdir.room(share * one, known)
  assert finding.status == status and "checkpoint.keep=2" in finding.text


def test_the_command_prints_lines_or_json_and_its_code_says_whether_there_is_a_problem(
  corpus, tmp_path, capsys
):
  (tmp_path / "c.py").write_text("from jaxgpt import config\nget_config = config.base\n")
  args = ["doctor", f"--config={tmp_path}/c.py", f"--config.data.path={corpus}", "--no-step"]
  assert main.main([*args, f"--workdir={tmp_path}/run"]) == 0
  out = capsys.readouterr().out
  assert "ok       mesh" in out and out.endswith("no problem found\n")
  assert main.main([*args, "--config.data.batch_size=3", "--json"]) == 2
  result = json.loads(capsys.readouterr().out)
  assert not result["ok"] and result["findings"][-1]["status"] == PROBLEM
  assert main.main(["doctor", "--config=nowhere.py"]) == 2
  assert "problem  config    --config=nowhere.py: no such file" in capsys.readouterr().out
