"""Atomic writes."""

import pytest

from jaxgpt.storage import atomic


def test_text_and_bytes_replace_the_old_file(tmp_path):
  path = tmp_path / "x.json"
  atomic.write(path, "näher\n")
  assert path.read_bytes() == "näher\n".encode()
  atomic.write(path, b"\x00\x01")
  assert path.read_bytes() == b"\x00\x01"
  assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "x"
  atomic.write(path, "old")

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(atomic.os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    atomic.write(path, "new")
  assert path.read_text() == "old"
