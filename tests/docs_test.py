"""The documentation: links, commands, named keys and files exist. `docs_run_test` runs them."""

import ast
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import yaml

from jaxgpt import config
from jaxgpt.commands import discover, main

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
  p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
)
EXTENDED = "docs/extending.md"  # its commands belong to a changed package: see extending_test
SECTIONS = tuple(config.base())
NO_KEYS = (
  ".py",
  ".md",
  ".json",
  ".jsonl",
  ".bin",
  ".txt",
  ".lock",
  ".safetensors",
)  # `data.json` is a file, not a key


class Command(NamedTuple):
  """A command of a page, and the output that the page shows for it."""

  page: str
  text: str
  output: str


def read(page: str) -> str:
  return (ROOT / page).read_text()


def prose(page: str) -> str:
  """A page without its fenced blocks."""
  return re.sub(r"^( *)```.*?^\1```", "", read(page), flags=re.S | re.M)


def commands(page: str) -> Iterator[Command]:
  """The commands of a page's `console` blocks: `$ ` lines and their continuations."""
  for block in re.findall(r"^```console\n(.*?)^```", read(page), re.S | re.M):
    command, output = [], []
    for line in block.splitlines():
      if command and not output and is_open("\n".join(command)):
        command.append(line)
      elif line.startswith("$ "):
        if command:
          yield Command(page, "\n".join(command), "\n".join(output))
        command, output = [line[2:]], []
      else:
        output.append(line)
    if command:
      yield Command(page, "\n".join(command), "\n".join(output))


def is_open(text: str) -> bool:
  """Whether a command continues in the next line: a backslash, or an open quote."""
  try:
    shlex.split(text)
  except ValueError:
    return True
  return text.endswith("\\")


def arguments(text: str) -> list[str] | None:
  """The arguments of `jaxgpt` in a shell command; None for other programs."""
  lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=True)
  lexer.whitespace_split = True
  words = list(lexer)
  while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
    words.pop(0)
  if words[:1] != ["jaxgpt"]:
    return None
  ends = [i for i, word in enumerate(words) if set(word) <= set("|&;<>()")]
  return words[1 : min(ends, default=len(words))]


def slug(heading: str) -> str:
  """The anchor of a heading, as GitHub makes it."""
  text = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
  return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: str) -> set[str]:
  return {slug(h) for h in re.findall(r"^#+ (.*)$", prose(page), re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_internal_links_resolve(page):
  broken = []
  for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
    if "://" in target or target.startswith("mailto:"):
      continue
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    outside = page.startswith("docs/") and not file.resolve().is_relative_to(ROOT / "docs")
    if (
      outside
      or not file.exists()
      or (  # `make site` has only the pages of docs/
        anchor and anchor not in anchors(file.resolve().relative_to(ROOT).as_posix())
      )
    ):
      broken.append(target)
  assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_anchors_are_equal_on_github_and_on_the_site(page):
  """MkDocs folds runs of dashes, GitHub does not: headings must not make any."""
  assert not [anchor for anchor in anchors(page) if "--" in anchor]


def test_every_page_is_in_the_navigation():
  def pages(entry):
    if isinstance(entry, str):
      yield entry
    for item in (
      entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
    ):
      yield from pages(item)

  named = set(pages(yaml.safe_load(read("mkdocs.yml"))["nav"])) - {"api/"}
  assert named == {p.removeprefix("docs/") for p in PAGES if p.startswith("docs/")}


@pytest.mark.parametrize("page", [page for page in PAGES if page != EXTENDED])
def test_commands_parse(page):
  """Commands, flags and config keys exist, except where the page shows the error."""
  known = discover()
  for command in commands(page):
    argv = arguments(command.text)
    if not argv or "jaxgpt: error" in command.output:
      continue
    if " ".join(argv[:2]) in known:
      argv[:2] = [" ".join(argv[:2])]
    args, overrides = main.make_parser(known, argv).parse_known_args(argv)
    assert all(a.startswith(("--config.", "--noconfig.")) for a in overrides), overrides
    if overrides:
      file = ROOT / args.config.partition(":")[0]
      # A config that a page defines itself gets its overrides checked on another one.
      config.load(file if file.exists() else ROOT / "configs/char_level.py", overrides)


@pytest.mark.parametrize("page", PAGES)
def test_config_keys_in_the_text_exist(page):
  known = set(config.flatten(config.base()))
  known |= {key.rpartition(".")[0] for key in known} | {f"{s}.options" for s in SECTIONS}
  names = re.findall(r"`(?:--config\.)?([a-z_]+(?:\.[a-z0-9_]+)+)(?:=[^`\n]*)?`", prose(page))
  keys = {n for n in names if n.split(".")[0] in SECTIONS and not n.endswith(NO_KEYS)}
  keys = {n for n in keys if ".options." not in n}  # users name these
  assert keys <= known


@pytest.mark.parametrize("page", PAGES)
def test_files_in_the_text_exist(page):
  paths = re.findall(r"`((?:jaxgpt|tests|configs|launch|docs)/[\w./-]*)(?::\w+)?`", prose(page))
  assert not [p for p in paths if not (ROOT / p).exists()]


def test_the_family_that_the_page_of_models_shows_is_that_of_the_package():
  text = read("docs/models.md").partition("## Add a family")[2]
  family, preset, sizes = re.findall(r"```python\n(.*?)```", text, re.S)[:3]
  families, presets = (
    (ROOT / "jaxgpt" / name).read_text() for name in ("hf/families.py", "config/presets.py")
  )
  parsed = lambda code: [ast.dump(node) for node in ast.parse(code).body]
  assert parsed(family)[0] in parsed(families) and parsed(preset)[0] in parsed(presets)
  assert sizes in presets


@pytest.mark.parametrize("page", PAGES)
def test_no_output_is_left_to_fill_in(page):
  assert not re.search(r"@@(?!TEXT)", read(page))
