"""libtpu is asked for schedules while it is loaded, and only then."""

import os
import pathlib

from jaxgpt.plan.schedule import dump

VARIABLE = "LIBTPU_INIT_ARGS"


def test_the_variable_is_as_before_after_libtpu_is_loaded(monkeypatch):
  monkeypatch.setattr(dump, "_folder", None)
  monkeypatch.delenv(VARIABLE, raising=False)
  with dump.requested():
    assert f"--xla_jf_dump_to={dump._folder} --xla_jf_dump_llo_text=true" in os.environ[VARIABLE]
  assert VARIABLE not in os.environ
  monkeypatch.setenv(VARIABLE, "--x=1")
  with dump.requested():
    assert os.environ[VARIABLE].startswith("--x=1 --xla_jf_dump_to=")
  assert os.environ[VARIABLE] == "--x=1"


def test_a_users_own_folder_is_read_and_kept(monkeypatch, tmp_path):
  monkeypatch.setattr(dump, "_folder", None)
  monkeypatch.setenv(VARIABLE, f"--xla_jf_dump_to={tmp_path}")
  with dump.requested():
    assert os.environ[VARIABLE].count("--xla_jf_dump_to=") == 1
  (tmp_path / "1-f.2-01-final_bundles.txt").write_text("old")
  (tmp_path / "2-f.2-01-final_bundles.txt").write_text("new")
  dump.clear()
  assert dump.of_kernels(["f.2", "g"]) == {"f.2": "new"}


def test_own_schedules_of_earlier_programs_are_deleted(monkeypatch):
  monkeypatch.setattr(dump, "_folder", None)
  monkeypatch.delenv(VARIABLE, raising=False)
  with dump.requested():
    pass
  pathlib.Path(dump._folder, "1-f-01-final_bundles.txt").write_text("old")
  dump.clear()
  assert dump.of_kernels(["f"]) == {}


def test_a_name_that_libtpu_cuts_is_found_by_its_start(tmp_path):
  name = "splash_mha_fwd_block_kv_512_k_layout_1_q_layout_1.1"
  path = tmp_path / "17-splash_mha_fwd_block_kv_512_k_layo-112369707191869586-01-final_bundles.txt"
  path.write_text("cut")
  assert dump.of_kernels([name, "splash_mha_dq.1"], tmp_path) == {name: "cut"}
  copy, other = name[:-1] + "2", name[:-3] + "2.1"
  assert dump.of_kernels([name, copy], tmp_path) == {name: "cut", copy: "cut"}
  assert dump.of_kernels([name, other], tmp_path) == {}, "which of the two it is is not known"
