"""The start of a run, and of its continuation: from a config to the first step.

`train` reads from top to bottom: check the config, mesh, model, data, run folder, state (initial or
restored), steps. What may differ between hosts, such as the newest checkpoint, is agreed on.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections
from etils import epath

from jaxgpt import tree
from jaxgpt.config import user_code
from jaxgpt.data import stages
from jaxgpt.errors import UserError, first_line
from jaxgpt.model import fixed_models, transformer
from jaxgpt.parallel import distributed, sharding
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import best as best_lib
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import generation as generation_lib
from jaxgpt.run import init_from, label_names, run_lock, throughput
from jaxgpt.run import resume as resume_lib
from jaxgpt.run import run_folder as run_folder_lib
from jaxgpt.run import teacher as teacher_lib
from jaxgpt.run.process import output, stop_signal
from jaxgpt.run.provenance import config_changes
from jaxgpt.run.provenance import rewinds as rewinds_lib
from jaxgpt.storage import atomic, strict_json
from jaxgpt.text.tokenizers.tokenizer import Tokenizer
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import evaluators as evaluators_lib
from jaxgpt.training import kept_zeros, stored, train_step
from jaxgpt.training import metrics as metrics_lib
from jaxgpt.training.loop import spikes as spikes_lib
from jaxgpt.training.loop import steps, trouble


def train(
  c: ml_collections.ConfigDict,
  folder: epath.PathLike,
  origin: Mapping[str, str],
  weight_sources: Sequence[init_from.WeightSource] = (),
  evaluator_makers: Sequence[evaluators_lib.EvaluatorMaker] = (),
  accept_changes: bool = False,
  until: int | None = None,
  launched: float | None = None,
  rewinds: Sequence[rewinds_lib.Rewind] = (),
) -> steps.Outcome:
  """Trains from the first step, or from the newest checkpoint, until the last step or a signal.

  Args:
    c: A config from `config.load`.
    folder: The run folder.
    origin: {flat key: where its value came from}, from `config.load`.
    weight_sources: Kinds of models besides run folders that `init_from` may name.
    evaluator_makers: Make further metrics of each evaluation.
    accept_changes: Whether the run may go on with another config than that in its folder, as far as
      the declarations of the keys allow (`Key.if_changed`).
    until: Step after which to save and end, as a signal would do. None: the run's last step.
    launched: When the process was launched for this run, in seconds since the epoch. None: now.
    rewinds: For a new run, the steps that it leaves out: those of a run that it repeats.

  Raises:
    UserError: Bad input, a loss that is not finite, too little memory, or trouble that may pass.
      The exit code tells the last from the others.
  """
  folder, new = epath.Path(folder), list(rewinds)
  with (
    output.lasting(),
    stop_signal.StopSignal(hangup=True) as stop,
    run_lock.RunLock(folder) as lock,
  ):
    while True:
      asked = Asked(origin, weight_sources, evaluator_makers, accept_changes, until, new)
      try:
        return _start(c, folder, asked, stop, lock, throughput.Timer(began=launched))
      except spikes_lib.RewindError as e:
        new, launched, accept_changes = [e.rewind], None, False


class Asked(NamedTuple):
  """What the caller of `train` asks for besides the config. Attributes as there."""

  origin: Mapping[str, str]
  weight_sources: Sequence[init_from.WeightSource]
  evaluator_makers: Sequence[evaluators_lib.EvaluatorMaker]
  accept_changes: bool
  until: int | None
  rewinds: Sequence[rewinds_lib.Rewind]


def _start(
  c: ml_collections.ConfigDict,
  folder: epath.Path,
  asked: Asked,
  stop: stop_signal.StopSignal,
  lock: run_lock.RunLock,
  timer: throughput.Timer,
) -> steps.Outcome:
  """One start of a run. A spike of the loss ends it with a `RewindError`."""
  origin, weight_sources = asked.origin, asked.weight_sources
  if distributed.is_first():
    lock.take(make=False)  # a run that is being trained is refused at once
  # Mistakes in the config are reported before data is read, and those that the mesh reveals
  # before the run folder is made.
  resumed = run_folder_lib.is_run(folder)
  build_lib.check(c)
  steps.tell(build_lib.check_settings(c, origin, resumed=resumed))
  tokenizer, c = batches_lib.load_tokenizer_and_config(c)
  c, notes = label_names.settle(c, folder, weight_sources)
  c, more = teacher_lib.settle(c, weight_sources, tokenizer=tokenizer, folder=folder)
  notes += more
  if c.init_from and not resumed:
    notes += init_from.check_tokenizer(c, tokenizer, weight_sources)
  mesh = mesh_lib.make(c.mesh)
  parts = build_lib.build(c, mesh, resumed=resumed)
  changes = config_changes.find(folder, c) if asked.accept_changes and resumed else {}
  if changes:
    before = build_lib.build(run_folder_lib.read_config(folder), mesh, resumed=True)
    config_changes.check_state(changes, before.state, parts.state)
  for _, own in stages.configs(c)[:-1]:
    build_lib.build(own, mesh, resumed=True)  # the mesh may not divide another batch size
  data = batches_lib.training_data(c)
  held_out = batches_lib.validation(c)
  for check in data.host_checks():
    distributed.check_same(*check)
  notes += build_lib.describe_trained(parts)
  steps.tell([*notes, *data.describe(sharding.host_slice(mesh)[1])])
  context = evaluators_lib.Context(c, folder, mesh, parts, tokenizer, data.digest)
  made = [found for make in asked.evaluator_makers if (found := make(context)) is not None]
  samplers = [one for one in made if isinstance(one, evaluators_lib.Sampler)]
  evaluators = [one for one in made if not isinstance(one, evaluators_lib.Sampler)]
  if held_out is None:
    steps.tell(_not_evaluated(c, evaluators))
  last = min(c.train.steps, asked.until or c.train.steps)
  setup = steps.Setup(c, folder, mesh, parts, data, held_out, evaluators, samplers, last)
  _enter(setup, asked, tokenizer, lock, changes, timer.began)
  rewinds = rewinds_lib.of(run_folder_lib.read_starts(folder))
  setup = setup._replace(rewinds=rewinds)
  outcome = _train(setup, tokenizer, weight_sources, stop, timer)
  if distributed.is_first():
    _note_ended(folder, timer)
  return outcome


def _train(
  setup: steps.Setup,
  tokenizer: Tokenizer,
  weight_sources: Sequence[init_from.WeightSource],
  stop: stop_signal.StopSignal,
  timer: throughput.Timer,
) -> steps.Outcome:
  """Makes or restores the state, and trains it."""
  c, folder, mesh, parts = setup.c, setup.folder, setup.mesh, setup.parts
  checkpoints = checkpoints_lib.Checkpoints(
    folder / run_folder_lib.CHECKPOINTS, c.checkpoint.keep, c.checkpoint.keep_every
  )
  with trouble.explaining(parts.state), jax.set_mesh(mesh), _closing(checkpoints):
    with timer.paused(throughput.RESTORE):
      state, progress = _first_state(setup, checkpoints, tokenizer, weight_sources)
      jax.block_until_ready(state)  # too little memory shows here
    if c.objective.stored:
      first = state if checkpoints.latest() is None else None
      stored.before_training(c, folder, mesh, parts, first, weight_sources, steps.tell)
      data, held_out = stored.annotated_splits(c, setup.data, setup.held_out)
      setup = setup._replace(data=data, held_out=held_out)
    with contextlib.ExitStack() as stack:
      best = None
      if c.checkpoint.best:
        step = int(state["step"])
        kept = stack.enter_context(best_lib.keeper(folder, step))
        best = steps.BestCheckpoint(best_lib.of_run(folder, c.checkpoint.best, step), kept)
      run = steps.Run(setup, state, progress, checkpoints, stop, best, timer)
      stack.enter_context(contextlib.closing(run))
      try:
        return run.run()
      except spikes_lib.RewindError as e:
        _go_back(setup, checkpoints, e.rewind)
        raise


def _go_back(
  setup: steps.Setup, checkpoints: checkpoints_lib.Checkpoints, rewind: rewinds_lib.Rewind
) -> None:
  """Deletes the checkpoints from the spike on, so that the next start begins before it.

  A kill before that start has recorded the rewind does no harm: the run then finds the same spike
  again, since the losses that it saw are in the checkpoint.

  Raises:
    UserError: There is no checkpoint before the spike from which the run may go on.
  """
  c, folder = setup.c, setup.folder
  with contextlib.suppress(checkpoints_lib.SaveError):
    checkpoints.wait()
  there = distributed.share(checkpoints_lib.complete_steps(checkpoints.folder))
  least = max(distributed.share(run_folder_lib.changed_at(folder)), default=0)
  good = [step for step in there if least <= step <= rewind.first]
  if (there or least) and not good:
    after = f" after the change of the config at step {least}" if least else ""
    raise spikes_lib.SpikeError(
      f"a spike of the loss at {rewind.describe()}, and no checkpoint before it{after} is left to "
      f"go back to; lower checkpoint.every={c.checkpoint.every} or raise "
      f"checkpoint.keep={c.checkpoint.keep}, and repeat the run in another --workdir"
    )
  steps.tell([spikes_lib.describe(rewind, len(setup.rewinds) + 1, c.train.spike.rewinds)])
  checkpoints.delete_after(rewind.first)


def _note_ended(folder: epath.Path, timer: throughput.Timer) -> None:
  """Records the whole account of a start that has ended well."""
  try:
    run_folder_lib.note_ended(folder, timer.account())
  except (OSError, UserError) as e:
    output.warn(f"starts.jsonl could not be written ({first_line(e)})")


@contextlib.contextmanager
def _closing(checkpoints: checkpoints_lib.Checkpoints) -> Iterator[None]:
  """Closes checkpoints at the end. A save that fails meanwhile does not hide another error."""
  try:
    yield
  except BaseException:
    with contextlib.suppress(checkpoints_lib.SaveError):
      checkpoints.close()
    raise
  checkpoints.close()


def _not_evaluated(
  c: ml_collections.ConfigDict, evaluators: Sequence[evaluators_lib.Evaluator]
) -> list[str]:
  """The note on a run without a validation split.

  Raises:
    UserError: The run needs one: for the best checkpoint, or for an evaluator.
  """
  why = f"data.path={c.data.path!r} has no validation split"
  if c.checkpoint.best or evaluators:
    needs = f"checkpoint.best={c.checkpoint.best!r}" if c.checkpoint.best else "a task of the run"
    raise UserError(f"{needs} needs evaluations, but {why}; prepare the data with one")
  return [f"{why}: this run is not evaluated"]


def _enter(
  setup: steps.Setup,
  asked: Asked,
  tokenizer: Tokenizer,
  lock: run_lock.RunLock,
  changes: config_changes.Changes,
  launched: float,
) -> None:
  """Makes or checks the run folder in the first process. All processes must agree on the run."""
  c, folder = setup.c, setup.folder
  if distributed.is_first():
    run_folder_lib.check_free(folder)
    lock.take()
    resume = resume_lib.find(folder)
    generation, notices = generation_lib.of_training(c, tokenizer, folder)
    step = resume.step or 0
    timing = run_folder_lib.timing(launched, run_lock.last_beat(folder), resume.reached - step)
    config_changes.check_length(c, step)
    damaged = run_folder_lib.enter(
      folder,
      c,
      asked.origin,
      setup.mesh,
      setup.data.digest,
      tokenizer,
      step,
      changes,
      timing,
      asked.rewinds,
    )
    lock.beat()
    steps.tell(config_changes.describe(changes, step))
    generation_lib.write(folder, generation)
    steps.tell([*damaged, *notices])
    if lock.problem:
      steps.tell([f"{folder} gives no file locks ({lock.problem}): start no second run in it"])
    steps.tell([resume.describe(c.train.steps)])
  distributed.barrier("run folder")
  distributed.check_same(
    "the resolved config", c.to_json(), "start all processes with the same command and config file"
  )
  distributed.check_same(
    f"the digest of data.path={c.data.path!r}",
    setup.data.digest,
    "point data.path at the same data on all hosts",
  )
  code = user_code.files(c)
  if code:
    distributed.check_same(
      f"the digests of {', '.join(code)}",
      strict_json.dumps({name: user_code.digest(text) for name, text in code.items()}),
      "copy the same files to all hosts",
    )
  if not run_folder_lib.is_run(folder):
    raise UserError(
      f"--workdir={folder} is another folder here than in process 0: it must be one "
      "that all hosts see, such as a bucket or a network file system"
    )


def _first_state(
  setup: steps.Setup,
  checkpoints: checkpoints_lib.Checkpoints,
  tokenizer: Tokenizer,
  weight_sources: Sequence[init_from.WeightSource],
) -> tuple[train_step.State, steps.Progress]:
  """The state of the newest checkpoint, or the one before step 0, and what the loop has seen.

  A checkpoint holds the means of the log window because a run may stop inside one: the resumed run
  then logs the same numbers as one that never stopped. Frozen parameters are saved once, apart.
  """
  c, parts, folder = setup.c, setup.parts, setup.folder
  if distributed.share(checkpoints.latest()) is not None:
    state, extra, damaged = checkpoints.restore_newest(parts.state)
    if damaged and distributed.is_first():
      steps.tell(damaged)
    _check_config_of(folder, int(state["step"]))
    if damaged and distributed.is_first():
      run_folder_lib.note_start(folder, int(state["step"]))
    if setup.data.state_key is not None:
      setup.data.set_state(extra[setup.data.state_key], **batches_lib.host_share(setup.mesh))
    spikes = spikes_lib.Spikes(c.train.spike, setup.rewinds, extra.get("spikes"))
    steps.tell(spikes.describe(int(state["step"])))
    progress = steps.Progress(metrics_lib.Means(**extra["means"]), spikes)
    return state | checkpoints_lib.load_frozen(folder, parts.state), progress
  given = _initial_weights(setup, tokenizer, weight_sources) if c.init_from else None
  wanted = fixed_models.split(parts.state.get("frozen"))[1].get(fixed_models.TEACHER)
  teacher = None if wanted is None else teacher_lib.load(c, wanted, weight_sources)
  state = train_step.first_state(parts.model, parts.tx, c.seed, parts.state, given, teacher)
  checkpoints_lib.save_frozen(folder, state)
  spikes = spikes_lib.Spikes(c.train.spike, setup.rewinds, None)
  steps.tell(spikes.describe(0))
  return state, steps.Progress(metrics_lib.Means(), spikes)


def _check_config_of(folder: epath.Path, step: int) -> None:
  """Refuses to train steps before a change of the config with the config after it."""
  changed = max(distributed.share(run_folder_lib.changed_at(folder)), default=0)
  if step < changed:
    raise UserError(
      f"--workdir={folder}: the config changed at step {changed}, but the newest checkpoint that "
      f"is whole is of step {step}; `jaxgpt checkpoint restore-to {folder} --step={step}` takes "
      "the config back to that of this step, from which the run can go on"
    )


def _initial_weights(
  setup: steps.Setup, tokenizer: Tokenizer, weight_sources: Sequence[init_from.WeightSource]
) -> train_step.Given:
  """The weights of `init_from`. Prints a report of those used, and writes it to the run folder."""
  c = setup.c
  given = init_from.load(
    c.init_from, c.model, train_step.own_weights(setup.parts.state), weight_sources
  )
  init_from.check_tokenizer(c, tokenizer, weight_sources)  # a start may have been killed before
  if distributed.is_first():
    atomic.write(setup.folder / init_from.REPORT, strict_json.dumps(given.report, indent=2))
    steps.tell(init_from.describe(given.report))
  if c.optim.keep_zeros:
    _, axes = transformer.abstract(setup.parts.model)
    trained, _ = tree.split(axes, tree.flatten(setup.parts.state["params"]), sharding.is_axes)
    steps.tell([kept_zeros.describe(given.params, trained, c.init_from)])
  return given.params
