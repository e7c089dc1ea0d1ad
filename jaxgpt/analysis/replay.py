"""One step of a run, computed again: its loss, its documents, and the gradient of each layer.

The state before the step is that of the nearest checkpoint before it, or the initial one, and the
compiled train step takes it from there. So the metrics are those that the run logged, to the bit on
the same machine and mesh.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from jaxgpt import tree
from jaxgpt.analysis import curves
from jaxgpt.data import pipeline, stages
from jaxgpt.errors import UserError
from jaxgpt.inference import load, scoring
from jaxgpt.model import fixed_models, transformer
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import run_folder
from jaxgpt.run.compression import record as record_lib
from jaxgpt.run.provenance import rewinds as rewinds_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import metrics as metrics_lib
from jaxgpt.training import objectives, stored, train_step, xla_options
from jaxgpt.training.loop import spikes


class Example(NamedTuple):
  """A document, or a part of one, in the batch of a step.

  Attributes:
    row: Row of the batch.
    name: Origin of the document.
    document: Its number in the split.
    start, end: The stored tokens that the row has.
    predictions: Sum of the weights of the predictions that the loss counts.
    loss: Mean loss of these in nats, or None if the objective has no loss per example.
  """

  row: int
  name: str
  document: int
  start: int
  end: int
  predictions: float
  loss: float | None


class Replay(NamedTuple):
  """A step of a run, computed again.

  Attributes:
    step: Number of the step. The first is 0.
    begun: Step of the state from which it was computed.
    metrics: The metrics of the step.
    examples: The documents of its batch, with the weights before the step and without dropout.
    norms: {layer: norm of the gradient before clipping}. Embeddings and what is after the layers
      have names of their own.
    window: (first step, last step) that the logged record covers, as numbers of steps.
    logged: The record of metrics.jsonl, or None if there is none.
    again: The same record, computed again.
    changed: The step within the window from which the config is another one, or None. The record
      is then of both configs, so there is nothing to compare with.
  """

  step: int
  begun: int
  metrics: dict[str, float]
  examples: list[Example]
  norms: dict[str, float]
  window: tuple[int, int]
  logged: dict[str, Any] | None
  again: dict[str, float]
  changed: int | None = None

  def unequal(self) -> list[str]:
    """The metrics that differ from the logged ones. [] without a record."""
    logged = self.logged or {}
    both = sorted(self.again.keys() & logged.keys(), key=lambda name: (name != "loss", name))
    return [name for name in both if curves.is_exact(name) and self.again[name] != logged[name]]


def replay(folder: epath.PathLike, step: int, data: str | None = None) -> Replay:
  """Computes a step of a run again.

  Args:
    folder: The run folder.
    step: Number of the step. The first is 0.
    data: The run's data folder. None: its folder at training.

  Raises:
    UserError: There is no such step, no state from which it can be computed, or no such data.
  """
  run = _Run(epath.Path(folder), step, data)
  run.check(step)
  with jax.set_mesh(run.mesh):
    state, means, begun = run.state_before(step)
    return run.replay(state, means, begun, step)


class _Run:
  """A run whose steps are computed again."""

  def __init__(self, folder: epath.Path, step: int, data: str | None):
    self._folder = folder
    c = ml_collections.ConfigDict(run_folder.read_config(folder, step))
    c.data.path = data or c.data.path
    starts = run_folder.read_starts(folder)
    self._starts = starts
    self._c = c
    digest = starts[0]["data_digest"]
    if not digest:
      raise UserError(f"{folder} was imported: it has no training steps to replay")
    if made := record_lib.has_no_steps(folder):
      raise UserError(f"{made}: it has no training steps to replay")
    if c.data.stream:
      raise UserError(
        f"{folder} was trained on data.stream={c.data.stream!r}: a stream has no random access, so "
        "a step can't be computed again; prepare the files with `jaxgpt data` to train on them"
      )
    self.mesh = mesh_lib.make(c.mesh)
    self._parts = build_lib.build(c, self.mesh, resumed=True)
    source = batches_lib.training_data(c)
    if c.objective.stored:
      source, _ = stored.annotated_splits(c, source, None)
    self._data = source
    first = source.at(0) if isinstance(source, stages.StagedBatches) else source
    assert isinstance(first, pipeline.Batches)
    load.check_data(first, digest, c.data.path)
    self._compiled: dict[int, Any] = {}
    self._left_out = rewinds_lib.left_out(rewinds_lib.of(starts))
    self._changed = min((s for s in run_folder.changed_at(folder) if s > step), default=None)

  def _ends_window(self, step: int) -> bool:
    """Whether the run logged a record after a step. Each start may have its own `log.every`."""
    made_by = [start for start in self._starts if start.get("step", 0) <= step]
    every = (made_by or self._starts)[-1].get("config", {}).get("log.every", self._c.log.every)
    return (step + 1) % every == 0 or step + 1 == self._c.train.steps

  def check(self, step: int) -> None:
    """Refuses a step that the run does not have."""
    if not 0 <= step < self._c.train.steps:
      raise UserError(f"--step={step}: the steps of this run are 0 to {self._c.train.steps - 1}")
    if step in self._left_out:
      raise UserError(
        f"--step={step}: the run left this step out after a spike of the loss; name another one"
      )

  def state_before(self, step: int) -> tuple[train_step.State, metrics_lib.Means, int]:
    """(state, means of its log window, its step), the nearest one before a step."""
    where = self._folder / run_folder.CHECKPOINTS
    # Steps before a change of the config were made with another one.
    least = max((s for s in run_folder.changed_at(self._folder) if s <= step), default=0)
    there = [s for s in checkpoints_lib.complete_steps(where) if least <= s <= step]
    if least and not there:
      raise UserError(
        f"--step={step}: the config changed at step {least}, and {where} has no checkpoint between "
        "the two; name a step after one of its checkpoints"
      )
    if there:
      checkpoints = checkpoints_lib.Checkpoints(where, read_only=True)
      state, extra = checkpoints.restore(self._parts.state, max(there))
      checkpoints.close()
      state |= checkpoints_lib.load_frozen(self._folder, self._parts.state)
      return state, metrics_lib.Means(**extra["means"]), max(there)
    frozen, fixed = fixed_models.split(self._parts.state.get("frozen"))
    if self._c.init_from or fixed:
      raise UserError(
        f"--step={step}: {self._folder} has no checkpoint at or before it, and its first weights "
        "came from another model; name a step from "
        f"{min(checkpoints_lib.complete_steps(where), default=0)} on"
      )
    del frozen
    p = self._parts
    state = train_step.first_state(p.model, p.tx, self._c.seed, p.state)
    return state, metrics_lib.Means(), 0

  def replay(
    self, state: train_step.State, means: metrics_lib.Means, begun: int, step: int
  ) -> Replay:
    """Takes the state to the end of the log window that the step is in."""
    found = None
    for number in range(begun, self._c.train.steps):
      if number in self._left_out:
        state = spikes.passed(state)
        means.add_skipped()
      else:
        compiled, own, parts = self._compile(number)
        on_devices = batches_lib.to_devices(self._data.batch(number), self.mesh)
        if number == step:
          examples = self._examples(parts, own, state, on_devices, step)
          norms = self._norms(parts, own, state, on_devices)
        state, metrics = compiled(state, on_devices)
        values = {k: v.item() for k, v in jax.device_get(metrics).items()}
        del values["tokens_read"]
        if int(values.pop("nonfinite_step")) < -1:  # skipped
          means.add_skipped()
        else:
          means.add(values)
        if number == step:
          found = values
      whole = self._ends_window(number)
      if whole or number + 1 == self._changed:
        again = means.take()
        if found is not None:
          break
    assert found is not None
    first, changed = number, None if whole else self._changed
    while first and not self._ends_window(first - 1):
      first -= 1
    logged = None if changed else curves.read(self._folder).get(("train", number + 1))
    return Replay(step, begun, found, examples, norms, (first, number), logged, again, changed)

  def _compile(self, step: int) -> tuple[Any, ml_collections.ConfigDict, build_lib.Parts]:
    """The compiled train step, the config and the parts of the stage that a step is in."""
    stage, own = next((s, own) for s, own in stages.configs(self._c) if step < s.end)
    if stage.start not in self._compiled:
      parts = self._parts
      if self._c.data.stages:
        parts = build_lib.build(own, self.mesh, resumed=True)
      function = train_step.make(parts.objective, parts.tx, parts.schedule, own)
      shapes = batches_lib.shapes(self._data, stage)
      options = own.mesh.compiler_options
      compiled = train_step.compile(function, parts.state, shapes, self.mesh, options)
      self._compiled[stage.start] = compiled, own, parts
    return self._compiled[stage.start]

  def _examples(
    self,
    parts: build_lib.Parts,
    c: ml_collections.ConfigDict,
    state: train_step.State,
    batch: Any,
    step: int,
  ) -> list[Example]:
    """The documents of a batch and their losses."""
    scores = None
    if scoring.has_scores(c):
      function = scoring.make_step(parts.model, self.mesh)
      own = fixed_models.split(tree.merge(state["params"], state.get("frozen")))[0]
      scores = next(scoring.run(function, own, [batch]))
    source = self._data.at(step) if isinstance(self._data, stages.StagedBatches) else self._data
    assert isinstance(source, pipeline.Batches)
    out = []
    for i, row in enumerate(source.rows(step)):
      _, split, pack, _ = source.sources[row.source]
      at = 0
      for doc, start, length in zip(*(a.tolist() for a in pack.spans(row.row))):
        weight = loss = None
        if scores is not None:
          here = (i, slice(at, at + length)) if scores.weight.ndim == 2 else i
          weights = np.asarray(scores.weight[here], np.float64)
          weight = float(weights.sum())
          total = float((np.asarray(scores.nll[here], np.float64) * weights).sum())
          loss = total / weight if weight else None
        name = split.source_name(doc)
        out.append(Example(i, name, doc, start, start + length, weight or 0.0, loss))
        at += length
    return out

  def _norms(
    self,
    parts: build_lib.Parts,
    c: ml_collections.ConfigDict,
    state: train_step.State,
    batch: Any,
  ) -> dict[str, float]:
    """{layer: norm of the gradient of the mean loss}."""
    whole = objectives.find(c).whole_batch
    gradients = train_step.accumulated(parts.objective, 1 if whole else c.optim.accumulate)

    def squares(state: train_step.State, batch: Any) -> Any:
      key = jax.random.fold_in(jax.random.key(c.seed), state["step"])
      (_, weight, _), grads = gradients(state["params"], state.get("frozen"), batch, key)
      mean = 1 / jnp.maximum(weight, 1e-9)
      numbers = transformer.depths(parts.model.cfg, grads)

      def one(g: jax.Array, number: Any) -> jax.Array:
        axes = tuple(range(np.ndim(number), g.ndim))
        return jnp.square(g.astype(jnp.float32) * mean).sum(axes)

      return jax.tree.map(one, grads, numbers)

    options = xla_options.of_mesh(self.mesh, c.mesh.compiler_options)
    run = jax.jit(squares, compiler_options=options)
    found = tree.flatten(jax.device_get(run(state, batch)))
    numbers = tree.flatten(transformer.depths(parts.model.cfg, state["params"]))
    totals: dict[str, float] = {}
    for path, value in found.items():
      for name, square in _named(path, numbers[path], value):
        totals[name] = totals.get(name, 0.0) + square
    order = lambda name: (0, int(name.split()[1])) if name.startswith("layer ") else (1, 0)
    return {name: float(np.sqrt(totals[name])) for name in sorted(totals, key=order)}


def _named(path: str, number: Any, value: Any) -> Iterator[tuple[str, float]]:
  """(layer, squared norm) of the parts of a parameter."""
  if np.ndim(number):
    for layer, square in zip(np.ravel(number).tolist(), np.ravel(value).tolist()):
      yield f"layer {layer}", square
  else:
    yield path.split("/")[0], float(value)


def lines(found: Replay, folder: epath.PathLike) -> Iterator[str]:
  """Lines that show a replay."""
  start = f"the checkpoint of step {found.begun}" if found.begun else "the state before step 0"
  m = found.metrics
  yield f"step {found.step} of {folder}, computed again from {start}"
  yield f"  loss {m['loss']:.6f}  grad norm {m['grad_norm']:.6f}  lr {m['lr']:.4e}"
  first, last = found.window
  which = f"step {first}" if first == last else f"steps {first} to {last}"
  if found.changed:
    yield (
      f"  the config changed at step {found.changed}, before the end of the log window that begins "
      f"at step {first}: its record is of both configs, so there is nothing to compare with"
    )
  elif found.logged is None:
    yield f"  metrics.jsonl has no record of {which} to compare with"
  elif unequal := found.unequal():
    name = unequal[0]
    yield (
      f"  DIFFERS from the record of {which} in {', '.join(unequal)}: {name} was "
      f"{found.logged[name]!r}, is {found.again[name]!r}"
    )
  else:
    loss = found.again.get("loss")  # a window of steps that were all skipped has none
    value = "all of it was skipped" if loss is None else f"loss {loss!r}"
    yield f"  identical to the bit to the record of {which}: {value}"
