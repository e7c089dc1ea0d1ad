"""Run folders of earlier versions, and of disks that fail."""

import errno
import json
import os

import pytest
from etils import epath

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.run import run_folder, run_lock
from jaxgpt.run.metric_writers import files
from jaxgpt.run.metric_writers.writer import Run


@pytest.mark.parametrize(
  "targets, rank, kept",
  [
    (("q_proj", "v_proj"), 0, ()),  # no adapters were made, and all weights trained
    (("q", "typo"), 4, ("q",)),
    (("q", "v"), 4, ("q", "v")),
    (("*",), 4, ("*",)),
  ],
)
def test_targets_that_once_matched_nothing_stand_for_no_adapter(tmp_path, targets, rank, kept):
  c = config.resolve(config.base(), 8).to_dict()
  c["model"]["lora"].update(rank=4, targets=targets)
  (tmp_path / "config.json").write_text(json.dumps({"config": c, "origin": {}}))
  read = run_folder.read_config(tmp_path)
  assert (read.model.lora.rank, read.model.lora.targets) == (rank, kept)


def test_a_setting_without_effect_does_not_keep_a_run_from_being_read(tmp_path):
  c = config.resolve(config.base(), 8).to_dict()
  c["model"]["window"], c["model"]["rope"]["factor"] = 16, 8.0
  (tmp_path / "config.json").write_text(json.dumps({"config": c, "origin": {}}))
  assert run_folder.read_config(tmp_path).model.window == 16


@pytest.mark.parametrize(
  "code, exit_code, cure",
  [
    (errno.ENOSPC, 75, r"\); make room, then run the same command again$"),
    (errno.EIO, 75, r"\); this may pass: run the same command again$"),
    (errno.ESTALE, 75, r"\); this may pass: run the same command again$"),
    (errno.EACCES, 2, r"change its permissions$"),
  ],
)
def test_a_start_that_meets_a_failing_disk_tells_a_launcher_to_try_again(
  tmp_path, monkeypatch, code, exit_code, cure
):
  def failing(*_, **__):
    raise OSError(code, os.strerror(code))

  c = config.resolve(config.base(), 8)
  (tmp_path / "config.json").write_text("{}")
  lock, run = run_lock.RunLock(tmp_path / "run"), Run(c, epath.Path(tmp_path), 0)
  monkeypatch.setattr(run_lock.os, "open", failing)
  monkeypatch.setattr(run_folder, "holds_something_else", failing)
  monkeypatch.setattr(run_folder, "_check_same_run", failing)
  monkeypatch.setattr(files.io, "FileIO", failing)
  for start in (
    lock.take,
    lambda: run_folder.check_free(tmp_path / "run"),
    lambda: run_folder.enter(tmp_path, c, {}, None, "", None),
    lambda: files.Jsonl(run),
  ):
    with pytest.raises(UserError, match=cure) as caught:
      start()
    assert caught.value.exit_code == exit_code
