"""The demo: from text to samples, on the text that every Python installation has.

It calls the same functions as `jaxgpt data`, `train`, `evaluate` and `generate`, and prints the
command of each step.
"""

import gzip
import lzma
import os
import pathlib
import sysconfig
import time
from collections.abc import Sequence

from etils import epath
from rich import console, table

from jaxgpt import config
from jaxgpt.data import source
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.sampler import Sampler
from jaxgpt.text.prepare import prepare, shards
from jaxgpt.training import evaluation, loop

_PACKAGE = pathlib.Path(__file__).parents[2]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # of a wheel, of a checkout
_PROMPTS = ("def read_config(path):\n", "class TestCase", "import ")
_TOKENIZER = "sentencepiece:4096"
# Tests, and third-party packages that were installed into the same folder. Which of them there are
# differs by installation.
_NOT_LIBRARY = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


def main(folder: epath.PathLike, out: console.Console | None = None) -> int:
  """Prepares the text, trains, evaluates, samples and prints a summary.

  A second call with the same folder continues where the first one stopped.

  Args:
    folder: Folder for the data and the run.
    out: Where to print. Default: the terminal.

  Returns:
    The exit code.
  """
  out = out or console.Console(highlight=False, soft_wrap=True)
  folder, start = epath.Path(folder), time.monotonic()
  data, run_folder = folder / "data", folder / "run"
  stdlib = sysconfig.get_paths()["stdlib"]
  exclude = excluded(stdlib)
  _heading(
    out,
    "text to tokens",
    f"jaxgpt data {stdlib} --out={data} --tokenizer={_TOKENIZER} "
    + " ".join(f"--exclude={name}" for name in exclude),
  )
  _prepare(stdlib, exclude, data, out)

  overrides, path = [f"--config.data.path={data}"], config_path()
  _heading(out, "training", f"jaxgpt train --config={path} {overrides[0]} --workdir={run_folder}")
  c, origin = config.load(path, overrides)
  stopped = loop.train(c, run_folder, origin).stopped
  if stopped:
    out.print(f"stopped by {stopped.name}; run the same command to resume")
    return 128 + stopped

  _heading(out, "evaluation", f"jaxgpt evaluate --workdir={run_folder} --split=test")
  run = load.load(run_folder)
  result = load.evaluate_run(run, "test")
  _heading(out, "samples", f"jaxgpt generate --workdir={run_folder} --prompt={_PROMPTS[0]!r}")
  sampler = Sampler(run)
  for prompt in _PROMPTS:
    (text,) = sampler(prompt, max_new=80, sampling=load.Sampling(temperature=0.7, top_p=0.95))
    out.print(f"[bold]{prompt}[/]", end="")
    out.print(text, markup=False)
    out.print("[dim]…[/]")
  _summary(out, folder, result, held_out_text(run), time.monotonic() - start)
  return 0


def config_path() -> pathlib.Path:
  """The demo's config file: 'configs/demo.py' in a checkout, else an absolute path."""
  found = next(folder / "demo.py" for folder in _FOLDERS if (folder / "demo.py").is_file())
  nearby = pathlib.Path("configs/demo.py")
  return nearby if nearby.is_file() and nearby.samefile(found) else found


def _heading(out: console.Console, title: str, command: str) -> None:
  out.rule(f"[bold]{title}")
  out.print(f"$ {command}", style="dim", markup=False)


def excluded(stdlib: str) -> list[str]:
  """The folders of `_NOT_LIBRARY` that a standard library has. `jaxgpt data` refuses others."""
  found = set()
  for _, folders, _ in os.walk(stdlib):
    here = set(folders) & set(_NOT_LIBRARY)
    found |= here
    folders[:] = [name for name in folders if name not in here]
  return [name for name in _NOT_LIBRARY if name in found]


def _prepare(stdlib: str, exclude: Sequence[str], data: epath.Path, out: console.Console) -> None:
  if (data / shards.MANIFEST).exists():
    out.print(f"{data} is there already")
    return
  try:
    prepare.prepare(
      [stdlib],
      data,
      tokenizer=_TOKENIZER,
      exclude=exclude,
      report=lambda line: out.print(line, markup=False),
    )
  except UserError as e:
    raise UserError(
      f"{e} (the demo reads the .py files of Python's standard library in {stdlib}; "
      "where a distribution leaves them out, install its full Python package)"
    ) from e


def held_out_text(run: load.Run) -> bytes:
  """The text of the test split in one piece: the tokens that `evaluate` saw, decoded."""
  split = source.open_split(run.c.data.path, "test")
  ids = (split.read(i, 0, int(n) + 1) for i, n in enumerate(split.lengths))
  return "".join(run.tokenizer.decode(x) for x in ids).encode()


def _summary(
  out: console.Console,
  folder: epath.Path,
  result: evaluation.Result,
  text: bytes,
  seconds: float,
) -> None:
  out.rule("[bold]summary")
  rows = [
    ("jaxgpt, this model", result["bits_per_byte"]),
    ("gzip -9", 8 * len(gzip.compress(text, 9)) / len(text)),
    ("xz -9", 8 * len(lzma.compress(text, preset=9)) / len(text)),
  ]
  grid = table.Table("", "bits per byte", title=f"{len(text):,} held-out bytes")
  for name, value in sorted(rows, key=lambda row: row[1]):
    grid.add_row(name, f"{value:.3f}")
  out.print(grid)
  out.print(
    f"data: {folder}/data   run, checkpoints, metrics: {folder}/run\n"
    f"{seconds / 60:.1f} minutes in all. Next: docs/quickstart.md, or\n"
    f"  jaxgpt generate --workdir={folder}/run --prompt='def main():' --samples=3",
    markup=False,
  )
