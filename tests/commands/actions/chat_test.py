"""The chat at a terminal, as a user types, and in a pipe. The engine is a fake."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from jaxgpt.commands.actions import chat as chat_action

TALK = """
import fcntl, termios

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal is the process's own: Ctrl-C at it is a signal
from jaxgpt.commands.actions.chat import Terminal
from jaxgpt.inference import chat
from jaxgpt.inference.sampling import Sampling
from tests.inference.server import fake

engine = fake.FakeEngine(seconds=0.01)
settings = chat.Settings(Sampling())
chat.Chat(engine, fake.FakePrompts().chat, 4096, Terminal(), settings).run()
print("left")
"""


class Screen:
  """A terminal with the chat in it."""

  def __init__(self):
    self.end, other = pty.openpty()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "dumb"}
    words = [sys.executable, "-c", TALK]
    streams = dict(stdin=other, stdout=other, stderr=other, start_new_session=True)
    self.process = subprocess.Popen(words, env=env, **streams)
    os.close(other)
    self.text = ""

  def type(self, text):
    os.write(self.end, text.encode())

  def until(self, pattern, seconds=60):
    """Waits for a text that comes after what was matched before."""
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, self.text, re.S)):
      ready, _, _ = select.select([self.end], [], [], max(end - time.monotonic(), 0))
      assert ready, f"no {pattern!r} in {self.text!r}"
      try:
        self.text += os.read(self.end, 4096).decode()
      except OSError:  # the other end is closed
        assert re.search(pattern, self.text, re.S), f"no {pattern!r} in {self.text!r}"
    self.text = self.text[found.end() :]
    return found[0]


def test_a_terminal():
  screen = Screen()
  try:
    screen.until("> ")
    screen.type("hello\n")
    answer = screen.until(r"(\d+)\.0 \1\.1 .*?\1\.7")
    assert "hello" not in answer
    screen.until(r"\[8 tokens.*?> ")
    screen.type("tokens=4000\n")
    screen.until(r"(\d+)\.3 ")
    screen.type("\x03")
    screen.until(r"stopped\].*?> ")
    screen.type("/edit\n")
    screen.until("> tokens=4000")
    screen.type("\x08" * 11 + "short\n")
    screen.until(r"\[8 tokens.*?> ")
    screen.type("/history\n")
    screen.until(r"2: short.*?> ")
    # Python misses a signal that comes after readline's prompt and before it waits for a key, for
    # which a busy machine needs seconds: pressed again until there is an answer.
    for last in [False] * 20 + [True]:
      screen.type("\x03")
      try:
        screen.until("Ctrl-D leaves.*?> ", seconds=3)
        break
      except AssertionError:
        if last:
          raise
    screen.type("\x04")
    screen.until("left")
    assert screen.process.wait(10) == 0
  finally:
    screen.process.kill()
    os.close(screen.end)


def test_lines_of_a_pipe(monkeypatch, capsys):
  monkeypatch.setattr(sys, "stdin", io.StringIO("one\r\ntwo\\\nthree\nlast"))
  terminal = chat_action.Terminal()
  assert [terminal.read() for _ in range(3)] == ["one", "two\nthree", "last"]
  with pytest.raises(EOFError):
    terminal.read()
  terminal.write("answer")
  terminal.note("note")
  out, err = capsys.readouterr()
  assert (out, err) == ("answer", "note\n"), "no colours and no prompt in a pipe"
