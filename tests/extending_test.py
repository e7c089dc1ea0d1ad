"""Every section of docs/extending.md works as printed.

A section is the text under a `## ` heading. Its fenced blocks are run in a folder of its own:

- python with title="FILE": FILE in the user's folder, or, under jaxgpt/ and tests/, a new file of a
  copy of the package and its tests. With title="FILE (append)" the block is appended to FILE of the
  copy.
- diff with title="FILE": lines of FILE of the copy, with "+" before those to add.
- console: each line "$ COMMAND" is run, and the lines after it must be lines of its output in this
  order. "…" matches any text within a line, and a line "..." any lines. `jaxgpt` and the tests run
  the copy. DATA_DIR stands for a prepared folder.

Files of the section "Your own files" are there for all sections.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
SHARED = "Your own files"  # its files are in the folders of all sections
WITHOUT_CODE = {SHARED, "Inside the package"}
SLOW = {
  "A model family",
  "Move your object into the package",
  "An optimizer",
  "A schedule",
  "An objective",
  "A batch source",
  "A metric writer",
  "A data format",
  "A cleaning step",
}
COPIED = ("jaxgpt", "tests", "pyproject.toml")  # what a section changes or runs
_FENCE = re.compile(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
  """A fenced block of the page."""

  language: str
  title: str
  text: str


def sections() -> dict[str, list[Block]]:
  """{heading: its fenced blocks}."""
  page = (ROOT / "docs/extending.md").read_text()
  parts = re.split(r"^## (.+)$", page, flags=re.M)
  return {
    heading: [Block(*match) for match in _FENCE.findall(text)]
    for heading, text in zip(parts[1::2], parts[2::2])
  }


SECTIONS = sections()


def write(folder: pathlib.Path, blocks: list[Block]) -> None:
  """Writes the files of a section; copies the package first if a file belongs to it."""
  titled = [block for block in blocks if block.title]
  if any(block.title.startswith(COPIED) for block in titled):
    ignore = shutil.ignore_patterns("__pycache__", "golden")
    for name in COPIED:
      copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
      copy(ROOT / name, folder / name, **({"ignore": ignore} if copy is shutil.copytree else {}))
  for block in titled:
    name, _, append = block.title.partition(" ")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if block.language == "diff":
      path.write_text(patched(path.read_text(), block))
      continue
    assert path.exists() == bool(append), f"{block.title}: only existing files can be appended to"
    with path.open("a") as f:
      f.write(("\n\n" if append else "") + block.text)


def patched(text: str, block: Block) -> str:
  """A file's text with the lines that a diff adds."""
  lines = block.text.splitlines(keepends=True)
  before = "".join(line[1:] for line in lines if line[0] == " ")
  after = "".join(line[1:] for line in lines)
  assert {line[0] for line in lines} == {" ", "+"} and text.count(before) == 1, (
    f"{block.title} does not have these lines once:\n{before}"
  )
  return text.replace(before, after)


def commands(blocks: list[Block]) -> list[tuple[str, list[str]]]:
  """[(command, lines that must appear in its output)]."""
  out: list[tuple[str, list[str]]] = []
  for block in blocks:
    if block.language == "console":
      for line in block.text.splitlines():
        if line.startswith("$ "):
          out.append((line[2:], []))
        elif line.strip() not in ("", "..."):
          out[-1][1].append(line.strip())
  return out


def run(command: str, folder: pathlib.Path, data: pathlib.Path) -> str:
  """The output of a command in a folder, whose `jaxgpt` comes first."""
  words = command.replace("DATA_DIR", str(data))
  words = re.sub(r"^jaxgpt\b", "python -m jaxgpt", words)
  words = re.sub(r"^python\b", sys.executable, words)
  env = os.environ | {
    "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": xla_flags.COMPILE_QUICKLY,
    "COLUMNS": "200",
  }
  done = subprocess.run(
    words, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=600
  )
  text = done.stdout + done.stderr
  assert done.returncode == 0, f"{command}\n{text}"
  return text


def test_sections_have_commands():
  assert len(SECTIONS) > 4
  for heading, blocks in SECTIONS.items():
    assert commands(blocks) or heading in WITHOUT_CODE, f"{heading}: no command shows that it works"


# Those that take longest are run by .ci/run.
@pytest.mark.parametrize(
  "heading",
  [
    pytest.param(h, marks=pytest.mark.slow if h in SLOW else ())
    for h in SECTIONS
    if h not in WITHOUT_CODE
  ],
)
def test_the_example_works(heading, tmp_path, corpus):
  write(tmp_path, [*SECTIONS[SHARED], *SECTIONS[heading]])
  for command, expected in commands(SECTIONS[heading]):
    output = run(command, tmp_path, corpus)
    lines = iter(output.splitlines())
    for line in expected:
      pattern = re.escape(line).replace("…", ".*")
      found = any(re.fullmatch(pattern, one.strip()) for one in lines)
      assert found, f"{command}\nexpected: {line}\nin:\n{output}"


def test_tests_that_the_page_names_exist():
  page = (ROOT / "docs/extending.md").read_text()
  named = re.findall(r"`(test_\w+)` in `(tests/[\w/]+\.py)`", page)
  assert len(named) > 5
  for test, file in named:
    assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
