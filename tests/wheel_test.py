"""A wheel built from the tree works in an empty folder, without the checkout."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_wheel('wheel')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """The unpacked wheel, built from a copy of the tree."""
  folder = tmp_path_factory.mktemp("wheel")
  tree = folder / "tree"
  ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "runs")
  for name in ("jaxgpt", "configs"):
    shutil.copytree(ROOT / name, tree / name, ignore=ignore)
  for path in (*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.in"), *ROOT.glob("*.md")):
    shutil.copy(path, tree)
  shutil.copy(ROOT / "LICENSE", tree)
  done = subprocess.run([sys.executable, "-c", BUILD], cwd=tree, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  (path,) = (tree / "wheel").glob("jaxgpt-*.whl")
  zipfile.ZipFile(path).extractall(folder / "unpacked")
  return folder / "unpacked"


@pytest.fixture
def environment(wheel, tmp_path) -> dict:
  """Arguments of `subprocess` for an empty folder in which `jaxgpt` is the wheel's."""
  (tmp_path / "empty").mkdir()
  return dict(cwd=tmp_path / "empty", env=os.environ | {"PYTHONPATH": str(wheel)}, text=True)


def test_help_comes_from_the_wheel(wheel, environment):
  code = "import jaxgpt; print(jaxgpt.__file__); from jaxgpt.commands.main import main; main()"
  done = subprocess.run(
    [sys.executable, "-c", code, "--help"], capture_output=True, check=True, **environment
  )
  assert done.stdout.startswith(str(wheel)) and "usage: jaxgpt" in done.stdout


def test_the_wheel_has_the_licence_the_page_and_the_marker_of_types(wheel):
  assert (wheel / "jaxgpt" / "py.typed").exists()
  assert (wheel / "jaxgpt" / "inference" / "server" / "page.html").exists()
  assert (wheel / "jaxgpt" / "analysis" / "interpret" / "page.html").exists()
  assert list(wheel.glob("jaxgpt-*.dist-info/**/LICENSE"))
  metadata = next(wheel.glob("jaxgpt-*.dist-info")) / "METADATA"
  assert "License-Expression: Apache-2.0" in metadata.read_text()


def test_the_demo_starts_training_in_an_empty_folder(environment, corpus):
  """With a prepared folder in its place, so that the test does not wait for the tokenizer."""
  shutil.copytree(corpus, environment["cwd"] / "demo" / "data")
  demo = subprocess.Popen(
    [sys.executable, "-m", "jaxgpt", "demo", "--dir=demo"],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    **environment,
  )
  lines = []
  for line in demo.stdout:
    lines.append(line)
    if line.startswith("starts at step 0 "):  # model and data are there; compiling takes long
      demo.send_signal(signal.SIGINT)
      break
  rest, _ = demo.communicate(timeout=300)
  assert demo.returncode == 128 + signal.SIGINT, "".join(lines) + rest
  assert (environment["cwd"] / "demo" / "run" / "config.json").exists()
