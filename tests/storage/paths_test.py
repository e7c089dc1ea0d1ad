"""Files are digested in pieces; a folder is deleted although a thread still writes into it."""

import contextlib
import hashlib
import threading
import time

from etils import epath

from jaxgpt.storage import paths


def test_the_digest_is_that_of_the_content(tmp_path):
  (tmp_path / "a").write_bytes(b"abc" * 100_000)
  assert paths.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_folder_into_which_a_thread_writes_is_deleted_in_the_end(tmp_path):
  folder = epath.Path(tmp_path / "folder")
  folder.mkdir()
  end = time.monotonic() + 0.3

  def write():
    while time.monotonic() < end:
      with contextlib.suppress(OSError):  # it was deleted in between
        folder.mkdir(exist_ok=True)
        for i in range(50):
          (folder / f"{i}").touch()

  thread = threading.Thread(target=write)
  thread.start()
  try:
    paths.remove(folder)
  finally:
    thread.join()
  assert paths.remove(folder) and not folder.exists()


def test_a_folder_that_cannot_be_deleted_is_said(tmp_path, monkeypatch):
  folder = epath.Path(tmp_path / "folder")
  folder.mkdir()

  def refuse(path):
    raise OSError("busy")

  monkeypatch.setattr(type(folder), "rmtree", refuse)
  assert not paths.remove(folder, seconds=0.2)
  assert folder.exists()
