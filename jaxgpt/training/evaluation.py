"""Evaluation on held-out data: loss, perplexity, bits per byte, accuracy, error of a regression."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import jax
import ml_collections
from jax.sharding import Mesh

from jaxgpt.data import pipeline
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import metrics, xla_options
from jaxgpt.training.objectives import LossFn
from jaxgpt.tree import PyTree

EvalStep: TypeAlias = Callable[[PyTree, PyTree], dict[str, jax.Array]]
Result: TypeAlias = dict[str, float]

# An objective's aux -> a metric
_MEANS = {"correct": "accuracy", "margin": "margin", "kl": "kl", "mse": "mse", "mae": "mae"}
COUNTS = ("true_positives", "predicted", "labelled")  # of classes, where rows have several
_SUMS = ("nll", *_MEANS, *COUNTS)


def make_step(loss_fn: LossFn, mesh: Mesh, compiler_options: Iterable[str] = ()) -> EvalStep:
  """Makes the jitted evaluation step.

  Args:
    loss_fn: From `objectives.make`. It gets no PRNG key, which turns dropout off.
    mesh: The device mesh.
    compiler_options: `mesh.compiler_options` of a run in training.

  Returns:
    step(params, batch) -> {'tokens', 'nll', …}: sums over one global batch.
  """

  def step(params: PyTree, batch: PyTree) -> dict[str, jax.Array]:
    _, weight, aux = loss_fn(params, None, batch, None)
    return {"tokens": weight, **{name: aux[name] for name in _SUMS if name in aux}}

  return jax.jit(step, compiler_options=xla_options.of_mesh(mesh, compiler_options))


def evaluate(
  step: EvalStep,
  params: PyTree,
  batches: Iterable[PyTree],
  bytes_per_token: float | None,
  per_token: bool = True,
) -> Result:
  """Runs the model over batches and computes the metrics.

  Args:
    step: From `make_step`.
    params: All weights.
    batches: Batches on the devices.
    bytes_per_token: UTF-8 bytes per prediction of the whole split, which converts nats per token
      to bits per byte. None where the batches do not predict each token of the text once.
    per_token: The loss is a cross entropy per token, so that its exponential is a perplexity.

  Returns:
    'loss' in nats per token (or per example) and 'tokens', their number. Where they have a meaning
    also 'perplexity', 'bits_per_byte', 'accuracy', 'margin' and 'kl' of preferences and, of a
    regression, 'mse' and 'mae', and where rows have several classes 'micro_f1' and the counts it
    comes from. Batches are summed in double precision.
  """
  totals = {"tokens": 0.0, "nll": 0.0}

  def add(sums: Mapping[str, jax.Array]) -> None:
    for name, value in jax.device_get(sums).items():
      totals[name] = totals.get(name, 0.0) + float(value)

  # The sums of a batch are read after the next batch is dispatched, so the device is never idle.
  in_flight = None
  for batch in batches:
    sums = step(params, batch)
    if in_flight is not None:
      add(in_flight)
    in_flight = sums
  if in_flight is not None:
    add(in_flight)
  count = max(totals["tokens"], 1)
  out = {"loss": totals["nll"] / count}
  means = {metric: totals[name] / count for name, metric in _MEANS.items() if name in totals}
  if per_token and not means.keys() & {"accuracy", "mse"}:
    out["perplexity"] = metrics.perplexity(out["loss"])
  out |= means | micro_f1(totals)
  if bytes_per_token is not None:
    out["bits_per_byte"] = metrics.bits_per_byte(out["loss"], bytes_per_token)
  return out | {"tokens": int(totals["tokens"])}


def micro_f1(sums: Mapping[str, float]) -> Result:
  """Micro-F1 and its counts, if there are some: 2 true positives / (predicted + labelled)."""
  if any(name not in sums for name in COUNTS):
    return {}
  counts = {name: sums[name] for name in COUNTS}
  found = max(counts["predicted"] + counts["labelled"], 1)
  return {"micro_f1": 2 * counts["true_positives"] / found} | counts


def combined(by_source: Mapping[str, tuple[Result, float | None]]) -> Result:
  """Combines the results of several sources into one.

  Args:
    by_source: {source: (result of `evaluate`, its bytes_per_token)}.

  Returns:
    The keys of `evaluate`, and 'loss/SOURCE' for each source.
  """
  results = [result for result, _ in by_source.values()]
  counts = [result["tokens"] for result in results]

  def mean(key: str, weights: list[float]) -> float:
    return sum(r[key] * w for r, w in zip(results, weights)) / max(sum(weights), 1)

  out: Result = {key: mean(key, counts) for key in ("loss", *_MEANS.values()) if key in results[0]}
  if "perplexity" in results[0]:
    out["perplexity"] = metrics.perplexity(out["loss"])
  if all("bits_per_byte" in result for result in results):  # not with labelled sources
    # A source's bits per byte are weighted by its bytes.
    num_bytes = [r["tokens"] * per_token for r, per_token in by_source.values() if per_token]
    out["bits_per_byte"] = mean("bits_per_byte", num_bytes)
  out |= micro_f1({name: sum(r[name] for r in results) for name in COUNTS if name in results[0]})
  out["tokens"] = sum(counts)
  return out | {f"loss/{name}": result["loss"] for name, (result, _) in by_source.items()}


def bytes_per_token(data: pipeline.Batches) -> float | None:
  """UTF-8 bytes of text per prediction of a split, or None if not all text is predicted."""
  return data.bytes / data.predictions if data.predicts_all else None


def is_part(data: pipeline.Batches, limit: int) -> bool:
  """Whether an evaluation of `limit` batches leaves out some of a split. 0: all of them."""
  return 0 < limit < data.steps_per_epoch


def held_out_batches(
  data: pipeline.Batches,
  mesh: jax.sharding.Mesh,
  c_data: ml_collections.ConfigDict,
  limit: int = 0,
) -> Iterator[PyTree]:
  """Batches of a split on the devices.

  Args:
    data: From `batches.split_batches`.
    mesh: The device mesh.
    c_data: The config's `data` section.
    limit: If positive, the first `limit` batches of the shuffled rows, the same ones each time, so
      that they represent the split. 0: all rows once.
  """
  share = batches_lib.host_share(mesh)
  reading = {"threads": c_data.threads, "prefetch": c_data.prefetch}
  if is_part(data, limit):
    batches = data.iterate(0, stop_step=limit, **share, **reading)
  else:
    batches = data.epoch_batches(**share, **reading)
  return (batches_lib.to_devices(batch, mesh) for batch in batches)


def evaluate_on(
  data: pipeline.Batches,
  mesh: jax.sharding.Mesh,
  c_data: ml_collections.ConfigDict,
  step: EvalStep,
  params: PyTree,
  limit: int = 0,
  goes_on: Callable[[], bool] = lambda: True,
) -> Result:
  """Evaluates a split: each source and all together, or some batches of the mixture.

  Args:
    data: From `batches.split_batches`.
    mesh: The device mesh.
    c_data: The config's `data` section.
    step: From `make_step`.
    params: All weights.
    limit: Number of batches. 0: all rows once.
    goes_on: Called before each batch. The evaluation ends early if it returns False.

  Returns:
    See `evaluate` and `combined`.
  """

  def run(data: pipeline.Batches) -> tuple[Result, float | None]:
    batches = held_out_batches(data, mesh, c_data, limit)
    batches = itertools.takewhile(lambda _: goes_on(), batches)
    per_byte, per_token = bytes_per_token(data), data.layout.predicts_tokens
    return evaluate(step, params, batches, per_byte, per_token), per_byte

  if len(data.sources) == 1 or is_part(data, limit):
    return run(data)[0]
  return combined({name: run(source) for name, source in data.by_source().items()})


def describe(result: Result) -> str:
  """A result of `evaluate` as text: 'loss 1.2345, perplexity 3.44, …'."""
  forms = (
    ("loss", "loss {:.4f}"),
    ("perplexity", "perplexity {:.2f}"),
    ("accuracy", "accuracy {:.4f}"),
    ("micro_f1", "micro-F1 {:.4f}"),
    ("margin", "margin {:.4f}"),
    ("kl", "KL {:.4f}"),
    ("mse", "mean squared error {:.4f}"),
    ("mae", "mean absolute error {:.4f}"),
    ("calibration_error", "calibration error {:.4f}"),
    ("bits_per_byte", "{:.4f} bits per byte"),
    ("tokens", "{:,} predictions"),
  )
  # A metric that is not finite is null in metrics.jsonl.
  return ", ".join(
    form.format(result[name]) for name, form in forms if result.get(name) is not None
  )
