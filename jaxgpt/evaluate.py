"""The loss on held-out text, and the bits per byte that it means."""

import jax
import jax.numpy as jnp

from jaxgpt import metrics


def make_step(objective):
  """A jitted step that adds a batch's sums to the totals so far.

  Args:
    objective: see `objectives`.

  Returns:
    step(totals, params, batch) -> totals; `zeros()` makes the first totals.
  """
  def step(totals, params, batch):
    _, weight, aux = objective(params, None, batch, None)
    return jax.tree.map(jnp.add, totals, {"tokens": weight, "nll": aux["nll"]})

  return jax.jit(step)


def zeros():
  """Totals before the first batch."""
  return {"tokens": jnp.zeros(()), "nll": jnp.zeros(())}


def evaluate(step, params, batches, bytes_per_token):
  """Runs the model over batches.

  Args:
    step: from `make_step`.
    params: the weights.
    batches: iterable of batches on the devices.
    bytes_per_token: of the whole split, which turns nats a token into bits a byte.

  Returns:
    {'loss', 'perplexity', 'bits_per_byte', 'tokens'}: nats per token, its exponential, bits per
    byte of the text (exact over a whole split), and the number of tokens that were predicted.
  """
  totals = zeros()
  for batch in batches:
    totals = step(totals, params, batch)
  totals = {k: float(v) for k, v in jax.device_get(totals).items()}
  loss = totals["nll"] / max(totals["tokens"], 1)
  return {"loss": loss, "perplexity": metrics.perplexity(loss),
          "bits_per_byte": metrics.bits_per_byte(loss, bytes_per_token),
          "tokens": int(totals["tokens"])}
