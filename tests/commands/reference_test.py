"""docs/cli.md is up to date, and each option is declared once."""

import ast
import pathlib

import pytest

from jaxgpt import commands
from jaxgpt.commands import main, reference
from jaxgpt.config import options

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = commands.discover()


def test_the_page_is_up_to_date():
  assert (ROOT / "docs" / "cli.md").read_text() == reference.cli_page(), "run `make docs`"


def test_each_file_of_the_folders_is_a_command():
  folder = ROOT / "jaxgpt" / "commands"
  files = [path.relative_to(folder) for path in folder.rglob("*.py")]
  others = {"__init__", "main", "reference", "actions", "checks"}
  assert len(COMMANDS) == sum(not others & set(path.with_suffix("").parts) for path in files)
  assert list(COMMANDS) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option_with_its_default(name, capsys):
  with pytest.raises(SystemExit) as e:
    main.main([*name.split(), "--help"])
  text = " ".join(capsys.readouterr().out.split())
  assert e.value.code == 0
  for o in options.declared(COMMANDS[name].options):
    assert o.label in text
    assert o.help[0].islower() or o.help.split()[0].isupper() or o.help[0] == ".", o.help
    if default := main.default_text(o):
      assert default in text


def copied(node):
  """Keywords of a call that repeat an attribute of `args`: f(kind=args.kind)."""
  return [
    k.arg
    for k in node.keywords
    if isinstance(k.value, ast.Attribute)
    and isinstance(k.value.value, ast.Name)
    and k.value.value.id == "args"
    and k.value.attr == k.arg
  ]


@pytest.fixture(scope="module")
def nodes():
  """Of each file of the package: (line and strings of each list, line and copies of each call).

  A list is also a tuple, set or dict, and its strings are also those nested in it.
  """
  out = {}
  for path in sorted((ROOT / "jaxgpt").rglob("*.py")):
    lists, calls = [], []
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict):
        values = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
        lists.append((node.lineno, {value for value in values if isinstance(value, str)}))
      elif isinstance(node, ast.Call):
        calls.append((node.lineno, copied(node)))
    out[path] = lists, calls
  return out


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_is_declared_once(name, nodes):
  """No list in the package names several options of a command a second time."""
  declared = options.declared(COMMANDS[name].options)
  flags = {o.label for o in declared}
  words = {o.name for o in declared} | {o.name.replace("_", "-") for o in declared}
  for path, (lists, calls) in nodes.items():
    for line, strings in lists:
      assert not flags & strings - {"PATH"}, f"{path}:{line} lists flags of {name}"
      if path.parent.name in ("commands", "prepare"):
        again = words & strings
        assert len(again) < max(3, len(declared) / 4), (
          f"{path}:{line} lists options of {name}: {sorted(again)}"
        )
    if path.parent.name == "commands":
      for line, copies in calls:
        assert len(copies) < 8, f"{path}:{line} copies options one by one"
