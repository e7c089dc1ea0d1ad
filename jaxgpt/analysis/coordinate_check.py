"""The coordinate check: do activations keep their size as a model grows?

A few steps of training at several sizes, from the same data. In a parametrization that transfers
its learning rate (muP, arXiv:2203.03466, appendix D.1), the numbers of each activation, and their
changes by training, are of order 1 whatever the width: on a log-log plot they lie on a flat line.
In the standard one, changes grow with the width:

  log change |          / standard, slope 1
             |        /
             |  ----/------- muP, slope 0
             +------------------ log width

B batch, T query position, S key position, D model.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxgpt.analysis import token_rows
from jaxgpt.analysis.interpret import taps
from jaxgpt.data import pipeline, stages
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run.process import text_table
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import train_step
from jaxgpt.tree import PyTree

WIDTH, DEPTH = "width", "depth"
GROWS = ("num_heads", "head_dim")  # what grows with the width
_ROWS = 4  # rows of the batch in which activations are read
# Activations that a branch adds depend on the depth by design: only sums of branches are compared.
_TAPS = {
  WIDTH: ("embed", "pattern", "attn_out", "mlp_out", "resid_final"),
  DEPTH: ("embed", "resid_final"),
}
_NAMES = {
  "embed": "embeddings",
  "pattern": "attention logits",
  "attn_out": "attention",
  "mlp_out": "MLP",
  "resid_final": "residual stream",
  "logits": "logits",
}


class Row(NamedTuple):
  """An activation at all sizes, as root mean squares that are averaged over the seeds.

  Attributes:
    name: Such as 'attention of layer 0'.
    sizes: Of its numbers after the steps.
    changes: Of the difference to its numbers before them.
    slope: Of log size against log width or depth.
    change_slope: Of log change against the same.
    error: Standard error of `change_slope`, from its spread over the seeds; NaN for one seed.
    problem: Why the activation does not pass, or ''.
    unclear: Whether `problem` may be noise: the tolerance is within two standard errors.
  """

  name: str
  sizes: tuple[float, ...]
  changes: tuple[float, ...]
  slope: float
  change_slope: float
  error: float
  problem: str
  unclear: bool


class Check(NamedTuple):
  """The result of a coordinate check.

  Attributes:
    over: 'width' or 'depth'.
    at: The widths or depths.
    steps: Steps of training.
    seeds: Number of seeds.
    tolerance: Largest slope that passes.
    rows: One per activation.
  """

  over: str
  at: tuple[int, ...]
  steps: int
  seeds: int
  tolerance: float
  rows: list[Row]

  @property
  def passes(self) -> bool:
    """Whether all activations pass."""
    return not any(row.problem for row in self.rows)

  @property
  def unclear(self) -> bool:
    """Whether more seeds could let the check pass: all its problems may be noise."""
    return not self.passes and all(row.unclear for row in self.rows if row.problem)


def check(
  c: ml_collections.ConfigDict,
  at: Sequence[int],
  over: str = WIDTH,
  *,
  steps: int = 4,
  seeds: int = 2,
  tolerance: float = 0.25,
  grow: str = GROWS[0],
) -> Check:
  """Trains a config for a few steps at several sizes and compares activations.

  The learning rate is constant, without warmup, and dropout is off. Every size gets the same
  batches. Activations are read in the first rows of the first batch.

  Args:
    c: A config from `config.load`, with data.
    at: Widths or depths, at least 2, rising.
    over: 'width' or 'depth'.
    steps: Steps of training.
    seeds: Seeds of the initial weights, counted from the config's.
    tolerance: Largest absolute slope of changes, and largest slope of sizes.
    grow: For widths: 'num_heads' of the same size, or 'head_dim'.

  Raises:
    UserError: A size does not suit the model, its objective reads pairs of texts, or its training
      is not finite.
  """
  if len(at) < 2 or list(at) != sorted(set(at)):
    raise UserError(f"{over}s {', '.join(map(str, at))}: give at least two, rising")
  configs = {size: _sized(c, over, size, grow) for size in at}
  for own in configs.values():  # mistakes are reported before anything is trained
    _, resolved = batches_lib.load_tokenizer_and_config(own)
    if problem := token_rows.obstacle(resolved):
      raise UserError(
        f"objective.name={c.objective.name!r}: {problem}, which a coordinate check reads; set it "
        "to causal_lm and data.path to a folder of text"
      )
  readings = [
    _measured(own, seeds, steps, f"{over} {size}", _TAPS[over]) for size, own in configs.items()
  ]
  log_at, rows = np.log(np.asarray(at, float)), []
  for name in readings[0][0]:
    # [sizes, seeds, (size, change)]
    values = np.array([[seed[name] for seed in of_size] for of_size in readings])
    logs = np.log(np.maximum(values, 1e-30))
    slopes = _slopes(log_at, logs)
    may_fall = over == WIDTH and grow == GROWS[1] and name.startswith(_NAMES["pattern"])
    sizes, changes = (tuple(map(float, np.exp(logs.mean(1)[:, i]))) for i in range(2))
    rows.append(_row(name, sizes, changes, slopes, tolerance, may_fall))
  return Check(over, tuple(at), steps, seeds, tolerance, rows)


def _slopes(log_at: np.ndarray, logs: np.ndarray) -> np.ndarray:
  """Slopes of lines through [sizes, seeds, (size, change)]: [seeds, (size, change)]."""
  centred = log_at - log_at.mean()
  return np.einsum("n,nsi->si", centred, logs) / np.square(centred).sum()


def _row(
  name: str,
  sizes: tuple[float, ...],
  changes: tuple[float, ...],
  slopes: np.ndarray,
  tolerance: float,
  may_fall: bool = False,
) -> Row:
  """Judges an activation by the slopes of its size and its change for each seed.

  A slope beyond the tolerance is a problem. Seeds differ, so a problem that vanishes if each slope
  moves by two of its standard errors towards 0 is unclear. With one seed nothing is.
  """
  seeds, mean = len(slopes), slopes.mean(0)
  errors = slopes.std(0, ddof=1) / math.sqrt(seeds) if seeds > 1 else np.full(2, math.nan)
  slope, change_slope = mean.tolist()
  problem = _problem(slope, change_slope, tolerance, may_fall)
  nearest, change_nearest = (np.sign(mean) * np.maximum(np.abs(mean) - 2 * errors, 0)).tolist()
  beyond_noise = _problem(nearest, change_nearest, tolerance, may_fall)
  unclear = bool(problem) and seeds > 1 and not beyond_noise
  return Row(name, sizes, changes, slope, change_slope, float(errors[1]), problem, unclear)


def _problem(slope: float, change_slope: float, tolerance: float, may_fall: bool = False) -> str:
  """Sizes may fall, as those of logits do at first (their initial values are no signal).

  Changes of attention logits may fall too (`may_fall`) if heads grow: scaled by 1 / head_dim, they
  begin near zero, and in the first steps queries and keys are not aligned yet.
  """
  found = []
  if slope > tolerance:
    found.append("grows")
  if change_slope > tolerance or (change_slope < -tolerance and not may_fall):
    found.append("learns faster" if change_slope > 0 else "learns slower")
  return ", ".join(found)


def _sized(
  c: ml_collections.ConfigDict, over: str, size: int, grow: str
) -> ml_collections.ConfigDict:
  """The config at another width or depth, with a constant learning rate. Not resolved."""
  c = c.copy_and_resolve_references()
  c.schedule.name, c.schedule.warmup_steps = "constant", 0
  c.model.dropout, c.data.stages = 0.0, ()
  m = c.model
  if over == DEPTH:
    m.num_layers = size
    return c
  before, heads = m.width, m.num_heads

  def grown(key: str, value: int) -> int:
    if value * size % before:
      raise UserError(
        f"width {size}: {key}={value} at model.width={before} gives no whole number at this width; "
        "choose multiples"
      )
    return value * size // before

  m.width = size
  if grow == "head_dim":
    if m.head_dim is not None:
      m.head_dim = grown("model.head_dim", m.head_dim)
    grown("model.num_heads' size", before // heads)
  else:
    m.head_dim = m.head_dim or before // heads
    m.num_heads = grown("model.num_heads", heads)
    if m.num_kv_heads is not None:
      m.num_kv_heads = grown("model.num_kv_heads", m.num_kv_heads)
  if m.mlp_width is not None:
    m.mlp_width = grown("model.mlp_width", m.mlp_width)
  if m.moe.width is not None:
    m.moe.width = grown("model.moe.width", m.moe.width)
  return c


_Reading = dict[str, tuple[float, float]]  # name: (size, change), both root mean squares


def _measured(
  c: ml_collections.ConfigDict, seeds: int, steps: int, which: str, wanted: Sequence[str]
) -> list[_Reading]:
  """For each seed, sizes and changes of a model's activations, at taps that it has.

  One program trains all seeds: they differ in their initial weights and their batches.
  """
  _, c = batches_lib.load_tokenizer_and_config(c)
  mesh = mesh_lib.make(c.mesh)
  parts = build_lib.build(c, mesh)
  data = batches_lib.training_data(c)
  if not isinstance(data, pipeline.Batches):
    raise UserError("a coordinate check needs prepared data; leave data.stream out")
  model = taps.readable(parts.model)
  names = tuple(tap for tap in wanted if tap in taps.OF_MODEL or taps.layers_with(model.cfg, tap))
  function = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  shapes = batches_lib.shapes(data, stages.configs(c)[0][0])
  step_fn = train_step.compile(function, parts.state, shapes, mesh, c.mesh.compiler_options)
  out = []
  for seed in range(c.seed, c.seed + seeds):
    own = c.copy_and_resolve_references()
    own.seed = seed
    data = batches_lib.training_data(own)
    inputs = _inputs(data.batch(0))
    with jax.set_mesh(mesh):
      state = train_step.first_state(parts.model, parts.tx, seed, parts.state)
      before = _activations(model, train_step.own_weights(state), inputs, names)
      for step in range(steps):
        state, metrics = step_fn(state, batches_lib.to_devices(data.batch(step), mesh))
      if int(metrics["nonfinite_step"]) >= 0:
        raise UserError(
          f"{which}: step {int(metrics['nonfinite_step'])} is not finite; lower optim.lr"
        )
      after = _activations(model, train_step.own_weights(state), inputs, names)
    out.append({name: (_rms(x), _rms(x - before[name])) for name, x in after.items()})
  return out


def _inputs(batch: PyTree) -> taps.Inputs:
  """The first rows of a batch."""
  first = lambda name: jnp.asarray(batch[name][:_ROWS]) if name in batch else None
  return taps.Inputs(jnp.asarray(batch["tokens"][:_ROWS]), first("segment_ids"), first("positions"))


def _activations(
  model: transformer.Transformer, params: PyTree, inputs: taps.Inputs, names: tuple[str, ...]
) -> dict[str, np.ndarray]:
  """{name: numbers}, float32."""
  found = taps.read(model, params, inputs, names)
  out = {}
  for tap in names:
    x = found.at[tap].astype(jnp.float32)
    if tap == "pattern":
      x = _attention_logits(x)
    if tap in taps.OF_MODEL:
      out[_NAMES[tap]] = np.asarray(x)
    else:
      for layer, of_layer in zip(taps.layers_with(model.cfg, tap), x, strict=True):
        out[f"{_NAMES[tap]}, layer {layer}"] = np.asarray(of_layer)
  if model.cfg.head != "none":
    out[_NAMES["logits"]] = np.asarray(found.output.logits, np.float32)
  return out


def _attention_logits(pattern_LBNTS: jax.Array) -> jax.Array:
  """Attention logits less their mean over the keys that a query sees, from their softmax."""
  seen = pattern_LBNTS > 0
  logs = jnp.where(seen, jnp.log(jnp.maximum(pattern_LBNTS, 1e-37)), 0.0)
  mean = logs.sum(-1, keepdims=True) / jnp.maximum(seen.sum(-1, keepdims=True), 1)
  return jnp.where(seen, logs - mean, 0.0)


def _rms(x: np.ndarray) -> float:
  return math.sqrt(float(np.square(x, dtype=np.float64).mean()))


def lines(found: Check) -> list[str]:
  """Lines that show a check: the change of each activation at each size, slopes, the verdict.

  A slope of a change has its standard error, if there are several seeds. An unclear problem has a
  question mark.
  """
  head = ("activation", *(f"{found.over} {size}" for size in found.at), "slope", "of size", "")
  cells = [
    (
      row.name,
      *(f"{change:.3g}" for change in row.changes),
      f"{row.change_slope:+.2f}" + ("" if math.isnan(row.error) else f" ± {row.error:.2f}"),
      f"{row.slope:+.2f}",
      row.problem + ("?" if row.unclear else ""),
    )
    for row in found.rows
  ]
  bad = [row for row in found.rows if row.problem]
  seeds = f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"
  verdict = f"{len(found.rows)} activations are flat: settings transfer over the {found.over}"
  if bad:
    verdict = (
      f"{len(bad)} of {len(found.rows)} activations are not flat: settings do not transfer over "
      f"the {found.over}"
    )
  if found.unclear:
    verdict += f", but all may be noise: give more seeds than {found.seeds} (--seeds)"
  word = "UNCLEAR" if found.unclear else "FAILS" if bad else "passes"
  return [
    f"change of activations by {found.steps} steps (root mean square, {seeds}), and the slope of "
    f"its logarithm and of that of the size against log {found.over}",
    *text_table.lines(head, cells, last_left=True),
    f"{word}: {verdict} (slopes up to {found.tolerance:g} count as flat)",
  ]
