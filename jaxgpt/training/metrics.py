"""Metrics of training: means over a log window, FLOPs per token, bits per byte, perplexity."""

import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from jaxgpt import tree
from jaxgpt.config.keys.layer_kinds import attention_kinds
from jaxgpt.model import transformer
from jaxgpt.parallel import sharding


def flops_per_token(c_model: ml_collections.ConfigDict, seq_len: int) -> int:
  """FLOPs of training per token: the forward pass, and twice that for the backward pass.

  This follows PaLM (arXiv:2204.02311, appendix B). Only matmuls count, a multiply-add as 2.
  Attention counts every query-key pair of a row, masked or not. A local layer counts its window, on
  both sides of a query without a causal mask. Of the experts, those that a token is routed to
  count. Recomputation does not count, so the ratio to the peak is MFU, not HFU.

  Args:
    c_model: The config's `model` section, resolved.
    seq_len: Tokens per row.
  """
  fields = c_model.to_dict()
  fields["lora"] = fields["lora"] | dict(base="float32")  # a code is a weight
  model = transformer.Transformer(ml_collections.FrozenConfigDict(fields))
  shapes, axes = transformer.abstract(model)
  axes = tree.flatten(axes, is_leaf=sharding.is_axes)
  lookups = {"pos_embed", "type_embed"}
  if c_model.head != "lm" or not c_model.tie_embeddings:
    lookups.add("embed")
  weights = 0.0
  for name, shape in tree.flatten(shapes).items():
    if sharding.is_weight(axes[name]) and name not in lookups:
      used = c_model.moe.per_token / c_model.moe.experts if "experts" in axes[name] else 1
      weights += used * tree.count(shape)
  kinds = attention_kinds(c_model)
  read = kinds.count("local") * _keys_of_window(c_model, seq_len)
  read += (len(kinds) - kinds.count("local")) * seq_len
  attention = read * c_model.num_heads * (c_model.head_dim + c_model.latent.v_dim)
  return round(6 * (weights + attention))


def _keys_of_window(m: ml_collections.ConfigDict, seq_len: int) -> int:
  """Most keys that a query of a local layer reads, or 0 without a window."""
  if m.window is None:
    return 0
  return min(seq_len, m.window if m.causal else 2 * m.window - 1)


def bits_per_byte(nll: float, num_bytes: float) -> float:
  """Bits that the model needs per byte of text.

  Args:
    nll: Sum of the negative log likelihoods of the text's tokens, in nats.
    num_bytes: UTF-8 bytes of that text.
  """
  return nll / math.log(2) / num_bytes


def perplexity(nll: float) -> float:
  """exp of a mean negative log likelihood in nats, or inf if that overflows."""
  return math.exp(nll) if nll < 700 else math.inf


SKIPPED = "skipped_steps"


class Means:
  """Means over the steps between two log lines, weighted by their tokens."""

  _LAST = ("lr", "param_norm")  # of these the newest value is reported, not a mean

  def __init__(
    self,
    steps: int = 0,
    sums: Mapping[str, float | str] | None = None,
    last: Mapping[str, float | str] | None = None,
  ):
    """Starts an empty window, or continues one from `state`."""
    numbers = lambda found: {name: float(value) for name, value in (found or {}).items()}
    self._steps, self._sums, self._last = steps, numbers(sums), numbers(last)

  def state(self) -> dict[str, Any]:
    """The window as plain JSON. `Means(**state)` continues it exactly.

    JSON has no numbers that are not finite. They are strings here, which `float` reads.
    """
    plain = lambda found: {k: v if math.isfinite(v) else str(v) for k, v in found.items()}
    return {"steps": self._steps, "sums": plain(self._sums), "last": plain(self._last)}

  def add(self, metrics: Mapping[str, float]) -> None:
    """Adds one step's metrics, with its number of 'tokens'."""
    self._steps += 1
    for name, value in metrics.items():
      if name in self._LAST:
        self._last[name] = value
      else:
        weight = {"tokens": 1, "grad_norm": 1}.get(name, metrics["tokens"])
        self._sums[name] = self._sums.get(name, 0.0) + value * weight

  def add_skipped(self) -> None:
    """Counts a step that changed nothing, and whose metrics are not finite."""
    self._sums[SKIPPED] = self._sums.get(SKIPPED, 0.0) + 1

  def take(self) -> dict[str, float]:
    """Returns the means since the last call and empties the window.

    'tokens' is a sum, and so is 'skipped_steps', of which the means know nothing. If all steps were
    skipped, there are no means.
    """
    tokens = self._sums.pop("tokens", 0.0)
    skipped = {SKIPPED: self._sums.pop(SKIPPED)} if SKIPPED in self._sums else {}
    out = {
      name: total / (self._steps if name == "grad_norm" else max(tokens, 1e-9))
      for name, total in self._sums.items()
    }
    out |= self._last | {"tokens": tokens} | skipped
    self._steps, self._sums, self._last = 0, {}, {}
    return out
