"""A conversation in the terminal: what the user types, the model's answers, and commands."""

import dataclasses
import inspect
import secrets
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxgpt.errors import UserError, nearest, printable
from jaxgpt.inference.engine.requests import LENGTH, Piece, Request, problem
from jaxgpt.inference.sampling import Sampling
from jaxgpt.run.process.stop_signal import StopSignal

_ROOM = 16  # tokens that an answer has at least, if older messages can be left out
_SEEDS = 1 << 31
_OWN = ("max-new", "seed")  # settings that are not of `Sampling`


class Engine(Protocol):
  """The decoding engine, `jaxgpt.inference.engine.engine.Engine`."""

  def check(self, request: Request) -> None:
    """Raises a UserError for a request that cannot be run."""
    ...

  def add(self, request: Request) -> int:
    """Queues a request and returns its number."""
    ...

  def cancel(self, number: int) -> None:
    """Ends a request."""
    ...

  def step(self) -> list[Piece]:
    """Begins the next tokens of the requests, and returns what was read of those before."""
    ...

  @property
  def busy(self) -> bool:
    """Whether a request is queued or running."""
    ...


class Terminal(Protocol):
  """What a conversation reads from and writes to."""

  def read(self, prefill: str = "") -> str:
    """A line of the user, who starts with `prefill` and edits it.

    Raises:
      EOFError: The user leaves.
      KeyboardInterrupt: The user gives this line up.
    """
    ...

  def write(self, text: str) -> None:
    """Shows a part of an answer."""
    ...

  def note(self, text: str) -> None:
    """Shows a line that is not a part of the conversation."""
    ...


@dataclasses.dataclass
class Settings:
  """How answers are drawn.

  Attributes:
    sampling: The sampling rules.
    max_new: Most tokens of an answer. 0: the context's rest.
    seed: Seed of each answer. None: a new one each time.
  """

  sampling: Sampling
  max_new: int = 0
  seed: int | None = None


class Chat:
  """A conversation with a model.

  Attributes:
    messages: The conversation without its system message.
    system: The system message, or ''.
    settings: How answers are drawn.
  """

  def __init__(
    self,
    engine: Engine,
    encode: Callable[[Sequence[Mapping[str, Any]]], list[int]],
    context: int,
    terminal: Terminal,
    settings: Settings,
    system: str = "",
  ):
    """Begins a conversation.

    Args:
      engine: The engine.
      encode: Messages to the ids of a prompt, `prompts.Prompts.chat`.
      context: Most tokens of a prompt and its answer together.
      terminal: Reads and writes.
      settings: How answers are drawn.
      system: The system message, or ''.
    """
    self._engine, self._encode, self._context = engine, encode, context
    self._terminal = terminal
    self.messages: list[dict[str, str]] = []
    self.system, self.settings = system, settings
    self._commands = {
      "help": self._help,
      "reset": self._reset,
      "system": self._system,
      "edit": self._edit,
      "again": self._again,
      "history": self._history,
      "settings": self._settings,
      "quit": self._quit,
    }

  def run(self) -> None:
    """Talks until the user leaves."""
    while True:
      try:
        line = self._terminal.read()
      except KeyboardInterrupt:
        self._terminal.note("Ctrl-D leaves")
        continue
      except EOFError:
        return
      try:
        if not self.take(line):
          return
      except UserError as e:
        self._terminal.note(str(e))

  def take(self, line: str) -> bool:
    """Answers a message, or obeys a command. False: the user leaves.

    Raises:
      UserError: There is no such command, a value is out of range, or the model cannot answer.
    """
    if not line.strip():
      return True
    if not line.startswith("/") or line.startswith("//"):
      self._say(line.removeprefix("/") if line.startswith("//") else line)
      return True
    name, _, rest = line[1:].partition(" ")
    if name in self._commands:
      return self._commands[name](rest.strip()) is not False
    if name in self._names():
      self._set(name, rest.strip())
      return True
    known = [*self._commands, *self._names()]
    raise UserError(f"there is no command /{name}; {nearest(name, known)}/help lists them")

  def _say(self, text: str) -> None:
    """Asks the model. A message that it cannot answer is taken back."""
    self.messages.append({"role": "user", "content": text})
    try:
      self._answer()
    except UserError:
      self.messages.pop()
      raise

  def _answer(self) -> None:
    request = self._request()
    number, begin = self._engine.add(request), time.monotonic()
    text, finish, count, first = "", None, 0, begin
    with StopSignal() as stop:
      while finish is None:
        if stop.received:
          self._engine.cancel(number)
          finish = "stopped"
          break
        for piece in self._engine.step():
          if piece.request != number:
            continue
          if piece.tokens and not count:
            first = time.monotonic()
          count += len(piece.tokens)
          text += piece.text
          self._terminal.write(printable(piece.text, keep="\n\t"))
          finish = piece.finish
      while self._engine.busy:  # what was cancelled leaves the engine
        self._engine.step()
    self._terminal.write("\n")
    if why := problem(finish):
      raise UserError(why)
    self.messages.append({"role": "assistant", "content": text})
    self._terminal.note(_facts(count, time.monotonic() - first, finish))
    if stop.received and stop.received.name == "SIGTERM":
      raise SystemExit(128 + stop.received)

  def _request(self) -> Request:
    """The request for an answer. Older messages are left out if they do not fit."""
    s = self.settings
    system = [{"role": "system", "content": self.system}] if self.system else []
    seed = secrets.randbelow(_SEEDS) if s.seed is None else s.seed
    skip = 0
    while True:
      prompt = self._encode([*system, *self.messages[skip:]])
      room = self._context - len(prompt)
      if room >= min(_ROOM, s.max_new or _ROOM) or len(self.messages) - skip < 3:
        break
      skip += 2  # a question and its answer
    if room < 1:
      raise UserError(
        f"the message has {len(prompt):,} tokens, the model's context {self._context:,}: shorten it"
      )
    if skip:
      self._terminal.note(f"the first {skip} messages no longer fit into the context: left out")
    request = Request(
      prompt=tuple(prompt), max_new=min(s.max_new or room, room), sampling=s.sampling, seed=seed
    )
    self._engine.check(request)
    return request

  # Commands. Their docstrings are what /help shows.

  def _help(self, rest: str) -> None:
    """/help: this list"""
    for command in self._commands.values():
      self._terminal.note(inspect.getdoc(command) or "")
    self._terminal.note(f"/{', /'.join(self._names())} X: change a setting")
    self._terminal.note("//TEXT: a message that begins with a slash; a \\ at the end: more follows")
    self._terminal.note("Ctrl-C: stop an answer; Ctrl-D: leave")

  def _reset(self, rest: str) -> None:
    """/reset: forget the conversation, keep the system message and the settings"""
    self.messages.clear()
    self._terminal.note("a new conversation")

  def _system(self, rest: str) -> None:
    """/system TEXT: set the system message; without a text: remove it"""
    self.system = rest
    self._terminal.note("system message set" if rest else "no system message")

  def _edit(self, rest: str) -> None:
    """/edit [N] [TEXT]: change your message N, or the last one, and go on from there"""
    mine = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
    if not mine:
      raise UserError("/edit: there is no message yet; write one")
    word, _, text = rest.partition(" ")
    number = len(mine)
    if word.isascii() and word.isdecimal():
      number = int(word)
    else:
      text = rest
    if not 1 <= number <= len(mine):
      raise UserError(f"/edit {number}: your messages are 1 to {len(mine)}; /history shows them")
    place = mine[number - 1]
    if not text:
      try:
        text = self._terminal.read(self.messages[place]["content"])
      except (KeyboardInterrupt, EOFError):
        self._terminal.note("nothing changed")
        return
    kept = self.messages[place:]
    del self.messages[place:]
    try:
      self._say(text)
    except UserError:
      self.messages += kept
      raise

  def _again(self, rest: str) -> None:
    """/again: another answer to your last message"""
    if not self.messages:
      raise UserError("/again: there is no message yet; write one")
    last = self.messages.pop()
    try:
      self._answer()
    except UserError:
      self.messages.append(last)
      raise

  def _history(self, rest: str) -> None:
    """/history: the conversation so far"""
    if self.system:
      self._terminal.note(f"system: {printable(self.system, keep=chr(10))}")
    number = 0
    for message in self.messages:
      number += message["role"] == "user"
      who = f"{number}" if message["role"] == "user" else "model"
      self._terminal.note(f"{who}: {printable(message['content'], keep=chr(10))}")

  def _settings(self, rest: str) -> None:
    """/settings: the settings and their values"""
    s = self.settings
    shown = {name.replace("_", "-"): value for name, value in s.sampling._asdict().items()}
    shown |= {
      "max-new": s.max_new or "the context's rest",
      "seed": "new" if s.seed is None else s.seed,
    }
    self._terminal.note("  ".join(f"{name} {value}" for name, value in shown.items()))

  def _quit(self, rest: str) -> bool:
    """/quit: leave, as Ctrl-D does"""
    return False

  def _names(self) -> list[str]:
    return [*(name.replace("_", "-") for name in Sampling._fields), *_OWN]

  def _set(self, name: str, text: str) -> None:
    """Changes a setting."""
    s = self.settings
    try:
      (word,) = shlex.split(text)
      whole = name in ("top-k", *_OWN)
      value = int(word) if whole else float(word)
    except ValueError:
      raise UserError(f"/{name} {text}: not a number; write, for example, /{name} 1") from None
    if name in _OWN:
      if not 0 <= value < _SEEDS:
        raise UserError(f"/{name} {text}: must be at least 0 and below 2^31")
      setattr(s, name.replace("-", "_"), int(value))
    else:
      changed = s.sampling._replace(**{name.replace("-", "_"): value})
      changed.check()
      s.sampling = changed
    self._terminal.note(f"{name} {value}")


def _facts(count: int, seconds: float, finish: str) -> str:
  """A line on an answer: its tokens, their speed, and why it ended if not by itself."""
  words = [f"{count} token{'' if count == 1 else 's'}"]
  if count > 1 and seconds > 0:
    words.append(f"{(count - 1) / seconds:.1f} a second")
  if finish == LENGTH:
    words.append("ended by the limit of tokens")
  elif finish == "stopped":
    words.append("stopped")
  return f"[{', '.join(words)}]"
