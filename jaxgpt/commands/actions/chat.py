"""The terminal chat: loads a run, and reads from and writes to the terminal or a pipe."""

import contextlib
import importlib
import sys
from typing import Any

from jaxgpt.commands.actions import backend, sampling
from jaxgpt.commands.actions import engine as engine_options
from jaxgpt.inference import chat, load
from jaxgpt.inference.engine.requests import Request

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Terminal:
  """Standard input and output. Notes go to standard error, so a pipe gets answers alone."""

  def __init__(self) -> None:
    self._is_typed = sys.stdin.isatty()
    self._colored = sys.stderr.isatty()
    self._readline: Any = None
    if self._is_typed:
      with contextlib.suppress(ImportError):  # not on every system
        self._readline = importlib.import_module("readline")

  def read(self, prefill: str = "") -> str:
    """See `chat.Terminal`. A line that ends with a backslash goes on in the next."""
    lines = [self._line("> ", prefill)]
    while lines[-1].endswith("\\"):
      lines[-1] = lines[-1][:-1]
      lines.append(self._line("… ", ""))
    return "\n".join(lines)

  def _line(self, prompt: str, prefill: str) -> str:
    if not self._is_typed:
      line = sys.stdin.readline()
      if not line:
        raise EOFError
      return line.rstrip("\r\n")
    try:
      if self._readline and prefill:
        self._readline.set_startup_hook(lambda: self._readline.insert_text(prefill))
      return input(prompt)
    except (EOFError, KeyboardInterrupt):
      print(file=sys.stderr)
      raise
    finally:
      if self._readline:
        self._readline.set_startup_hook(None)

  def write(self, text: str) -> None:
    """See `chat.Terminal`."""
    sys.stdout.write(text)
    sys.stdout.flush()

  def note(self, text: str) -> None:
    """See `chat.Terminal`."""
    before, after = (_DIM, _PLAIN) if self._colored else ("", "")
    print(f"{before}{text}{after}", file=sys.stderr, flush=True)


def run(args: Any) -> None:
  """Talks until the user leaves. `args` are the options of `jaxgpt chat`."""
  terminal = Terminal()
  chosen = sampling.given(args)
  engine_options.check(args)
  backend.start()
  loaded = load.load(args.workdir, args.step, "generate")
  prompts = engine_options.prompts(loaded, args)
  _ = prompts.template  # its absence is an error before anything is compiled
  draws, notices = sampling.settings(loaded, chosen)
  for line in notices:
    terminal.note(line)
  drafting = engine_options.drafting_of(args)
  engine = engine_options.make(loaded, args, drafting, max_rows=1)
  warm_up = Request(prompt=(loaded.tokenizer.bos_id,) * 2, max_new=2, sampling=draws)
  for _piece in engine.run([warm_up]):
    pass
  terminal.note(f"{args.workdir}, step {loaded.step}; /help lists commands, Ctrl-D leaves")
  settings = chat.Settings(draws, args.max_new, args.seed)
  talk = chat.Chat(
    engine, prompts.chat, loaded.c.data.seq_len, terminal, settings, system=args.system
  )
  talk.run()
  if report := engine_options.drafting_report(engine.stats()):
    terminal.note(report)
