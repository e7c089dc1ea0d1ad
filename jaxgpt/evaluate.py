"""The loss on held-out text, and the bits per byte that it means."""

import jax

from jaxgpt import metrics


def make_step(objective):
  """A jitted step(params, batch) -> {'tokens', 'nll'}, the sums of one batch.

  Args:
    objective: see `objectives`.
  """
  def step(params, batch):
    _, weight, aux = objective(params, None, batch, None)
    return {"tokens": weight, "nll": aux["nll"]}

  return jax.jit(step)


def evaluate(step, params, batches, bytes_per_token):
  """Runs the model over batches.

  Args:
    step: from `make_step`.
    params: the weights.
    batches: iterable of batches on the devices.
    bytes_per_token: of the whole split, which turns nats a token into bits a byte; None: they
      say nothing, because not all of the text was predicted.

  Returns:
    {'loss', 'perplexity', 'bits_per_byte', 'tokens'}: nats per token, its exponential, bits per
    byte of the text (unless bytes_per_token is None), and the number of tokens that were predicted.
    Batches are added up in double precision.
  """
  totals = {"tokens": 0.0, "nll": 0.0}

  def add(sums):
    for name, value in jax.device_get(sums).items():
      totals[name] += float(value)

  in_flight = None
  for batch in batches:
    sums = step(params, batch)
    if in_flight is not None:  # one batch late, so that the device is never idle
      add(in_flight)
    in_flight = sums
  if in_flight is not None:
    add(in_flight)
  loss = totals["nll"] / max(totals["tokens"], 1)
  result = {"loss": loss, "perplexity": metrics.perplexity(loss), "tokens": int(totals["tokens"])}
  if bytes_per_token is not None:
    result["bits_per_byte"] = metrics.bits_per_byte(loss, bytes_per_token)
  return result
