"""Run folders of earlier versions are read as what they are."""

import json

import pytest

from jaxgpt import config
from jaxgpt.run import run_folder


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
