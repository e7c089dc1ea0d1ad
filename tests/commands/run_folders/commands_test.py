"""The commands on run folders, as a user types them."""

import json
import shutil

import pytest

from jaxgpt.commands import main
from jaxgpt.data import verify


def run(capsys, *args):
  code = main.main([str(arg) for arg in args])
  return code, *capsys.readouterr()


def found(capsys, *args):
  code, out, err = run(capsys, *args, "--json")
  assert not err
  return code, json.loads(out)


def test_checkpoints(trained, tmp_path, capsys, monkeypatch):
  code, out, _ = run(capsys, "checkpoint", "list", trained)
  assert code == 0 and out.splitlines()[0].split()[:3] == ["step", "folder", "size"]
  assert [c["step"] for c in found(capsys, "checkpoint", "list", trained)[1]["checkpoints"]] == [
    4,
    8,
  ]
  monkeypatch.chdir(trained.parent)
  code, out, _ = run(capsys, "checkpoint", "verify", trained.name)
  assert code == 0 and out.splitlines()[-1] == "all as the run wrote it"
  code, out, _ = run(capsys, "checkpoint", "show", trained, "--step=4")
  assert code == 0 and "params/embed" in out and "float32" in out
  code, out, _ = run(capsys, "checkpoint", "diff", trained, "--steps=4,8", "--most=1")
  assert code == 0 and "more arrays" in out.splitlines()[-1]
  assert found(capsys, "checkpoint", "diff", trained, trained)[1]["arrays"] == []
  code, _, err = run(capsys, "checkpoint", "verify", trained, "--step=5")
  assert code == 2 and "there are: 4, 8" in err
  shutil.copytree(trained, tmp_path / "run")
  (tmp_path / "run" / "metrics.jsonl").write_text("")
  code, out, _ = run(capsys, "checkpoint", "verify", tmp_path / "run")
  assert code == 2 and "metrics.jsonl has 0 bytes" in out
  code, parts = found(capsys, "checkpoint", "verify", tmp_path / "run")
  assert code == 2 and not parts["ok"]
  code, out, _ = run(capsys, "checkpoint", "restore-to", tmp_path / "run", "--step=4")
  assert code == 0 and "goes on from there" in out
  with pytest.raises(SystemExit):
    run(capsys, "checkpoint", "diff", trained, "--steps=4;8")


def test_doctor_names_what_is_wrong(trained, tmp_path, capsys):
  args = ("doctor", "--no-step")
  code, out, _ = run(capsys, *args, f"--workdir={trained}")
  assert "all files are as the run wrote them, 2 checkpoints among them" in out
  shutil.copytree(trained, tmp_path / "run")
  text = (tmp_path / "run" / "metrics.jsonl").read_text()
  (tmp_path / "run" / "metrics.jsonl").write_text(text.replace("1", "2", 1))
  for path in (tmp_path / "run" / "checkpoints" / "8" / "params").rglob("*"):
    if path.is_file() and path.stat().st_size > 10_000:
      path.write_bytes(path.read_bytes()[:-9] + bytes(9))
  code, out, _ = run(capsys, *args, f"--workdir={tmp_path}/run")
  assert "metrics.jsonl was edited since the run wrote it" in out
  assert "checkpoints/8 is damaged (params/" in out and "train goes on from another one" in out
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  (tmp_path / "run" / "starts.jsonl").unlink()
  code, out, _ = run(capsys, *args, f"--workdir={tmp_path}/run")
  assert code == 2 and "no other one is whole" in out and "starts.jsonl has 0 lines of 1" in out


def test_runs(trained, other_trained, tmp_path, capsys):
  shutil.copytree(trained, tmp_path / "one")
  shutil.copytree(other_trained, tmp_path / "two")
  code, out, _ = run(capsys, "runs", tmp_path, "--sort=loss", "--descending")
  lines = out.splitlines()
  assert code == 0 and [line.split()[0] for line in lines] == ["run", "two", "one"]
  assert lines[2].endswith("optim.lr=0.01 train.steps=8")
  assert len(found(capsys, "runs", tmp_path)[1]["runs"]) == 2
  code, out, _ = run(capsys, "diff", tmp_path / "one", tmp_path / "two")
  assert code == 0 and "optim.lr: 0.01 and 0.02" in out
  assert found(capsys, "diff", tmp_path / "one", tmp_path / "two")[1]["config"]
  code, _, err = run(capsys, "diff", tmp_path / "one")
  assert code == 2 and "takes two run folders" in err


def test_replay_and_reproduce(trained, tmp_path, capsys):
  code, out, _ = run(capsys, "replay", trained, "--step=4", "--most=2")
  assert code == 0 and "identical to the bit to the record of step 4" in out
  assert "documents in the batch" in out and "layer 1" in out
  shutil.copytree(trained, tmp_path / "run")
  path = tmp_path / "run" / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  record = json.loads(lines[0])
  lines[0] = json.dumps(record | {"loss": record["loss"] + 1e-6}) + "\n"
  path.write_text("".join(lines))
  args = ("reproduce", tmp_path / "run", f"--out={tmp_path}/again", "--steps=1")
  code, out, _ = run(capsys, *args)
  assert code == 1 and "first difference: train loss at step 1" in out
  code, parts = run(capsys, *args, "--json")[:2]
  parts = json.loads(parts[parts.index("{") :])
  assert code == 1 and not parts["identical"] and not parts["environment"]


def test_data_verify(corpus, tmp_path, capsys):
  code, out, _ = run(capsys, "data", "verify", corpus)
  assert code == 0 and out.endswith("0 damaged\n") and "no digest" not in out
  shutil.copytree(corpus, tmp_path / "data")
  for name in ("card.md", "tokenizer/jaxgpt_tokenizer.json", "train.sources.txt"):
    path = tmp_path / "data" / name
    path.write_bytes(path.read_bytes()[:-1] + b"#")
  code, out, _ = run(capsys, "data", "verify", tmp_path / "data")
  assert code == 2 and out.count("its sha256 differs") == 3
  code, parts = found(capsys, "data", "verify", f"{corpus},{tmp_path}/data")
  assert code == 2 and [bool(f["problems"]) for f in parts["folders"].values()] == [False, True]
  assert verify.verify(tmp_path / "data", most_bytes=0).unread > 5
