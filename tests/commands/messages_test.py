"""Flags that error messages name: a command that is named with a flag takes it."""

import ast
import pathlib
import re

import pytest

import jaxgpt
from jaxgpt.commands import discover
from jaxgpt.config import options
from jaxgpt.config.resolution import is_key
from jaxgpt.errors import UserError
from tests.commands import flags_in_messages

ROOT = pathlib.Path(jaxgpt.__file__).parent


@pytest.mark.parametrize(
  "command, text, refused",
  [
    ("evaluate", "say where it is with --data=DIR", []),
    ("evaluate", "set --config.data.path", ["--config.data.path"]),
    ("train", "set --config.data.path", []),
    ("train", "set --config.data.paths", ["--config.data.paths"]),
    ("evaluate", "start with jaxgpt train --config=F --config.seed=1; see --step", []),
    ("evaluate", "prepare it with jaxgpt data --tokenizer=T", []),
    ("evaluate", "prepare it with --tokenizer=T", ["--tokenizer"]),
    ("import", "make it with jaxgpt data --workdir=X", ["--workdir"]),
    ("data", "jaxgpt data show --workdirs", ["--workdirs"]),
  ],
)
def test_the_check_of_messages(command, text, refused):
  assert flags_in_messages.refused(command, text) == refused


def literal(node):
  """The text of a string or f-string, with {} for each value."""
  if isinstance(node, ast.Constant) and isinstance(node.value, str):
    return node.value
  if isinstance(node, ast.JoinedStr):
    return "".join(literal(part) or "{}" for part in node.values)
  if isinstance(node, ast.BinOp):
    return (literal(node.left) or "") + (literal(node.right) or "")
  return ""


def test_every_flag_of_an_error_is_one_of_some_command():
  known = {flag for command in discover().values() for flag in options.flags(command.options)}
  bad = []
  for path in ROOT.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("UserError")):
        continue
      text = "".join(map(literal, node.args))
      for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text):
        key = flag.removeprefix("--config.").rstrip(".")
        is_override = flag.startswith("--config.") and (is_key(key) or flag + "{}" in text)
        if flag not in known and not is_override and flag + "{}" not in text:
          bad.append((str(path.relative_to(ROOT)), flag))
  assert not bad


def test_a_command_that_names_a_flag_it_refuses_is_noticed():
  with pytest.raises(AssertionError, match="--config.data.path"):
    flags_in_messages.check(discover()["evaluate"], UserError("set --config.data.path"))
