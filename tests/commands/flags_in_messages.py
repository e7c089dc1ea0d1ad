"""The flags that a command's error message names, and those of them that the command refuses."""

import re

from jaxgpt.commands import discover
from jaxgpt.config import options
from jaxgpt.config.resolution import is_key, is_user_option

_WORD = re.compile(
  r"(?<![\w`-])`?jaxgpt ((?:data show|data inspect|[a-z]+))|(?<![\w-])(--[a-z][\w.-]*\w)|([;`\"])"
)


def refused(command, text):
  """Flags in a message that the command named before them, or else `command`, does not take."""
  commands, out = discover(), []
  current = command
  for match in _WORD.finditer(text):
    named, flag, end = match.groups()
    if end:  # the end of a sentence about another command
      current = command
    elif named:
      current = named if named in commands else command
    elif not _takes(commands[current], flag):
      out.append(flag)
  return out


def _takes(command, flag):
  if flag.startswith("--config.") and options.takes_overrides(command.options):
    key = flag.removeprefix("--config.")
    return is_key(key) or is_user_option(key)
  return flag in options.flags(command.options)


def check(command, error):
  text = re.sub(r"unknown config key \S+", "", str(error))  # the user's own word
  found = refused(command.name, text)
  assert not found, f"jaxgpt {command.name} refuses {found}, but its error recommends it: {error}"
