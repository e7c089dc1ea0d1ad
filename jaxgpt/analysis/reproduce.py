"""Training a run again from its folder, and comparing the result to the bit."""

import json
import signal
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
from etils import epath

from jaxgpt.analysis import checkpoint_files, curves
from jaxgpt.data import pipeline
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import init_from, resume, run_folder
from jaxgpt.run.compression import record as record_lib
from jaxgpt.run.provenance import environment
from jaxgpt.run.provenance import rewinds as rewinds_lib
from jaxgpt.run.provenance import saved as saved_lib
from jaxgpt.run.provenance.environment import Difference
from jaxgpt.text.prepare import shards
from jaxgpt.training import evaluators, loop


class ArrayDifference(NamedTuple):
  """The first checkpoint of both runs whose arrays differ.

  Attributes:
    step: Its step.
    changes: The arrays that differ, see `checkpoint_files.compare`.
  """

  step: int
  changes: list[checkpoint_files.Change]


class Reproduction(NamedTuple):
  """A run, trained again.

  Attributes:
    steps: Steps that were trained again.
    curves: The metrics of both, record by record.
    checkpoints: Steps of the checkpoints that both have, whose arrays were compared.
    arrays: The first of these that differs, or None.
    environment: Facts that differ between the run's start and this one.
    notes: Lines on what limits the comparison.
  """

  steps: int
  curves: curves.Comparison
  checkpoints: list[int]
  arrays: ArrayDifference | None
  environment: list[Difference]
  notes: list[str]

  @property
  def is_identical(self) -> bool:
    """Whether something was compared and all of it is equal to the bit."""
    compared = self.curves.records or self.checkpoints
    return bool(compared) and self.curves.first_difference is None and self.arrays is None


def settings(
  folder: epath.PathLike, steps: int | None = None, data: str | None = None
) -> tuple[ml_collections.ConfigDict, dict[str, str], int]:
  """What a run is trained again with.

  Args:
    folder: The run folder.
    steps: Steps to train. None: those that the run has done.
    data: The run's data folder, if it was moved.

  Returns:
    (config, origin of its values, steps to train).

  Raises:
    UserError: There is no run, it has no step, or its data is not there.
  """
  folder = epath.Path(folder)
  c = ml_collections.ConfigDict(run_folder.read_config(folder, 0))
  origin = json.loads(run_folder.config_path(folder, 0).read_text()).get("origin", {})
  digest = run_folder.read_starts(folder)[0]["data_digest"]
  if not digest:
    raise UserError(f"{folder} was imported: it has no training steps to reproduce")
  if made := record_lib.has_no_steps(folder):
    raise UserError(f"{made}: it has no training steps to reproduce")
  done = max((step for _, step in curves.read(folder)), default=0)
  done = max([done, *(saved.step for saved in saved_lib.all_of(folder))])
  if not done:
    raise UserError(
      f"{folder} has neither metrics nor checkpoints: there is nothing to compare with"
    )
  changed = [step for step in run_folder.changed_at(folder) if step > 0]
  if changed and steps is not None and steps > changed[0]:
    raise UserError(
      f"--steps={steps}: the config of the run changed at step {changed[0]}, and a repetition has "
      f"one config; give at most {changed[0]}"
    )
  done = min([done, *changed])
  if steps is not None and not 0 < steps <= done:
    raise UserError(f"--steps={steps}: the run has done {done} steps; give 1 to {done}")
  c.data.path = data or c.data.path
  found = [shards.read_manifest(path)["digest"] for path in pipeline.folders(c.data.path)]
  if pipeline.digest_of(found) != digest:
    raise UserError(
      f"{c.data.path} is not the data of {folder}: the digest of its manifest is "
      f"{pipeline.digest_of(found)[:12]}, the run's was {digest[:12]}; say where the run's data is "
      "with --data=DIR"
    )
  c.checkpoint.keep = (steps or done) + 1  # each may have a counterpart in the run
  return c, origin, steps or done


def reproduce(
  folder: epath.PathLike,
  out: epath.PathLike,
  steps: int | None = None,
  data: str | None = None,
  weight_sources: Sequence[init_from.WeightSource] = (),
  evaluator_makers: Sequence[evaluators.EvaluatorMaker] = (),
) -> Reproduction | signal.Signals:
  """Trains a run again in a new folder, and compares the two.

  A second call with the same folders goes on where the first one was stopped.

  Args:
    folder: The run folder.
    out: The new run folder.
    steps: As in `settings`.
    data: As in `settings`.
    weight_sources: As in `loop.train`.
    evaluator_makers: As in `loop.train`.

  Returns:
    The comparison, or the signal that stopped the training.

  Raises:
    UserError: See `settings` and `loop.train`.
  """
  c, origin, until = settings(folder, steps, data)
  if epath.Path(out).resolve() == epath.Path(folder).resolve():
    raise UserError(f"--out={out} is the run itself; name a new folder")
  _check_out(folder, out, c.mesh)
  done = resume.find(out).step or 0
  # A repetition that goes on after a stop has them from its own record.
  rewinds = () if run_folder.is_run(out) else rewinds_lib.of(run_folder.read_starts(folder))
  outcome = loop.train(
    c, out, origin, weight_sources, evaluator_makers, until=until, rewinds=rewinds
  )
  if outcome.stopped:
    return outcome.stopped
  found = compare(folder, out, until)
  if done:
    note = f"{out} had {min(done, until)} of these steps already: they were not trained now"
    found = found._replace(notes=[note, *found.notes])
  return found


def _check_out(
  folder: epath.PathLike, out: epath.PathLike, c_mesh: ml_collections.ConfigDict
) -> None:
  """Refuses a folder that is no repetition, or one that other code or another machine trained."""
  saved_lib.all_of(out)  # it must be on this machine to be compared
  if not run_folder.is_run(out):
    return
  starts = run_folder.read_starts(out)
  if starts[0] == run_folder.read_starts(folder)[0]:
    raise UserError(f"--out={out} is a copy of the run, not a repetition; name a new folder")
  now = environment.collect(mesh_lib.make(c_mesh))
  if found := environment.differences(environment.read(out, starts[-1]), now):
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    raise UserError(
      f"--out={out} was trained in another environment than this one "
      f"({found[0].describe()}{more}), about which it says nothing; name a new folder"
    )


def compare(folder: epath.PathLike, out: epath.PathLike, steps: int) -> Reproduction:
  """Compares a run with another that was trained from the same config.

  Args:
    folder: The run folder.
    out: The other run folder.
    steps: The last step to compare.
  """
  first, second = (run_folder.read_starts(run) for run in (folder, out))
  around = [environment.read(run, starts[0]) for run, starts in ((folder, first), (out, second))]
  common, found, notes = [], None, list[str]()
  theirs = {saved.step: saved for saved in saved_lib.all_of(out)}
  for saved in saved_lib.all_of(folder):
    if saved.step > steps or saved.step not in theirs:
      continue
    if problems := saved_lib.problems(saved):
      notes.append(f"{saved.path} is damaged, and was not compared: {problems[0]}")
      continue
    common.append(saved.step)
    if found is None and _digests(saved) != _digests(theirs[saved.step]):
      both = checkpoint_files.read(saved), checkpoint_files.read(theirs[saved.step])
      found = ArrayDifference(saved.step, checkpoint_files.compare(*both))
  environments = {start.get("environment") for start in first}
  if len(environments) > 1:
    notes.append(
      f"the run has {len(first)} starts in {len(environments)} environments; the first is compared"
    )
  if any(0 < step <= steps for step in run_folder.changed_at(folder)):
    notes.append(f"the run's config changed at step {steps}: steps from there on were not repeated")
  notes += [
    f"both leave out the batches of {each.describe()}, as the run did after a spike of the loss"
    for each in rewinds_lib.of(first)
    if each.first < steps
  ]
  if not common:
    notes.append("no step has a checkpoint in both: only the metrics were compared")
  return Reproduction(
    steps,
    curves.compare(curves.read(folder), curves.read(out), steps),
    common,
    found,
    environment.differences(*around),
    notes,
  )


def _digests(saved: saved_lib.Saved) -> object:
  """The digests of a checkpoint's arrays. An earlier version saved none: then the arrays' own."""
  try:
    found = saved.meta().get("digests")
  except ValueError:
    found = None
  return found or {name: saved_lib.array_digests(saved, name) for name in saved.items()}


def lines(found: Reproduction, folder: epath.PathLike) -> list[str]:
  """Lines that show a reproduction."""
  at = f" and the {_listed(found.checkpoints)}" if found.checkpoints else ""
  out = []
  if found.is_identical:
    out.append(
      f"identical to the bit for {found.steps} steps: {found.curves.records} records of metrics{at}"
    )
  elif not found.curves.records and not found.checkpoints:
    out.append(f"nothing to compare: {folder} and its repetition have no record in common")
  else:
    out.append(f"NOT identical to {folder}")
    if difference := found.curves.first_difference:
      before = found.curves.before
      upto = f"; equal up to step {before}" if before else ""
      out.append(f"first difference: {difference.describe()}{upto}")
    elif found.curves.records:
      out.append(f"all {found.curves.records} records of metrics are equal")
    if found.arrays:
      changes = found.arrays.changes
      out.append(
        f"first checkpoint that differs: step {found.arrays.step}, in {len(changes)} arrays"
      )
      out += [f"  {line}" for line in checkpoint_files.change_lines(changes, 10)]
    elif found.checkpoints:
      out.append(f"equal: the {_listed(found.checkpoints)}")
  out += found.notes
  if found.environment:
    out.append("the environment differs:")
    shown = found.environment[:20]
    out += [f"  {difference.describe()}" for difference in shown]
    rest = len(found.environment) - len(shown)
    out += [f"  … and {rest} more; jaxgpt diff --json shows all"] if rest else []
  else:
    out.append("the environment is the same: code, versions, hardware and flags")
  return out


def _listed(steps: Sequence[int]) -> str:
  if len(steps) == 1:
    return f"checkpoint of step {steps[0]}"
  shown = ", ".join(map(str, steps[:6]))
  return f"checkpoints of steps {shown}" + (f" … {steps[-1]}" if len(steps) > 6 else "")
