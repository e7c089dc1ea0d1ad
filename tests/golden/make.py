"""Makes the golden files with the code before the packages of docs/design.md (commit c4567cf).

  git worktree add ../before c4567cf
  PYTHONPATH=../before:tests/golden python tests/golden/make.py FOLDER

FOLDER becomes a working folder; the files to keep are written next to this one. The script is
kept as the record of how they were made: the code of today must not make them again.
"""

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import tarfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (  # as in tests/xla_flags.py for JAXGPT_TEST_GOLDEN=1
  "--xla_force_host_platform_device_count=8 "
  "--xla_cpu_collective_call_terminate_timeout_seconds=600 "
  "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
)

import cases
import jaxgpt
from jaxgpt import cli, config, loop
from jaxgpt.text import prepare


def main(folder: pathlib.Path) -> None:
  """Makes everything, in `folder`."""
  (folder / "data").mkdir(parents=True)
  shutil.copy(cases.HERE / "tiny.py", folder)
  shutil.copytree(pathlib.Path(jaxgpt.__file__).parents[1] / "configs", folder / "configs")
  os.chdir(folder)
  cases.write_inputs(pathlib.Path("data"))
  found = {"identity": cases.identity(), "batches": {}, "runs": {}, "configs": {}}
  for name in cases.DATA:
    command(cases.data_command(name))
    found["batches"][name] = cases.batches(config.base(), f"data/{name}", loop.split_batches)
  found["job"] = stopped_job()
  pack("data", "data")
  for name in cases.RUNS:
    command(cases.run_command(name))
    found["runs"][name] = cases.numbers(pathlib.Path("runs", name))
    shutil.rmtree(pathlib.Path("runs", name))
    command(cases.run_command(name), stop=cases.STOP)
    pack(f"run_{name}", f"runs/{name}")
  found["generated"] = generated()
  for name in cases.CONFIGS:
    command(cases.config_command(name))
    found["configs"][name] = cases.numbers(pathlib.Path("configs_runs", name[:8]))
  (cases.HERE / "golden.json").write_text(json.dumps(found, indent=1) + "\n")


def command(argv: list[str], stop: int | None = None) -> None:
  """Runs a command of jaxgpt, which `stop` ends at a step as a preempted machine would."""
  sys.argv = ["jaxgpt", *argv]
  original, count = loop.to_devices, 0

  def counting(batch, mesh):
    nonlocal count
    count += 1
    if count == stop:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(batch, mesh)

  loop.to_devices = counting
  code = cli.main(argv)
  loop.to_devices = original
  assert code == (128 + signal.SIGTERM if stop else 0), code


def generated() -> str:
  """The text that `generate` prints for the stopped run `adamw`."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    assert cli.main(cases.GENERATE) == 0
  return out.getvalue()


def stopped_job() -> str:
  """Leaves a job stopped after its stage `tokenizer`. Returns the digest of the undisturbed one."""
  command(
    [arg.replace("--out=data/job", "--out=data/whole") for arg in cases.data_command(cases.JOB)]
  )

  def report(line):
    if line.startswith("tokenizer:"):
      raise KeyboardInterrupt

  original = prepare.prepare
  prepare.prepare = lambda *args, **kw: original(*args, **(kw | {"report": report}))
  assert cli.main(cases.data_command(cases.JOB)) == 130
  prepare.prepare = original
  return json.loads(pathlib.Path("data", "whole", "manifest.json").read_text())["digest"]


def pack(name: str, path: str) -> None:
  """Packs a folder into an archive without owners; times stay, since a job checks them."""

  for note in pathlib.Path(path).rglob("commit_success.txt"):  # Orbax writes its absolute path
    note.write_text(note.read_text().replace(f"{os.getcwd()}/", ""))

  def plain(info):
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info

  with tarfile.open(cases.HERE / f"{name}.tar.xz", "w:xz") as tar:
    tar.add(path, filter=plain)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
