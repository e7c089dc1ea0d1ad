"""The training loop: reads a resolved config from top to bottom and leaves a run folder.

Order: mesh, data, model, run folder, state (initial or restored), compile, steps. Step n is
dispatched before the metrics of step n-1 are read, so the device never waits for the host.
"""

import contextlib
import json
import signal

import jax
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.parallel import chips, distributed, sharding
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import init_from, stop_signal, throughput
from jaxgpt.run import metric_writers as metric_writers_lib
from jaxgpt.run import run_folder as run_folder_lib
from jaxgpt.storage import atomic
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import compiled_step, evaluation, train_step
from jaxgpt.training import metrics as metrics_lib


def train(c, folder, origin, weight_sources=()):
  """Trains, or goes on training, until the last step or a signal.

  Args:
    c: a config from `config.load`.
    folder: the run folder.
    origin: where the config's values came from.
    weight_sources: `init_from.WeightSource`s besides run folders, for `init_from`.

  Returns:
    (steps so far, metrics of the whole validation split or None, the signal that stopped the run
    or None).

  Raises:
    UserError: bad input, or a loss that is not finite.
  """
  folder = epath.Path(folder)
  with stop_signal.StopSignal() as stop:
    tokenizer, c = batches_lib.load_tokenizer_and_config(c)
    mesh = mesh_lib.make(c.mesh)
    mesh_lib.check_batch(mesh.shape, c.data.batch_size, c.optim.accumulate)
    mesh_lib.check_batch(mesh.shape, c.eval.batch_size, key="eval.batch_size")
    data, held_out = (
      batches_lib.training_data(c),
      batches_lib.split_batches(c, "validation", c.eval.batch_size),
    )
    for check in data.host_checks():
      distributed.check_same(*check)
    _tell(data.describe(sharding.host_slice(mesh)[1]))
    parts = build_lib.build(c, mesh)
    _enter(folder, c, origin, mesh, data.digest, tokenizer)
    checkpoints = checkpoints_lib.Checkpoints(
      folder / run_folder_lib.CHECKPOINTS, c.checkpoint.keep, c.checkpoint.keep_every
    )
    with jax.set_mesh(mesh), contextlib.closing(checkpoints):
      run = _Run(
        c, folder, mesh, (data, held_out), parts, checkpoints, stop, tokenizer, weight_sources
      )
      with contextlib.closing(run):
        return run.run()


def _tell(lines):
  """Prints lines in the first process."""
  if lines and distributed.is_first():
    print("\n".join(lines), flush=True)


def _enter(folder, c, origin, mesh, data_digest, tokenizer):
  """Makes or checks the run folder in the first process, and that all work on the same things."""
  if distributed.is_first():
    run_folder_lib.enter(folder, c, origin, mesh, data_digest, tokenizer)
  distributed.barrier("run folder")
  distributed.check_same(
    "the resolved config", c.to_json(), "start all processes with the same command and config file"
  )
  distributed.check_same(
    f"the digest of data.path={c.data.path!r}",
    data_digest,
    "point data.path at the same data on all hosts",
  )
  if not run_folder_lib.is_run(folder):
    raise UserError(
      f"--workdir={folder} is another folder here than in process 0: it must be one "
      "that all hosts see, such as a bucket or a network file system"
    )


class _Run:
  """One start of a run: the state, the step in flight, and what is reported."""

  def __init__(self, c, folder, mesh, data, parts, checkpoints, stop, tokenizer, weight_sources):
    self._c, self._folder, self._mesh, self._parts = c, folder, mesh, parts
    self._data, self._held_out = data
    self._checkpoints, self._stop, self._tokenizer = checkpoints, stop, tokenizer
    self._weight_sources = weight_sources
    self._agreement, self._stopped = distributed.Agreement(mesh), None
    self._means = metrics_lib.Means()
    self._state = self._first_state()
    self._step = int(self._state["step"])
    self._in_flight = None  # (step, metrics on the devices)
    peak = chips.peak_flops(mesh.devices.flat[0].device_kind)
    self._timer = throughput.Timer(
      metrics_lib.flops_per_token(c.model, c.data.seq_len), peak and peak * mesh.size
    )
    self._eval_step = evaluation.make_step(parts.objective)
    self._writers = metric_writers_lib.make(c, folder, self._step)

  def _first_state(self):
    latest = distributed.share(self._checkpoints.latest())
    if latest is not None:
      state, extra = self._checkpoints.restore(self._parts.state, latest)
      self._means = metrics_lib.Means(**extra["means"])
      if self._data.state_key is not None:
        self._data.set_state(extra[self._data.state_key], **batches_lib.host_share(self._mesh))
      return state | checkpoints_lib.load_frozen(self._folder, self._parts.state)
    given = self._given() if self._c.init_from else None
    state = train_step.first_state(
      self._parts.model, self._parts.tx, self._c.seed, self._parts.state, given
    )
    checkpoints_lib.save_frozen(self._folder, state)
    return state

  def _given(self):
    """The weights of `init_from`; what of them was used is told and written down."""
    given = init_from.load(
      self._c.init_from,
      self._c.model,
      train_step.weights(self._parts.state),
      self._weight_sources,
    )
    init_from.check_tokenizer(given, self._tokenizer, self._c)
    if distributed.is_first():
      atomic.write(self._folder / init_from.REPORT, json.dumps(given.report, indent=2))
      print("\n".join(init_from.describe(given.report)), flush=True)
    return given.params

  def run(self):
    """Steps until the end or a signal, saves, and evaluates a run that is complete."""
    last = None
    if self._step < self._c.train.steps and not self._stop_now():
      self._train()
    self._save()
    if self._step == self._c.train.steps:
      last = self._evaluate(limit=0)
    return self._step, last, None if last else self._stopped

  def _stop_soon(self):
    """The signal that some process got, or None; called by all, and they stop at the same step."""
    return self._signal(self._agreement.soon(self._stop.received or 0))

  def _stop_now(self):
    """As `_stop_soon`, but up to date."""
    return self._signal(self._agreement.now(self._stop.received or 0))

  def _signal(self, number):
    self._stopped = signal.Signals(number) if number else None
    return self._stopped

  def _train(self):
    c = self._c
    step_fn = train_step.make(self._parts.objective, self._parts.tx, self._parts.schedule, c)
    host, rows = batches_lib.host_share(self._mesh), c.data.batch_size
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), self._data.blank(1)
    )
    compiled = train_step.compile(
      step_fn, self._parts.state, shapes, self._mesh, c.mesh.compiler_options, self._saved_step
    )
    batches = self._data.iterate(
      self._step, threads=c.data.threads, prefetch=c.data.prefetch, **host
    )
    if self._is_due(c.eval.every):  # a stop may have come between the save and the evaluation
      self._evaluate(c.eval.batches)
    self._timer.start()
    # Transfers are explicit, or they are bugs.
    with contextlib.closing(batches), jax.transfer_guard("disallow"):
      while self._step < c.train.steps and not self._stop_soon():
        with self._timer.waiting():
          batch = next(batches)
        self._state, metrics = compiled(self._state, batches_lib.to_devices(batch, self._mesh))
        self._step += 1
        self._read_metrics()
        self._in_flight = (self._step, metrics)
        if self._is_due(c.checkpoint.every):
          self._save()
        if self._is_due(c.eval.every) and self._step < c.train.steps:
          self._evaluate(c.eval.batches)
    self._read_metrics()
    _tell(self._data.account())

  def _saved_step(self, lowered):
    """The compiled step of mesh.compiled_step, or None where there is none, or of another program."""
    path = self._c.mesh.compiled_step
    if not path:
      return None
    compiled, why = compiled_step.load(path, lowered, self._mesh, self._c.mesh.compiler_options)
    distributed.check_same(
      f"what becomes of mesh.compiled_step={path!r}",
      why or "it is used",
      "give all hosts the same file, versions and flags",
    )
    if distributed.is_first():
      print(
        f"mesh.compiled_step={path!r} "
        + (
          f"is of no use here, so the step is compiled: {why}"
          if why
          else "is this very step: nothing is compiled"
        ),
        flush=True,
      )
    return compiled

  def _is_due(self, every):
    return every and self._step and self._step % every == 0

  def _read_metrics(self):
    """Waits for the step in flight, if there is one, and reports it."""
    if self._in_flight is None:
      return
    step, metrics = self._in_flight
    self._in_flight = None
    metrics = {k: v.item() for k, v in jax.device_get(metrics).items()}
    nonfinite_step = int(metrics.pop("nonfinite_step"))
    if nonfinite_step >= 0:
      self._stop_at_nonfinite(nonfinite_step, metrics)
    self._means.add(metrics)
    self._timer.step_done(metrics["tokens"])
    if step % self._c.log.every == 0 or step == self._c.train.steps:
      epochs = {f"epochs/{name}": n for name, n in self._data.epochs(step).items()}
      self._writers.write(step, "train", self._means.take() | self._timer.take() | epochs)

  def _evaluate(self, limit):
    """The validation metrics of this step, evaluated but once; None where a signal cut it short."""
    self._read_metrics()
    result = distributed.share(self._writers.newest(self._step, "validation"))
    if result is None:
      with self._timer.paused(), jax.transfer_guard("allow"):
        self._stop_now()  # batches have another pace than steps
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
        self._writers.write(self._step, "validation", result)
    return result

  def _save(self):
    self._read_metrics()
    self._writers.flush()  # a checkpoint vouches for the metrics before it
    with self._timer.paused(), jax.transfer_guard("allow"):
      self._checkpoints.save(self._state, {"means": self._means.state()} | self._data_state())

  def _data_state(self):
    """The batch source's entry in a checkpoint; empty if the batch is a function of the step."""
    if self._data.state_key is None:
      return {}
    number, _ = sharding.host_slice(self._mesh)
    states = distributed.gather([number, self._data.get_state()])
    ordered = [state for _, state in sorted(dict(states or []).items())]
    return {self._data.state_key: self._data.merge_states(ordered)}

  def _stop_at_nonfinite(self, step, metrics):
    where = self._folder / f"nonfinite_{step}"
    with jax.transfer_guard("allow"):
      side = "before" if int(self._state["step"]) == step else "after"
    try:
      with jax.transfer_guard("allow"):
        checkpoints_lib.dump(where, self._state, self._data.batch(step), metrics)
      evidence = f"{where} has the state {side} it, its batch and its metrics"
    except (OSError, UserError) as e:
      evidence = f"the state {side} it could not be saved ({e})"
    raise UserError(
      f"step {step} is not finite: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, "
      f"weights' norm {metrics['param_norm']}; {evidence}. A lower optim.lr, a longer "
      "schedule.warmup_steps or objective.z_loss=1e-4 are the usual cures"
    )

  def close(self):
    self._writers.close()
