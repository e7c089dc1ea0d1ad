"""Going back to an earlier step of a run. Later checkpoints and metrics are kept next to it."""

import time

from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.run import best, metric_writers, run_folder, run_lock
from jaxgpt.run.provenance import saved as saved_lib
from jaxgpt.run.provenance import seal
from jaxgpt.storage import atomic

FOLDER = "set_aside"


def restore_to(folder: epath.PathLike, step: int) -> list[str]:
  """Takes a run back to a checkpoint: the next start goes on from there.

  What is later moves to RUN/set_aside/TIME: the checkpoints, the best one if it is later, and a
  copy of the whole metrics.jsonl. The checkpoint is verified first. If the config changed after the
  step, the run gets back the config that made it.

  Args:
    folder: The run folder.
    step: Step of the checkpoint.

  Returns:
    Lines on what was moved.

  Raises:
    UserError: There is no such checkpoint, it is damaged, or a process is training in the folder.
  """
  folder = run_folder.require_run(folder)
  target = saved_lib.find(folder, step)
  with run_lock.RunLock(folder) as lock:
    lock.take()
    if problems := saved_lib.problems(target):
      raise UserError(
        f"--step={step}: the checkpoint is damaged ({problems[0]}); jaxgpt checkpoint verify shows "
        "which ones are whole"
      )
    later = [
      saved
      for part in (seal.CHECKPOINTS, best.FOLDER)
      for saved in saved_lib.all_of(folder, part)
      if saved.step > step
    ]
    return _move(folder, step, later)


def _move(folder: epath.Path, step: int, later: list[saved_lib.Saved]) -> list[str]:
  metrics = folder / metric_writers.JSONL
  before = metric_writers.read(metrics) if metrics.exists() else ""
  kept, text = metric_writers.kept_until(before, step)
  changed = [s for s in run_folder.changed_at(folder) if s > step]
  if not later and text == before and not changed:
    return [f"{folder} is at step {step} already: nothing is later"]
  aside = _new_folder(folder / FOLDER)
  lines = []
  # A kill in between leaves a run that goes on from a checkpoint in between, with its metrics. If
  # that is before a change of the config, the next start is refused, and this command finishes.
  if text != before:
    atomic.write(aside / metric_writers.JSONL, before)
    lines.append(f"{metrics}: {len(kept)} lines up to step {step}; all of it is in {aside}")
  for saved in sorted(later, reverse=True, key=lambda saved: saved.step):
    (aside / saved.folder).mkdir(exist_ok=True)
    saved.path.rename(aside / saved.folder / str(saved.step))
    lines.append(f"{saved.folder}/{saved.step} is in {aside / saved.folder} now")
  run_folder.note_start(folder, step)
  if changed:
    lines.append(_old_config(folder, step, changed, aside))
  if text != before:
    atomic.write(metrics, text)
  return [*lines, f"the run is at step {step}: the next start goes on from there"]


def _old_config(folder: epath.Path, step: int, changed: list[int], aside: epath.Path) -> str:
  """Makes the config that a step was made with the run's config again, and says so."""
  name = run_folder.config_path(folder).name
  old = run_folder.config_path(folder, step).read_text()
  if not (aside / name).exists():
    atomic.write(aside / name, (folder / name).read_text())
  seal.replace(folder, name, old)
  names = [run_folder.config_path(folder, s - 1).name for s in sorted(changed)]
  seal.forget(folder, names)
  for later in reversed(names):  # the earliest one, which is the config of the step, comes last
    (folder / later).rename(aside / later)
  return (
    f"{name} is the config from before the change at step {min(changed)} again; the later one is "
    f"in {aside}: to change it once more, add --accept-changes"
  )


def _new_folder(parent: epath.Path) -> epath.Path:
  name = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
  for number in range(1, 1000):
    found = parent / (name if number == 1 else f"{name}-{number}")
    if not found.exists():
      found.mkdir(parents=True)
      return found
  raise UserError(f"{parent} has 1,000 folders of this second; delete some")
