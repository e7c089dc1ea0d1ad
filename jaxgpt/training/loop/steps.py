"""The steps of a run: train, evaluate, save, report.

Two rules hold throughout:

- The device never waits for the host. Step n is dispatched before the metrics of step n - 1 are
  read.
- All processes decide the same at the same step. A value that may differ between hosts (a signal,
  a metric already written) is agreed on before it is acted on.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections
from etils import epath

from jaxgpt.data import pipeline, stages
from jaxgpt.data.batch_source import BatchSource
from jaxgpt.errors import UserError, first_line
from jaxgpt.parallel import chips, distributed, sharding
from jaxgpt.run import best as best_lib
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import metric_writers as metric_writers_lib
from jaxgpt.run import run_folder as run_folder_lib
from jaxgpt.run import throughput
from jaxgpt.run.process import memory, output, profile, stop_signal, watchdog
from jaxgpt.run.provenance import rewinds as rewinds_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import compiled_step, evaluation, train_step
from jaxgpt.training import evaluators as evaluators_lib
from jaxgpt.training import metrics as metrics_lib
from jaxgpt.training.loop import saving, trouble
from jaxgpt.training.loop import spikes as spikes_lib

_PART = "batches"  # in the metrics of an evaluation that left out some of the split


class Outcome(NamedTuple):
  """The end of a call of `train`.

  Attributes:
    step: Steps done so far.
    result: Metrics on the whole validation split, or None if the run is not complete or the data
      has no validation split. Of a run that stopped early, those of its last evaluation.
    stopped: The signal that stopped the run, or None.
    best: The best step and its value of `checkpoint.best`, or None.
    early: The run ended before its last step, see `eval.patience`.
  """

  step: int
  result: evaluation.Result | None
  stopped: signal.Signals | None
  best: tuple[int, float] | None = None
  early: bool = False


class Setup(NamedTuple):
  """Everything about a run that does not change from step to step."""

  c: ml_collections.ConfigDict
  folder: epath.Path
  mesh: jax.sharding.Mesh
  parts: build_lib.Parts
  data: BatchSource
  held_out: pipeline.Batches | None
  evaluators: Sequence[evaluators_lib.Evaluator]
  samplers: Sequence[evaluators_lib.Sampler]
  until: int  # the step after which this call ends, at most the run's last one
  rewinds: Sequence[rewinds_lib.Rewind] = ()


def tell(lines: Sequence[str]) -> None:
  """Prints lines in the first process."""
  if distributed.is_first():
    output.tell(lines)


class Progress(NamedTuple):
  """What the loop has seen of the losses, besides the state: a checkpoint holds it too."""

  means: metrics_lib.Means
  spikes: spikes_lib.Spikes


class BestCheckpoint(NamedTuple):
  """The best evaluation, and where its weights are kept."""

  best: best_lib.Best
  kept: checkpoints_lib.Checkpoints


class Run:
  """One start of a run: the state, the step in flight, and the metrics."""

  def __init__(
    self,
    setup: Setup,
    state: train_step.State,
    progress: Progress,
    checkpoints: checkpoints_lib.Checkpoints,
    stop: stop_signal.StopSignal,
    best: BestCheckpoint | None,
    timer: throughput.Timer,
  ):
    self._c, self._folder, self._mesh, self._parts, self._data, self._held_out, *_ = setup
    self._evaluators, self._best, self._until = setup.evaluators, best, setup.until
    self._samplers = setup.samplers
    self._state, self._stop = state, stop
    self._means, self._spikes = progress
    self._config_digest = run_folder_lib.digest_of(setup.c)
    self._agreement = distributed.Agreement(setup.mesh)
    self._stopped: signal.Signals | None = None
    self._told_ema = False
    self._step = self._start = int(state["step"])
    self._in_flight: tuple[int, train_step.Metrics | None] | None = None  # None: left out
    self._batch_taken = False  # and its step is not done
    c, parts = setup.c, setup.parts
    peak = chips.peak_flops(setup.mesh.devices.flat[0].device_kind)
    self._timer = timer
    timer.flops_per_token = metrics_lib.flops_per_token(c.model, c.data.seq_len)
    timer.peak_flops = peak and peak * setup.mesh.size
    self._saver = saving.Saver(
      c.checkpoint, setup.folder, checkpoints, setup.mesh, self._timer.account
    )
    self._eval_step = evaluation.make_step(parts.objective, setup.mesh, c.mesh.compiler_options)
    self._writers = metric_writers_lib.make(c, setup.folder, self._step)
    self._profile = profile.Profile(c.log.profile_steps, setup.folder)
    self._watchdog = watchdog.Watchdog(c.log.hang_minutes)

  def run(self) -> Outcome:
    """Steps until the end or a signal, saves, and evaluates a complete run.

    The state after the last completed step is saved before any error is raised, unless it is not
    finite or there are several processes.
    """
    self._timer.turn_to(throughput.STEPS)
    try:
      return self._run()
    except BaseException as e:
      self._rescue(e)
      raise
    finally:
      self._timer.turn_to(throughput.STARTUP)

  def _run(self) -> Outcome:
    if self._step < self._until and not self._ends_early() and not self._stop_now():
      self._train()
    self._save()
    early = self._step < self._c.train.steps and self._ends_early()
    if self._step < self._c.train.steps and not early:
      self._finish()
      return Outcome(self._step, None, self._stopped)
    last = self._evaluate(self._c.eval.batches if early else 0)
    self._finish()
    is_complete = last is not None or self._held_out is None
    found = None
    if self._best is not None:
      best, kept = self._best
      self._kept(kept, kept.wait)
      if best.step is not None and kept.latest() == best.step:
        found = best.step, best.value or 0.0
    return Outcome(self._step, last, None if is_complete else self._stopped, found, early)

  def _rescue(self, error: BaseException) -> None:
    """Saves the state after the last completed step, if an error left it as it was, and says so."""
    wants_out = isinstance(error, KeyboardInterrupt) and self._stop.received  # the second Ctrl-C
    said = (
      *(trouble.NotFiniteError, trouble.UnwrittenError, checkpoints_lib.SaveError),
      *(spikes_lib.SpikeError, spikes_lib.RewindError),
    )
    if wants_out or isinstance(error, said) or self._step == self._start:
      return
    newest = self._saver.newest
    back = f"the same command goes on from step {newest or 0}"
    if jax.process_count() > 1:  # the others are in the middle of a step
      tell([f"an error ends the run after step {self._step}; {back}"])
      return
    try:
      if self._batch_taken and self._data.state_key is not None:
        raise UserError("a batch of the stream was read and not used")
      if int(jax.block_until_ready(self._state)["step"]) != self._step:
        raise UserError("the error came in the middle of a step")
      self._read_metrics()
      self._writers.flush()
      self._saver.finish(self._content, most_failures=3)
    except Exception as e:
      output.warn(
        f"an error ends the run, and the state after step {self._step} could not be saved "
        f"({type(e).__name__}: {first_line(e, 300)}); {back}"
      )
    else:
      output.warn(
        f"an error ends the run; the state after step {self._step} is saved, and the same command "
        "goes on from there"
      )

  def _ends_early(self) -> bool:
    """Whether the metric has not improved for `eval.patience` evaluations."""
    patience = self._c.eval.patience
    return self._best is not None and 0 < patience <= self._best.best.since

  def _stop_soon(self) -> signal.Signals | None:
    """The signal that any process got, or None.

    All processes call this at each step and get the same answer, which may be some steps old.
    """
    self._watchdog.alive()
    return self._signal(self._agreement.soon(self._stop.received or 0))

  def _stop_now(self) -> signal.Signals | None:
    """As `_stop_soon`, but up to date. Waits for all processes."""
    return self._signal(self._agreement.now(self._stop.received or 0))

  def _signal(self, number: int) -> signal.Signals | None:
    self._stopped = signal.Signals(number) if number else None
    return self._stopped

  def _train(self) -> None:
    """Runs steps until the last one or a signal, and compiles the step at the start of a stage."""
    c = self._c
    remaining = [(s, own) for s, own in stages.configs(c) if self._step < s.end]
    with self._timer.paused(throughput.COMPILE):
      compiled = self._compile(*remaining[0])
    batches = self._data.iterate(
      self._step,
      threads=c.data.threads,
      prefetch=c.data.prefetch,
      **batches_lib.host_share(self._mesh),
    )
    # The run may have been stopped after this step's checkpoint and before its evaluation.
    if self._is_due(c.eval.every):
      self._evaluate(c.eval.batches)
    self._timer.start()
    began, first = time.monotonic(), self._step
    # A transfer that is not explicit would make the host wait for the device: it is a bug.
    with contextlib.closing(batches), jax.transfer_guard("disallow"):
      while self._step < self._until and not self._ends_early() and not self._stop_soon():
        if self._step == remaining[0][0].end:
          remaining.pop(0)
          self._read_metrics()
          with self._timer.paused(throughput.COMPILE), jax.transfer_guard("allow"):
            compiled = self._compile(*remaining[0])
        self._profile.before(self._step + 1, self._read_metrics)
        with self._timer.waiting():
          batch = next(batches)
        self._batch_taken = True
        metrics = None
        if self._spikes.leaves_out(self._step):
          self._state = spikes_lib.passed(self._state)
        else:
          self._state, metrics = compiled(self._state, batches_lib.to_devices(batch, self._mesh))
        self._step += 1
        self._batch_taken = False
        # The device now works on this step, while the host reports the previous one.
        self._read_metrics()
        self._in_flight = (self._step, metrics)
        self._sample()  # before the save, so that no start goes on behind samples it lacks
        self._saver.poll()
        if self._saver.is_due(self._step):
          self._save()
        if self._is_due(c.eval.every) and self._step < c.train.steps:
          self._evaluate(c.eval.batches)
    self._read_metrics()
    tell([*self._data.account(), *self._saver.advice(self._step - first, began)])

  def _compile(self, stage: stages.Stage, c: ml_collections.ConfigDict) -> train_step.TrainStep:
    """The compiled step of a stage.

    Args:
      stage: The stage.
      c: The config with its batch size and length of rows.
    """
    parts, mesh = self._parts, self._mesh
    if self._c.data.stages:
      tell([f"step {self._step}: compiling for {stage.batch_size} x {stage.seq_len} tokens"])
      parts = build_lib.build(c, mesh, resumed=True)
      self._timer.flops_per_token = metrics_lib.flops_per_token(c.model, stage.seq_len)
    step_fn = train_step.make(parts.objective, parts.tx, parts.schedule, c)
    shapes = batches_lib.shapes(self._data, stage)
    instead = lambda lowered: compiled_step.of_config(c, lowered, mesh)
    options = c.mesh.compiler_options
    return train_step.compile(step_fn, parts.state, shapes, mesh, options, instead)

  def _is_due(self, every: int) -> bool:
    return bool(every and self._step and self._step % every == 0)

  def _read_metrics(self) -> None:
    """Waits for the step in flight, if there is one, and reports its metrics."""
    if self._in_flight is None:
      return
    step, on_devices = self._in_flight
    self._in_flight = None
    if on_devices is None:
      self._timer.step_done(0)
      self._means.add_skipped()
    else:
      self._add_metrics(step, {k: v.item() for k, v in jax.device_get(on_devices).items()})
    if step % self._c.log.every == 0 or step == self._c.train.steps:
      epochs = {f"epochs/{name}": n for name, n in self._data.epochs(step).items()}
      found = self._means.take() | self._timer.take() | epochs | self._spikes.metrics(step)
      found |= memory.used(self._mesh.local_devices)
      self._writers.write(step, "train", found)

  def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """Adds the metrics of a step to the log window, or ends the start for them."""
    nonfinite_step = int(metrics.pop("nonfinite_step"))
    if nonfinite_step >= 0:
      self._spikes.check_not_finite(nonfinite_step)
      self._stop_at_nonfinite(nonfinite_step, metrics)
    self._timer.step_done(metrics.pop("tokens_read"))
    if nonfinite_step < -1:
      self._means.add_skipped()
      most = self._c.optim.skip_nonfinite
      tell([f"{_not_finite(step - 1, metrics)}: skipped, {-1 - nonfinite_step} of at most {most}"])
    else:
      self._spikes.check(step - 1, metrics["loss"])
      self._means.add(metrics)

  def _sample(self) -> None:
    """Writes the texts that are due at this step."""
    for sampler in self._samplers:
      if self._is_due(sampler.every):
        self._read_metrics()
        with self._timer.paused(throughput.SAMPLING), jax.transfer_guard("allow"):
          found = sampler.sample(train_step.own_weights(self._state))
          self._writers.write_samples(self._step, found)

  def _evaluate(self, limit: int) -> evaluation.Result | None:
    """The validation metrics of this step.

    None if there is no validation split, or if a signal ended the evaluation. A step that metrics
    were written for is not evaluated again, unless they are of a part of the split and all of it
    is asked for: train.steps was then lowered to a step that the run had reached.

    Args:
      limit: Number of batches. 0: the whole split.
    """
    self._read_metrics()
    if self._held_out is None:
      return None
    result = distributed.share(self._writers.newest(self._step, "validation"))
    if result is None or (_PART in result and not limit):
      with self._timer.paused(throughput.EVALUATION), jax.transfer_guard("allow"):
        self._stop_now()  # evaluation batches take another time than steps
        result = evaluation.evaluate_on(
          self._held_out,
          self._mesh,
          self._c.data,
          self._eval_step,
          train_step.weights(self._state),
          limit,
          lambda: not self._stop_soon(),
        )
        if self._stop_now():
          return None
        weights = train_step.own_weights(self._state)
        for evaluator in self._evaluators:
          result |= evaluator(weights)
        if evaluation.is_part(self._held_out, limit):
          result[_PART] = limit
        result = distributed.share(result)
        self._writers.write(self._step, "validation", result)
        note = train_step.ema_note(self._c.optim, self._step)
        if note and not self._told_ema:
          tell([note])
          self._told_ema = True
    self._keep_best(result)
    return result

  def _keep_best(self, result: evaluation.Result) -> None:
    """Saves the weights if the metrics of this step are the best so far."""
    if self._best is None:
      return
    best, kept = self._best
    best.add(self._step, result)
    if best.step == self._step:
      with self._timer.paused(throughput.SAVING), jax.transfer_guard("allow"):
        self._writers.flush()
        weights = {key: value for key, value in self._state.items() if key in best_lib.ITEMS}
        self._kept(kept, kept.wait)
        self._kept(kept, lambda: kept.save(weights))

  def _kept(self, kept: checkpoints_lib.Checkpoints, call: Callable[[], object]) -> None:
    """Calls a function that saves the best weights or waits for them. Says if this failed."""
    try:
      call()
    except checkpoints_lib.SaveError as e:
      if jax.process_count() > 1:
        raise
      kept.forget_failure()
      output.warn(f"the best weights are not kept, until better ones come: {e.reason}")

  def _save(self) -> None:
    """Saves a checkpoint after the metrics of its step are on disk.

    Resuming from a checkpoint never writes the metrics before it again.
    """
    self._read_metrics()
    self._writers.flush()
    with self._timer.paused(throughput.SAVING), jax.transfer_guard("allow"):
      self._saver.save(self._content)

  def _finish(self) -> None:
    """Waits until the last state is saved, and all metrics are.

    Raises:
      UserError: They could not be.
    """
    with self._timer.paused(throughput.SAVING):
      self._saver.finish(self._content)
    self._writers.flush()
    if lines := self._writers.unwritten():
      raise trouble.UnwrittenError(self._folder / metric_writers_lib.JSONL, lines)

  def _content(self) -> tuple[train_step.State, dict[str, object]]:
    """The state, and what else a checkpoint holds."""
    extra = {"means": self._means.state(), "config": self._config_digest}
    return self._state, extra | self._spikes.state() | self._data_state()

  def _data_state(self) -> dict[str, object]:
    """The batch source's entry in a checkpoint, empty if the batch is a function of the step."""
    if self._data.state_key is None:
      return {}
    number, _ = sharding.host_slice(self._mesh)
    states = distributed.gather([number, self._data.get_state()])
    ordered = [state for _, state in sorted(dict(states or []).items())]
    return {self._data.state_key: self._data.merge_states(ordered)}

  def _stop_at_nonfinite(self, step: int, metrics: Mapping[str, float]) -> None:
    """Saves the state, the batch and the metrics of a step that is not finite, and raises."""
    where = self._folder / f"nonfinite_{step}"
    with jax.transfer_guard("allow"):
      side = "before" if int(self._state["step"]) == step else "after"
    try:
      with jax.transfer_guard("allow"):
        trouble.dump(where, self._state, self._data.batch(step), metrics)
      evidence = f"{where} has the state {side} it, its batch and its metrics"
    except (OSError, UserError) as e:
      evidence = f"the state {side} it could not be saved ({e})"
    raise trouble.NotFiniteError(
      f"{_not_finite(step, metrics)}; {evidence}. The usual cures are a lower optim.lr, a "
      "longer schedule.warmup_steps or objective.z_loss=1e-4"
    )

  def close(self) -> None:
    """Closes the metric writers, the watchdog and a trace that is running."""
    self._profile.close()
    self._watchdog.close()
    self._writers.close()


def _not_finite(step: int, metrics: Mapping[str, float]) -> str:
  """That a step is not finite, with the numbers that show it."""
  return (
    f"step {step} is not finite: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, "
    f"weight norm {metrics['param_norm']}"
  )
