"""Output that fails: closed pipes and full disks are reported once, and raise nothing."""

import io
import os
import sys

import pytest
from rich import console

from jaxgpt.run.process import output


@pytest.fixture
def streams(monkeypatch):
  """A function (file descriptor or path of standard output) -> standard error as text."""
  err = io.StringIO()

  def replace(target):
    monkeypatch.setattr(sys, "stdout", open(target, "w"))  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", err)
    return err

  return replace


def closed_pipe():
  read, write = os.pipe()
  os.close(read)
  return write


def test_a_closed_pipe_is_reported_once_and_the_last_words_go_to_standard_error(streams):
  err = streams(closed_pipe())
  with output.lasting():
    for i in range(3):
      output.tell([f"line {i}"])
    console.Console().print("a table")
    print("the end", flush=True)
  assert err.getvalue().splitlines() == [
    "jaxgpt: warning: standard output can't be written (it is closed); the run goes on, and its "
    "metrics are in metrics.jsonl",
    "line 0",
    "line 1",
    "line 2",
  ]
  print("after it", flush=True)  # the interpreter's own flush at exit does not fail either


def test_after_a_full_disk_later_lines_are_tried_again(streams, tmp_path):
  err = streams("/dev/full")
  with output.lasting():
    output.tell(["lost"])
    output.tell(["lost too"])
    with (tmp_path / "log").open("w") as log:
      os.dup2(log.fileno(), sys.stdout.fileno())  # the disk has room again
    output.tell(["there"])
  assert err.getvalue().count("warning") == 1 and "No space left on device" in err.getvalue()
  assert (tmp_path / "log").read_text().splitlines()[-1] == "there"


def test_a_warning_that_standard_error_cannot_take_goes_to_standard_output(monkeypatch, capsys):
  monkeypatch.setattr(sys, "stderr", open(closed_pipe(), "w"))  # noqa: SIM115
  with output.lasting():
    output.warn("first")
    output.warn("second")
  out = capsys.readouterr().out
  assert "standard error can't be written" in out and out.count("jaxgpt: warning: ") == 3


def test_without_trouble_output_is_what_it_was(capsys):
  before = sys.stdout
  with output.lasting(), output.lasting():
    output.tell(["a", "b"])
    output.tell([])
    output.warn("c")
  assert sys.stdout is before
  assert capsys.readouterr() == ("a\nb\n", "jaxgpt: warning: c\n")
