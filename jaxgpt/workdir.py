"""The run folder: what is written before step 0, and what a continuation is checked against.

RUN/config.json    the resolved config, and where each value came from
RUN/starts.jsonl   one line for each start: versions, git state, devices, mesh, data digest, command
RUN/tokenizer/     a copy of the data's tokenizer
RUN/metrics.jsonl  see `writers`
RUN/checkpoints/   see `checkpoint`
"""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time

import jax
from etils import epath

from jaxgpt import config
from jaxgpt.errors import UserError

CHECKPOINTS = "checkpoints"
_CONFIG = "config.json"
_STARTS = "starts.jsonl"
_TOKENIZER = "tokenizer"
_PACKAGES = ("jaxgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
             "array-record", "sentencepiece", "ml-collections", "numpy")


def enter(folder, c, origin, mesh, data_digest, tokenizer):
  """Makes a run folder, or checks that the one there is this run's; records the start.

  Args:
    folder: where.
    c: the resolved config.
    origin: {flat key: where its value came from}, see `config.load`.
    mesh: the device mesh.
    data_digest: of the data's manifest.
    tokenizer: what is saved beside the config.

  Raises:
    UserError: the folder can't be written, or holds a run of another config or other data.
  """
  folder = epath.Path(folder)
  if (folder / _CONFIG).exists():
    _check(folder, c, data_digest)
  elif folder.exists() and any(folder.iterdir()):
    raise UserError(f"--workdir={folder} is not empty and holds no run ({_CONFIG} is missing); "
                    "choose a new folder")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _CONFIG).exists():
      tokenizer.save(folder / _TOKENIZER)
      text = json.dumps({"config": json.loads(c.to_json()), "origin": origin}, indent=2)
      _write_whole(folder / _CONFIG, text + "\n")
    starts = folder / _STARTS
    before = starts.read_text() if starts.exists() else ""
    _write_whole(starts, before + json.dumps(_start(mesh, data_digest)) + "\n")
  except OSError as e:
    raise UserError(f"--workdir={folder} can't be written ({e.strerror or e}); "
                    "choose another folder or change its permissions") from e


def _write_whole(path, text):
  """Writes a file so that a kill leaves the old one or the new one."""
  part = path.with_name(path.name + ".part")
  part.write_text(text)
  part.replace(path)


def _check(folder, c, data_digest):
  old = read_config(folder)
  changed = config.difference(old, c)
  if changed:
    lines = "; ".join(f"{key} was {a!r}, is {b!r}" for key, a, b in changed[:5])
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    raise UserError(f"--workdir={folder} holds a run of another config: {lines}{more}; give the "
                    "old values to go on with it, or another --workdir to start anew")
  starts = read_starts(folder)
  if starts and starts[0]["data_digest"] != data_digest:
    raise UserError(f"--workdir={folder} holds a run on other data: its manifest's digest was "
                    f"{starts[0]['data_digest'][:12]}, that of data.path={c.data.path!r} is "
                    f"{data_digest[:12]}; point data.path at the old data or choose another "
                    "--workdir")


def _start(mesh, data_digest):
  device = mesh.devices.flat[0]
  return {
      "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      "command": sys.argv,
      "python": platform.python_version(),
      "packages": {name: _version(name) for name in _PACKAGES},
      "git": _git(),
      "device_kind": device.device_kind,
      "platform": device.platform,
      "processes": jax.process_count(),
      "mesh": dict(mesh.shape),
      "data_digest": data_digest,
  }


def _version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _git():
  """{'commit', 'dirty'} of the checkout that this package runs from, or None outside of one."""
  here = epath.Path(__file__).parent
  def git(*args):
    return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True,
                          check=True, timeout=10).stdout.strip()
  try:
    if git("ls-files", "--error-unmatch", __file__):
      return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
  except (OSError, subprocess.SubprocessError):
    pass  # no git, no checkout, or an installed package inside someone else's
  return None


def read_config(folder):
  """The resolved config of a run.

  Raises:
    UserError: the folder holds no run, or its config.json is broken.
  """
  path = epath.Path(folder) / _CONFIG
  if not path.exists():
    raise UserError(f"--workdir={folder} holds no run ({_CONFIG} is missing); "
                    'start one with "jaxgpt train"')
  try:
    tree = json.loads(path.read_text())["config"]
  except (ValueError, KeyError) as e:
    raise UserError(f"{path} is broken ({e}); restore it, or start anew in another folder") from e
  return config.resolve(config.from_dict(tree))


def read_starts(folder):
  """The records of all starts of a run, oldest first."""
  path = epath.Path(folder) / _STARTS
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tokenizer_folder(folder):
  """Where a run keeps its tokenizer."""
  return epath.Path(folder) / _TOKENIZER
