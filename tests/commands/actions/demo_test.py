"""The demo's text: what it leaves out depends on the installation."""

import io
import sysconfig

import pytest
from rich import console

from jaxgpt.commands.actions import demo
from jaxgpt.text.prepare import prepare


def test_only_folders_that_exist_are_excluded(tmp_path):
  (tmp_path / "json" / "tests").mkdir(parents=True)
  (tmp_path / "site-packages" / "numpy" / "idle_test").mkdir(parents=True)
  assert demo.excluded(str(tmp_path)) == ["tests", "site-packages"]


def test_this_installation_has_text_for_the_demo(tmp_path, monkeypatch):
  """Every excluded folder is found, and files are left: preparing starts."""

  class EnoughError(Exception):
    pass

  def train(text, *args, **kwargs):
    raise EnoughError

  monkeypatch.setattr(prepare, "prepare", lambda inputs, out, **options: seen.update(options))
  seen = {}
  monkeypatch.setattr(demo.loop, "train", train)
  with pytest.raises(EnoughError):
    demo.main(tmp_path, console.Console(file=io.StringIO()))
  assert seen["exclude"] == demo.excluded(sysconfig.get_paths()["stdlib"])
