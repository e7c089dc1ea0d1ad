"""The command line: reads the arguments by the declarations of a command's options and runs it."""

import argparse
import io
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxgpt import __version__
from jaxgpt.commands import Command, discover
from jaxgpt.config import options
from jaxgpt.errors import UserError, nearest, printable
from jaxgpt.run.process import output

_EPILOG = """config overrides: any key of the config as --config.SECTION.KEY=VALUE, for example
  jaxgpt train --config=configs/gpt2_124m.py --config.optim.lr=3e-4 --config.data.path=DIR \\
    --workdir=RUN
docs/config.md lists the keys, docs/cli.md the options of each command."""

_OVERRIDES = ("--config.", "--noconfig.")
_INTERRUPTED, _PIPE_CLOSED = 130, 141  # 128 + the signal's number, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    argv: Arguments without the program's name. None: those of the process.

  Returns:
    The exit code: 0 for success, 2 for bad input, 75 if the same command may succeed later, and
    128 + the signal's number for a run that a signal ended.
  """
  _write_any_character()
  commands = discover()
  words = sys.argv[1:] if argv is None else list(argv)
  if " ".join(words[:2]) in commands:  # `data show`; a file of that name is `./show`
    words[:2] = [" ".join(words[:2])]
  try:
    _check_text(words)
  except UserError as e:
    _say(f"jaxgpt: error: {e}")
    return e.exit_code
  command, values = _parse(commands, words)
  if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see `jaxgpt.__main__`
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    return command.run(command.options(**values)) or 0
  except UserError as e:
    return report(command, e)
  except KeyboardInterrupt:
    _say("jaxgpt: interrupted")
    return _INTERRUPTED
  except BrokenPipeError:  # the reader of the output, such as `head`, has ended
    output.discard(sys.stdout)
    return _PIPE_CLOSED


def report(command: Command, error: UserError) -> int:
  """Prints the error of a command and returns its exit code."""
  del command  # tests check that the message names only flags that the command takes
  _say(f"jaxgpt: error: {printable(str(error))}")  # always one line
  return error.exit_code


def _say(line: str) -> None:
  """Prints to standard error. If that cannot be written, the exit code still says what happened."""
  try:
    print(line, file=sys.stderr, flush=True)
  except OSError:
    output.discard(sys.stderr)


def _write_any_character() -> None:
  """Lets a terminal or pipe that is not UTF-8 show the characters that it lacks as escapes."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")


def _check_text(words: Sequence[str]) -> None:
  """Refuses values of options that are not UTF-8. Python marks their bytes with surrogates.

  Names of input files may be any bytes.
  """
  for before, word in zip(["", *words], words):
    flag, equals, _ = word.partition("=")
    if not flag.startswith("--"):
      flag = before if before.startswith("--") and "=" not in before else ""
    if flag and re.search("[\ud800-\udfff]", word):
      shown = word.partition("=")[2] if equals else word
      raise UserError(
        f"{flag}={shown!r} is not UTF-8 text (\\udcXX is the byte XX); convert it to UTF-8"
      )


def _parse(commands: dict[str, Command], words: list[str]) -> tuple[Command, dict[str, Any]]:
  """The command that the words name, and the options that they give."""
  parser = make_parser(commands, words)
  namespace, rest = parser.parse_known_args(words)
  values = vars(namespace)
  command = commands[values.pop("_command")]
  overrides = [word for word in rest if word.startswith(_OVERRIDES)]
  unknown = [word for word in rest if word not in overrides]
  field = options.takes_overrides(command.options)
  if overrides and not field:
    unknown = unknown or overrides
  if unknown:
    hint = nearest(unknown[0].partition("=")[0], options.flags(command.options))
    parser.error(
      f"unknown argument {unknown[0]!r} for {command.name!r}; {hint}"
      f"see jaxgpt {command.name} --help"
    )
  if field:
    values[field] = tuple(overrides)
  return command, {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}


def make_parser(commands: dict[str, Command], words: Sequence[str]) -> argparse.ArgumentParser:
  """The parser of all commands, with the options of those that occur among the words.

  Options that are not given are absent from the parsed namespace. The dataclass has their defaults.
  """
  parser = argparse.ArgumentParser(
    prog="jaxgpt",
    description="Train, evaluate and use language models in JAX.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--version", action="version", version=f"jaxgpt {__version__}")
  choices = parser.add_subparsers(dest="_command", required=True, metavar="COMMAND")
  for command in commands.values():
    sub = choices.add_parser(
      command.name, help=command.summary, description=command.summary, allow_abbrev=False
    )
    if command.name in words:
      _add_options(sub, command.options)
  return parser


def _add_options(parser: argparse.ArgumentParser, cls: type) -> None:
  groups: dict[options.Group, Any] = {}
  for o in options.declared(cls):
    target: Any = parser
    if o.group:
      if o.group not in groups:
        groups[o.group] = parser.add_argument_group(o.group.title, o.group.description or None)
      target = groups[o.group]
    target.add_argument(*([] if o.positional else [o.label]), **_keywords(o))


def _keywords(o: options.Option) -> dict[str, Any]:
  """Arguments of `add_argument` for one option."""
  found: dict[str, Any] = {"help": help_text(o).replace("%", "%%"), "dest": o.name}
  if o.value_type is bool:
    return found | {"action": "store_true", "default": argparse.SUPPRESS}
  found |= {"type": _reader(o), "metavar": o.value_name}
  if o.positional:
    return found | ({"nargs": "+"} if o.repeated else {})
  if o.repeated:
    found["action"] = "append"
  return found | {"required": o.required, "default": argparse.SUPPRESS}


def _reader(o: options.Option) -> Callable[[str], Any]:
  def read(text: str) -> Any:
    try:
      return o.read(text)
    except ValueError as e:
      raise argparse.ArgumentTypeError(str(e)) from e

  return read


def help_text(o: options.Option) -> str:
  """The help of an option, whether it may be repeated, and its default."""
  words = [o.help]
  if o.repeated and not o.positional:
    words.append("; may be repeated")
  if default := default_text(o):
    words.append(f" (default: {default})")
  return "".join(words)


def default_text(o: options.Option) -> str:
  """The default in words: '' for a required option, a switch, or a default that says nothing."""
  if o.unset:
    return o.unset
  says_nothing = o.required or isinstance(o.default, bool) or o.default in (None, "", ())
  return "" if says_nothing else f"{o.default}"
