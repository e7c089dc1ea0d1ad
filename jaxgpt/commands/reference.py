"""Writes the generated reference pages: docs/config.md and docs/cli.md.

python -m jaxgpt.commands.reference
"""

import pathlib

from jaxgpt.commands import Command, discover
from jaxgpt.commands.main import default_text
from jaxgpt.config import options, reference
from jaxgpt.training import objectives, optimizers, schedules

_CLI_HEAD = """# Command line

Generated from the declarations of the options in `jaxgpt/commands/` and
`jaxgpt/text/prepare/options.py` by `make docs`; a test keeps this page equal to them. `jaxgpt
COMMAND --help` prints the same on a terminal. Write options as `--name=value` or `--name value`.

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
  return "\n".join(lines)


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
