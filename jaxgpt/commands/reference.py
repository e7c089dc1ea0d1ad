"""Writes the generated reference pages: docs/config.md and docs/cli.md.

python -m jaxgpt.commands.reference
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from jaxgpt.commands import Command, discover
from jaxgpt.commands.main import default_text
from jaxgpt.config import options, reference
from jaxgpt.config.registry import Registry
from jaxgpt.text.filters import clean_steps, dedup, step_specs
from jaxgpt.text.readers import formats
from jaxgpt.training import objectives, optimizers, schedules

_CLI_HEAD = """# Command line

Generated from the declarations of the options in `jaxgpt/commands/` and
`jaxgpt/text/prepare/options.py`, and from the registries of formats, cleaning steps and kinds of
duplicates, by `make docs`; a test keeps this page equal to them. `jaxgpt COMMAND --help` prints the
options on a terminal. Write them as `--name=value` or `--name value`.

A command exits with 0 on success, 2 for bad input, 75 if the same command may succeed later, and
128 + the signal's number if a signal ended a run. `jaxgpt plan` exits with 1 if nothing fits or a
budget is exceeded.

`train`, `doctor` and `plan` also take config overrides: any key of [the config](config.md) as
`--config.SECTION.KEY=VALUE`.
"""


def config_page() -> str:
  """The text of docs/config.md."""
  registries = (objectives.OBJECTIVES, optimizers.OPTIMIZERS, schedules.SCHEDULES)
  return reference.text(
    {
      registry.setting: {name: entry.summary for name, entry in registry.items()}
      for registry in registries
    }
  )


def cli_page() -> str:
  """The text of docs/cli.md."""
  commands = discover().values()
  index = "".join(
    f"- [`jaxgpt {c.name}`](#jaxgpt-{c.name.replace(' ', '-')}): {c.summary}\n" for c in commands
  )
  return "\n".join([_CLI_HEAD, index, *map(_section, commands)])


def _section(command: Command) -> str:
  declared = options.declared(command.options)
  words = ["jaxgpt", command.name]
  for o in declared:
    if o.positional:
      words.append(f"{o.value_name} …" if o.repeated else o.value_name)
    elif o.required:
      words.append(f"{o.label}={o.value_name}")
  words.append("[OPTIONS]")
  lines = [
    f"## jaxgpt {command.name}",
    "",
    f"{command.summary[0].upper()}{command.summary[1:]}.",
    "",
    "```",
    " ".join(words),
    "```",
    "",
  ]
  tables: dict[options.Group | None, list[str]] = {None: []}
  for o in declared:
    tables.setdefault(o.group, []).append(_row(o))
  for group, rows in tables.items():
    if group:
      lines += [f"### {command.name}: {group.title}", ""]
      lines += [group.description, ""] if group.description else []
    lines += ["| option | default | meaning |", "|---|---|---|", *rows, ""]
  if command.name == "data":
    lines += [*_formats(), *_steps("cleaning steps", clean_steps.STEPS)]
    lines += _steps("kinds of duplicates", dedup.KINDS)
  return "\n".join(lines)


def _formats() -> Iterator[str]:
  """The table of data formats."""
  yield from ("### data: formats", "")
  yield from (
    "The suffix of a file chooses its format, or `--format` chooses that of all files.",
    "",
  )
  yield from ("| format | suffixes | records |", "|---|---|---|")
  for name, entry in formats.FORMATS.items():
    needs = "; needs `jaxgpt[data]`" if entry.module else ""
    yield f"| `{name}` | `{' '.join(entry.suffixes)}` | {_cell(entry.summary)}{needs} |"
  yield ""


def _steps(heading: str, steps: Registry[Any]) -> Iterator[str]:
  """The table of a registry of steps and their options."""
  yield from (f"### data: {heading}", "")
  yield f"Values of `{steps.setting}=NAME` or `{steps.setting}=NAME:key=value,key=value`."
  yield from ("", "| name, key | default | meaning |", "|---|---|---|")
  for name, step in steps.items():
    yield f"| `{name}` | | {_cell(step.summary)} |"
    for key, option in step.options.items():
      default = step_specs.to_text(option.default)
      yield f"| `{name}:{key}` | {default and f'`{default}`'} | {_cell(option.help)} |"
  yield ""


def _row(o: options.Option) -> str:
  name = o.label if o.positional or o.value_type is bool else f"{o.label}={o.value_name}"
  default = default_text(o)
  if o.required:
    default = "*required*"
  elif default and not o.unset:
    default = f"`{default}`"
  meaning = o.help + ("; may be repeated" if o.repeated and not o.positional else "")
  if limits := o.range_text():
    meaning += f" ({limits})"
  return "| " + " | ".join(_cell(x) for x in (f"`{name}`", default, meaning)) + " |"


def _cell(text: str) -> str:
  return text.replace("|", "\\|")


if __name__ == "__main__":
  for name, page in (("config", config_page), ("cli", cli_page)):
    pathlib.Path("docs", f"{name}.md").write_text(page(), encoding="utf-8")
