"""Tuned lenses on disk, each with the weights that it was trained for.

RUN/tuned_lens/STEP.npz   a [L, D, D] and b [L, D] of `tuned_lens.Translators`, and `about`: JSON
                          with the step and a digest of the weights
"""

import hashlib
import io
import json
import zipfile
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxgpt.analysis.interpret.tuned_lens import Translators
from jaxgpt.errors import UserError, first_line
from jaxgpt.inference.load import Run
from jaxgpt.run import digests
from jaxgpt.storage import atomic, strict_json

FOLDER = "tuned_lens"


class Found(NamedTuple):
  """A tuned lens for a run.

  Attributes:
    path: Its file.
    translators: Its maps.
  """

  path: epath.Path
  translators: Translators


def path_of(workdir: epath.PathLike, step: int) -> epath.Path:
  """Where the lens of a run's checkpoint is kept."""
  return epath.Path(workdir) / FOLDER / f"{step}.npz"


def write(path: epath.PathLike, translators: Translators, run: Run) -> None:
  """Writes a lens.

  Args:
    path: The file. The folder above it is made.
    translators: From `tuned_lens.fit`.
    run: The run that it was trained on, with its weights.

  Raises:
    UserError: The file cannot be written.
  """
  path, out = epath.Path(path), io.BytesIO()
  about = strict_json.dumps({"step": run.step, "weights": digest_of(run)})
  np.savez(out, a=np.asarray(translators.a), b=np.asarray(translators.b), about=np.asarray(about))
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, out.getvalue())
  except OSError as e:
    raise UserError(f"--out={path} can't be written ({first_line(e)}); name another file") from e


def read(path: epath.PathLike, run: Run, workdir: epath.PathLike) -> Found:
  """Reads a lens, and checks that it was trained for a run's weights.

  Args:
    path: The file.
    run: The run, with its weights.
    workdir: Its folder, for messages.

  Raises:
    UserError: It is no lens, or one of another checkpoint.
  """
  again = f"train one with “jaxgpt lens --workdir={workdir} --step={run.step}”"
  if run.c.model.head != "lm":
    raise UserError(
      f"{path}: the tuned lens is for models that predict tokens, and this one has "
      f"model.head={run.c.model.head!r}; leave --lens out"
    )
  path = epath.Path(path)
  try:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    maps = Translators(jnp.asarray(arrays["a"]), jnp.asarray(arrays["b"]))
    about = json.loads(str(arrays["about"])) if "about" in arrays else None
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
    raise UserError(f"{path} can't be read as a tuned lens ({first_line(e)}); {again}") from e
  if about is None:
    raise UserError(f"{path} does not say which weights it was trained for; {again}")
  if about["weights"] != (own := digest_of(run)):
    raise UserError(
      f"{path} was trained for other weights: step {about['step']}, digest "
      f"{about['weights'][:12]}; those of step {run.step} of {workdir} have {own[:12]}. To have "
      f"one for them, {again}"
    )
  return Found(path, maps)


def find(workdir: epath.PathLike, run: Run) -> tuple[Found | None, str]:
  """The lens in the folder of a run, and a note on one of other steps.

  Args:
    workdir: The run folder.
    run: The run, with its weights.

  Returns:
    (the lens of the run's step or None, the note or '').

  Raises:
    UserError: See `read`.
  """
  path = path_of(workdir, run.step)
  if path.exists():
    return read(path, run, workdir), ""
  if not path.parent.is_dir():
    return None, ""
  steps = sorted(int(p.stem) for p in path.parent.glob("*.npz") if p.stem.isdecimal())
  if not steps:
    return None, ""
  there = ", ".join(map(str, steps))
  return None, f"no tuned lens for step {run.step}: {path.parent} has one of step {there}"


def digest_of(run: Run) -> str:
  """A digest of a run's weights, in hexadecimal."""
  copied = digests.on_host(run.params)
  found = digests.text(copied, [digests.sums(copied)])
  return hashlib.sha256(strict_json.dumps(found, sort_keys=True).encode()).hexdigest()
