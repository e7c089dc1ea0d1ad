"""The loss on held-out data, and what it means: bits per byte, accuracy."""

import jax

from jaxgpt.training import metrics

_SUMS = ("nll", "correct")  # of an objective's aux


def make_step(objective):
  """A jitted step(params, batch) -> {'tokens', 'nll', …}, the sums of one batch.

  Args:
    objective: see `objectives`.
  """

  def step(params, batch):
    _, weight, aux = objective(params, None, batch, None)
    return {"tokens": weight, **{name: aux[name] for name in _SUMS if name in aux}}

  return jax.jit(step)


def evaluate(step, params, batches, bytes_per_token):
  """Runs the model over batches.

  Args:
    step: from `make_step`.
    params: the weights.
    batches: iterable of batches on the devices.
    bytes_per_token: of the whole split, which turns nats a token into bits a byte; None where
      the loss does not predict each token of the text once.

  Returns:
    {'loss', 'tokens'}: nats per token (or per example) and their number; with them, as far as they
    mean something, 'perplexity', 'bits_per_byte' and 'accuracy'. Batches are added up in double
    precision.
  """
  totals = {"tokens": 0.0, "nll": 0.0}

  def add(sums):
    for name, value in jax.device_get(sums).items():
      totals[name] = totals.get(name, 0.0) + float(value)

  in_flight = None
  for batch in batches:
    sums = step(params, batch)
    if in_flight is not None:  # one batch late, so that the device is never idle
      add(in_flight)
    in_flight = sums
  if in_flight is not None:
    add(in_flight)
  count = max(totals["tokens"], 1)
  out = {"loss": totals["nll"] / count}
  if "correct" in totals:
    out["accuracy"] = totals["correct"] / count
  else:
    out["perplexity"] = metrics.perplexity(out["loss"])
  if bytes_per_token is not None:
    out["bits_per_byte"] = metrics.bits_per_byte(out["loss"], bytes_per_token)
  return out | {"tokens": int(totals["tokens"])}


def combined(parts):
  """The result over several sources, from those of each.

  Args:
    parts: {source: (result of `evaluate`, its bytes_per_token)}.

  Returns:
    As `evaluate`, and 'loss/SOURCE' of each.
  """
  results = [result for result, _ in parts.values()]
  tokens = sum(result["tokens"] for result in results)

  def mean(key, weights):
    return sum(r[key] * w for r, w in zip(results, weights)) / max(sum(weights), 1)

  counts = [result["tokens"] for result in results]
  out = {key: mean(key, counts) for key in ("loss", "accuracy") if key in results[0]}
  if "perplexity" in results[0]:
    out["perplexity"] = metrics.perplexity(out["loss"])
  if "bits_per_byte" in results[0]:
    sizes = [result["tokens"] * per_token for result, per_token in parts.values()]
    out["bits_per_byte"] = mean("bits_per_byte", sizes)
  return out | {"tokens": tokens} | {f"loss/{name}": r["loss"] for name, (r, _) in parts.items()}


def describe(result):
  """A result of `evaluate` in words: 'loss 1.2345, perplexity 3.44, …'."""
  forms = (
    ("loss", "loss {:.4f}"),
    ("perplexity", "perplexity {:.2f}"),
    ("accuracy", "accuracy {:.4f}"),
    ("bits_per_byte", "{:.4f} bits per byte"),
    ("tokens", "{:,} predictions"),
  )
  return ", ".join(form.format(result[name]) for name, form in forms if name in result)
