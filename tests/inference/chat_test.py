"""The conversation in the terminal: commands, history, stopping, a context that is full."""

import os
import signal
import threading

import pytest

from jaxgpt.errors import UserError
from jaxgpt.inference import chat
from jaxgpt.inference.sampling import Sampling
from tests.inference.server import fake


class Script:
  """A terminal whose user types given lines. An exception among them is raised."""

  def __init__(self, *lines):
    self.lines, self.text, self.notes, self.prefills = list(lines), "", [], []

  def read(self, prefill=""):
    self.prefills.append(prefill)
    if not self.lines:
      raise EOFError
    line = self.lines.pop(0)
    if isinstance(line, type):
      raise line
    return line

  def write(self, text):
    self.text += text

  def note(self, text):
    self.notes.append(text)


def talk(*lines, engine=None, context=4096, system="", **settings):
  terminal = Script(*lines)
  found = chat.Chat(
    engine or fake.FakeEngine(),
    fake.FakePrompts().chat,
    context,
    terminal,
    chat.Settings(Sampling(), **settings),
    system,
  )
  found.run()
  found.terminal = terminal
  return found


def want(*messages):
  """The answer to a conversation of (role, content)."""
  prompt = "\n".join(f"{role}: {content}" for role, content in messages)
  return "".join(fake.script(prompt.encode()))


def test_each_answer_follows_from_the_whole_conversation():
  found = talk("one", "", "two")
  first = want(("user", "one"))
  second = want(("user", "one"), ("assistant", first), ("user", "two"))
  assert found.terminal.text == f"{first}\n{second}\n"
  assert [m["content"] for m in found.messages] == ["one", first, "two", second]
  assert found.terminal.notes[0].startswith("[8 tokens, ")


def test_system_and_reset():
  found = talk("one", "/reset", "/system be brief", "two", "/system", "three")
  two = want(("system", "be brief"), ("user", "two"))
  three = want(("user", "two"), ("assistant", two), ("user", "three"))
  assert found.terminal.text.splitlines()[1:] == [two, three]
  assert (
    talk("one", system="be brief").terminal.text
    == want(("system", "be brief"), ("user", "one")) + "\n"
  )


def test_edit_goes_on_from_a_turn():
  found = talk("one", "two", "/edit 1 ONE", "/history")
  assert [m["content"] for m in found.messages] == ["ONE", want(("user", "ONE"))]
  assert found.terminal.notes[-2:] == ["1: ONE", f"model: {want(('user', 'ONE'))}"]
  found = talk("one", "two", "/edit", "2nd")
  assert found.terminal.prefills[3] == "two", "the user edits what was there"
  assert found.messages[2]["content"] == "2nd" and found.messages[0]["content"] == "one"
  found = talk("one", "/edit TWO WORDS")
  assert found.messages[0]["content"] == "TWO WORDS"
  found = talk("one", "/edit", KeyboardInterrupt)
  assert found.messages[0]["content"] == "one" and found.terminal.notes[-1] == "nothing changed"


def test_another_answer():
  engine = fake.FakeEngine()
  found = talk("seeded", "/again", engine=engine)
  assert len(found.messages) == 2
  assert engine.requests[0].prompt == engine.requests[1].prompt
  assert engine.requests[0].seed != engine.requests[1].seed


def test_settings():
  engine = fake.FakeEngine()
  found = talk(
    "/temperature 0.1", "/top-k 5", "/max-new 3", "/seed 4", "one", "/settings", engine=engine
  )
  request = engine.requests[0]
  assert (request.sampling.temperature, request.sampling.top_k) == (0.1, 5)
  assert (request.max_new, request.seed) == (3, 4)
  assert "temperature 0.1" in found.terminal.notes[-1] and "max-new 3" in found.terminal.notes[-1]
  assert any("limit of tokens" in note for note in found.terminal.notes)


@pytest.mark.parametrize(
  "line, words",
  [
    ("/temprature 1", "did you mean 'temperature'"),
    ("/temperature hot", "not a number"),
    ("/temperature", "not a number"),
    ("/temperature -1", "temperature=-1"),
    ("/top-p 2", "in (0, 1]"),
    ("/top-k 1.5", "not a number"),
    ("/top-k 3000000000", "below 2^31"),
    ("/top-k " + "9" * 400, "below 2^31"),
    ("/seed -1", "at least 0"),
    ("/edit", "no message yet"),
    ("/edit 2 x", "no message yet"),
    ("/again", "no message yet"),
    ("forbidden", "refuses this request"),
    ("fails", "no block is free"),
    ("refuse", "template refuses"),
    ("x" * 5000, "shorten it"),
  ],
)
def test_a_mistake_leaves_the_conversation_as_it_was(line, words):
  found = talk(line, "one")
  assert words in found.terminal.notes[0]
  assert [m["content"] for m in found.messages] == ["one", want(("user", "one"))]
  found = talk("one", "/edit 3 x")
  assert "your messages are 1 to 1" in found.terminal.notes[-1]


def test_a_slash_at_the_start_and_leaving():
  found = talk("//etc is a folder", "/quit", "never")
  assert [m["content"] for m in found.messages][::2] == ["/etc is a folder"]
  assert talk(KeyboardInterrupt, "one").terminal.notes[0] == "Ctrl-D leaves"
  helped = "\n".join(talk("/help").terminal.notes)
  for word in ("/reset", "/system TEXT", "/edit [N]", "/temperature", "/max-new", "Ctrl-C"):
    assert word in helped


def test_ctrl_c_stops_an_answer_and_keeps_what_is_there():
  engine = fake.FakeEngine(seconds=0.01)
  before = signal.getsignal(signal.SIGINT)
  threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
  found = talk("tokens=4000", engine=engine)
  assert engine.cancelled == [1] and not engine.busy
  text = found.messages[1]["content"]
  assert 0 < text.count(" ") < 200 and want(("user", "tokens=4000")).startswith(text)
  assert "stopped" in found.terminal.notes[0]
  assert signal.getsignal(signal.SIGINT) is before
  found.take("/reset")
  found.take("and now?")
  assert found.messages[1]["content"] == want(("user", "and now?"))


def test_old_messages_are_left_out_of_a_full_context():
  found = talk("a" * 100, "b" * 100, "c" * 100, context=360)
  assert len(found.messages) == 6
  assert "the first 2 messages no longer fit" in "\n".join(found.terminal.notes)
  assert found.messages[-1]["content"] == want(
    *((m["role"], m["content"]) for m in found.messages[2:5])
  )


def test_control_characters_of_an_answer_do_not_reach_the_terminal(monkeypatch):
  monkeypatch.setattr(fake, "script", lambda *args: ["\x1b[2J", "a\n", "\tb"])
  assert talk("one").terminal.text == "\\x1b[2Ja\n\tb\n"


def test_the_flag_in_an_error_of_a_setting_is_not_the_command_lines():
  with pytest.raises(UserError, match="temperature"):
    talk().take("/temperature -1")
