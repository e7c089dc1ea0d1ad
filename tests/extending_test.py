"""Every section of docs/extending.md works as printed.

A section is the text under a `## ` heading. Its fenced blocks are run in a folder of its own:

- python with title="FILE": FILE in the user's folder, or, under jaxgpt/, a new file of a copy of
  the package. With title="FILE (append)" the block is appended to FILE of the copy.
- console: each line "$ COMMAND" is run, and the lines after it must be lines of its output in this
  order. "…" matches any text within a line, and a line "..." any lines. `jaxgpt` runs the copy.
  DATA stands for a prepared folder.

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

ROOT = pathlib.Path(__file__).parents[1]
SHARED = "Your own files"  # its files are in the folders of all sections
WITHOUT_CODE = {SHARED, "Add your object to the package", "Inside the package"}
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
  for block in blocks:
    if not block.title:
      continue
    name, _, append = block.title.partition(" ")
    path = folder / name
    if name.startswith("jaxgpt/") and not (folder / "jaxgpt").exists():
      ignore = shutil.ignore_patterns("__pycache__")
      shutil.copytree(ROOT / "jaxgpt", folder / "jaxgpt", ignore=ignore)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert path.exists() == bool(append), f"{block.title}: only existing files can be appended to"
    with path.open("a") as f:
      f.write(("\n\n" if append else "") + block.text)


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
  words = re.sub(r"\bDATA\b", str(data), command)
  words = re.sub(r"^jaxgpt\b", f"{sys.executable} -m jaxgpt", words)
  env = os.environ | {
    "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    "COLUMNS": "200",
  }
  env.pop("XLA_FLAGS", None)
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


@pytest.mark.parametrize("heading", [h for h in SECTIONS if h not in WITHOUT_CODE])
def test_the_example_works(heading, tmp_path, corpus):
  write(tmp_path, [*SECTIONS[SHARED], *SECTIONS[heading]])
  for command, expected in commands(SECTIONS[heading]):
    output = run(command, tmp_path, corpus)
    lines = iter(output.splitlines())
    for line in expected:
      pattern = re.escape(line).replace("…", ".*")
      found = any(re.fullmatch(pattern, one.strip()) for one in lines)
      assert found, f"{command}\nexpected: {line}\nin:\n{output}"
