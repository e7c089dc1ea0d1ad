"""The commands of the documentation run as printed, and print the lines that the pages show.

Pages that build on one another run in one copy of the checkout, each in one shell, as a user types
them. Where a page shows an error, the exit code must be 2. The lines of an output must appear in
this order, with other numbers: "…" stands for any text. Texts that a model generates and samples
of the corpus are not compared.
"""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.docs_test import ROOT, Command, commands

# Pages in the order in which a reader runs them: a later page uses folders of the earlier ones.
# `.ci/run` runs the first two. `make test-all` runs all of them, which takes half an hour.
SEQUENCES = {
  "README": ("README.md",),
  "quickstart": ("docs/quickstart.md",),
  "after the quickstart": (
    "docs/quickstart.md",
    "docs/adapt.md",
    "docs/launch.md",
    "docs/reliability.md",
    "docs/scale.md",
  ),
  "models": ("docs/finetune.md", "docs/models.md"),
  "data": ("docs/data.md", "docs/cleaning.md", "docs/mixtures.md", "docs/streams.md"),
  "objectives": ("docs/objectives.md",),
  "reproducibility": ("docs/quickstart.md", "docs/reproducibility.md"),
  "evaluation": ("docs/evaluation.md",),
  "compress": ("docs/compress.md",),
  "report": ("docs/report.md",),
  "sweeps": ("docs/sweeps.md",),
  "interpret": ("docs/interpret.md",),
  "tasks": ("docs/tasks.md",),
  "inference": ("docs/inference.md",),
  "memory": ("docs/memory.md",),
  "buckets": ("docs/buckets.md",),
  "plan": ("docs/plan.md", "docs/plan-budgets.md", "docs/compile-ahead.md"),
}
NEEDS = {"plan": "libtpu", "buckets": "moto", "models": "transformers", "inference": "openai"}
# Commands without which a page's own have nothing to start from.
BEFORE = {"inference": "jaxgpt demo", "interpret": "jaxgpt demo"}
# Beginnings of commands that print samples of the corpus or of a trained model, and their indent.
SAMPLES = {
  "jaxgpt checkpoint diff ": "opt/",
  "jaxgpt data ": "  ",
  "jaxgpt features ": "    ",
  "jaxgpt prune ": "  layer ",  # two layers may change places from version to version
  "jaxgpt replay ": ("  jaxgpt/", "  docs/"),
}
# Beginnings of commands that are not run, and why.
NOT_RUN = {
  "make demo": "trains for five minutes",
  ". .venv/bin/activate": "the test's Python stands in",
  "pip install": "CI installs it",
  "kubectl ": "needs a Kubernetes cluster",
  "sky ": "needs SkyPilot and a cloud",
  "jaxgpt data '/shared/": "needs a Slurm cluster",
  "RAY_ADDRESS=": "needs a Ray cluster",
  "python -m pytest": "a test of its own",
  "jaxgpt plan --config=configs/llama3_8b.py --topology=h100": "needs NVIDIA's libraries, 4.4 GB",
}
# A digest, or a number with its sign.
_NUMBER = re.compile(r"\b(?=\w*\d)[0-9a-f]{12}\b|(?:(?<!\w)[-+])?\d[\d,.]*(?:e[-+]?\d+)?")
# Printed only after a Ctrl-C, which the pages show in blocks of their own that are not run.
_AFTER_AN_INTERRUPT = "resumes at step"


class Done(NamedTuple):
  """A command that has run: its exit code, and its stdout and stderr as one text."""

  exit_code: int
  output: str


class Shell:
  """A bash process with job control, in which commands run one after another."""

  def __init__(self, folder: pathlib.Path, env: dict[str, str]):
    self._mark = "end of command"
    self._process = subprocess.Popen(
      ["bash", "--norc", "--noprofile"],
      cwd=folder,
      env=env,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      errors="backslashreplace",
    )
    self._write("set -m")

  def _write(self, text: str) -> None:
    self._process.stdin.write(text + "\n")
    self._process.stdin.flush()

  def run(self, text: str) -> Done:
    self._write(f"{text}\nprintf '\\n%s %d\\n' '{self._mark}' $?")
    lines = []
    for line in self._process.stdout:
      if line.startswith(self._mark):
        return Done(int(line.split()[-1]), "".join(lines))
      lines.append(line)
    raise AssertionError(f"the shell ended in {text!r}: {''.join(lines)[-2000:]}")

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait(timeout=60)


def pattern(line: str) -> re.Pattern:
  """A printed line as a regular expression: any numbers, any text for "…", any spaces."""
  words = [re.escape(word) for word in _NUMBER.sub("\0", line).split()]
  text = r"\s+".join(words).replace("\0", r"[\da-f,.e+-]+").replace("…", ".*")
  return re.compile(r"\s*" + text + r"\s*")


def missing(command: Command, done: Done) -> list[str]:
  """Lines of a page that do not appear in the command's output, in this order."""
  if " generate " in command.text:
    return []
  # Samples of the corpus change with every version.
  samples = next((x for start, x in SAMPLES.items() if command.text.startswith(start)), None)
  got = iter(done.output.replace("\r", "\n").splitlines())
  out = []
  for line in command.output.splitlines():
    if line.strip() in ("", "…") or (samples and line.startswith(samples)):
      continue
    if line.startswith(_AFTER_AN_INTERRUPT):
      continue
    want = pattern(line)
    if not any(want.fullmatch(other) for other in got):
      out.append(line)
      got = iter(done.output.replace("\r", "\n").splitlines())
  return out


def environment(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, str]]:
  """A copy of the checkout, and variables with which `jaxgpt` and `python` run it."""
  copy = folder / "checkout"
  ignored = shutil.ignore_patterns(".*", "runs", "build", "__pycache__", "*.egg-info")
  shutil.copytree(ROOT, copy, ignore=ignored)
  programs = folder / "bin"
  programs.mkdir()
  for name, module in {"jaxgpt": "-m jaxgpt", "python": "", "python3": ""}.items():
    shim = programs / name
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
    shim.chmod(0o755)
  path = f"{programs}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  env = os.environ | {"PATH": path, "PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}
  env.pop("XLA_FLAGS", None)
  if importlib.util.find_spec("libtpu") is None:  # else JAX would wait for a TPU
    env.pop("JAX_PLATFORMS")
  return copy, env


@pytest.mark.slow
@pytest.mark.parametrize("name", SEQUENCES)
def test_commands_run_as_printed(name, tmp_path):
  if name in NEEDS:
    pytest.importorskip(NEEDS[name])
  copy, env = environment(tmp_path)
  wrong = []
  if name in BEFORE:
    shell = Shell(copy, env)
    done = shell.run(BEFORE[name])
    assert done.exit_code == 0, done.output[-2000:]
    shell.close()
  for page in SEQUENCES[name]:
    shell = Shell(copy, env)
    for command in commands(page):
      if command.text.startswith(tuple(NOT_RUN)):
        continue
      done = shell.run(command.text)
      shows_error = "jaxgpt: error" in command.output
      fails = shows_error or "DOES NOT FIT" in command.output
      if (done.exit_code != 0) != fails or (shows_error and done.exit_code != 2):
        wrong.append(f"{page}: $ {command.text}\nexit code {done.exit_code}\n{done.output[-2000:]}")
      elif lines := missing(command, done):
        shown = "\n".join(lines)
        wrong.append(
          f"{page}: $ {command.text}\nnot printed:\n{shown}\nbut:\n{done.output[-3000:]}"
        )
    shell.close()
  assert not wrong, "\n\n".join(wrong)


def test_every_page_with_commands_is_run():
  run = {page for pages in SEQUENCES.values() for page in pages} | {"docs/extending.md"}
  pages = sorted(
    p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
  )
  assert not [page for page in pages if list(commands(page)) and page not in run]


def test_numbers_may_differ_and_words_may_not():
  line = "train      step 10/60  loss 5.6143  tokens/s 1,118  ETA 4:48"
  assert pattern(line).fullmatch("train      step 2/60  loss 5.1  tokens/s 9 ETA 12:01")
  assert not pattern(line).fullmatch("train      step 2/60  loss 5.1  tokens/s 9 ETA soon")
  assert pattern("digest 0dc01394238d").fullmatch("digest ad3bbfbdab71")
  assert not pattern("digest abc").fullmatch("digest abd")
  assert pattern("wrote … (1 file)").fullmatch("wrote some/folder (12 file)")
  command = Command("page", "jaxgpt x", "one 1\n…\nthree")
  assert missing(command, Done(0, "one 2\ntwo\nthree\n")) == []
  assert missing(command, Done(0, "three\none 2\n")) == ["three"]
