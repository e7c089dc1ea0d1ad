"""What is reported about a run: means over steps, FLOPs, utilisation, bits per byte."""

import math

import ml_collections

from jaxgpt import tree
from jaxgpt.model import transformer
from jaxgpt.parallel import sharding


def flops_per_token(c_model, seq_len):
  """FLOPs that training spends on a token: forward, and twice that backward (arXiv:2204.02311, B).

  Two a multiply-add, matmuls only. Attention counts every query-key pair of the row, masked or
  not, or as many as the window of a local layer has; of the experts those count that a token goes
  to; recomputation counts nothing, which makes the ratio to the peak MFU and not HFU.

  Args:
    c_model: the config's `model` section, resolved.
    seq_len: tokens a row.
  """
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c_model))
  shapes, axes = transformer.abstract(model)
  axes = tree.flatten(axes, is_leaf=sharding.is_axes)
  lookups = {"pos_embed", "type_embed"}
  if c_model.head != "lm" or not c_model.tie_embeddings:
    lookups.add("embed")
  weights = 0
  for name, shape in tree.flatten(shapes).items():
    if sharding.is_weight(axes[name]) and name not in lookups:
      used = c_model.moe.per_token / c_model.moe.experts if "experts" in axes[name] else 1
      weights += used * tree.count(shape)
  pattern = c_model.attention_pattern
  read = sum(
    min(seq_len, c_model.window) if pattern[i % len(pattern)] == "local" else seq_len
    for i in range(c_model.num_layers)
  )
  attention = read * c_model.num_heads * (c_model.head_dim + c_model.latent.v_dim)
  return round(6 * (weights + attention))


def bits_per_byte(nll, num_bytes):
  """Bits that the model needs for a byte of text.

  Args:
    nll: sum of the negative log likelihoods of the text's tokens, in nats.
    num_bytes: UTF-8 bytes of that text.
  """
  return nll / math.log(2) / num_bytes


def perplexity(nll):
  """exp of a mean negative log likelihood in nats; inf where that overflows."""
  return math.exp(nll) if nll < 700 else math.inf


class Means:
  """Means over the steps between two log lines, weighted by their tokens."""

  _LAST = ("lr", "param_norm")  # states, not flows: the newest value counts

  def __init__(self, steps=0, sums=None, last=None):
    self._steps, self._sums, self._last = steps, sums or {}, last or {}

  def state(self):
    """What `Means(**state)` goes on from: plain JSON values, restored to the last bit."""
    return {"steps": self._steps, "sums": dict(self._sums), "last": dict(self._last)}

  def add(self, metrics):
    """Adds one step's metrics: a dict of floats with 'tokens'."""
    self._steps += 1
    for name, value in metrics.items():
      if name in self._LAST:
        self._last[name] = value
      else:
        share = {"tokens": 1, "grad_norm": 1}.get(name, metrics["tokens"])
        self._sums[name] = self._sums.get(name, 0.0) + value * share

  def take(self):
    """The means since the last call, and starts anew. 'tokens' is a sum."""
    tokens = self._sums.pop("tokens", 0.0)
    out = {
      name: total / (self._steps if name == "grad_norm" else max(tokens, 1e-9))
      for name, total in self._sums.items()
    }
    out |= self._last | {"tokens": tokens}
    self._steps, self._sums, self._last = 0, {}, {}
    return out
