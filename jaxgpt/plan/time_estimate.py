"""Seconds of a train step by arithmetic, by kind of work. The search ranks its candidates by them.

Compiled figures decide. How far the arithmetic is from them is in `docs/benchmarks.md`.
"""

from collections.abc import Mapping

import ml_collections

from jaxgpt.config.keys.layer_kinds import mlp_kinds
from jaxgpt.config.remat import INPUT, activations
from jaxgpt.model import fixed_models, stacks
from jaxgpt.plan import per_device
from jaxgpt.plan.per_device import Counts, Share
from jaxgpt.plan.schedule import estimate
from jaxgpt.plan.schedule.kernels import ASSUMED_RATE
from jaxgpt.plan.topology import Topology
from jaxgpt.run import teacher
from jaxgpt.training import objectives

_KERNEL_BACKWARD = 3.5  # work of the backward kernels relative to the forward kernel

# Memory traffic in units of an array of one layer. The counts were fitted to the schedules of
# compiled programs: Llama-2-7B and Llama-3-8B on v5e, v5p and v6e (docs/log.md).
_LAYER_PASSES = 60  # x residual stream: everything that is neither a matmul nor a kernel
_SAVED_PASSES = 5  # x saved activations: stacked, sliced out of the stack, read
_TENSOR_PASSES = 33  # x residual stream, for each additional device that shards the heads
_RING_PASSES = 45, 35  # x queries in float32: once per ring, and for each of its hops
_TENSOR_HOPS = 10  # x residual stream: gathers and scatters of both branches, forward and backward


def seconds(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], counts: Counts, topology: Topology
) -> dict[str, float]:
  """Rough seconds of a step by kind of work, with the kinds of `report.figures`.

  Args:
    c: A resolved config.
    sizes: Sizes of the mesh axes, {axis: size}.
    counts: The model's weights, from `per_device.count`.
    topology: The hardware.

  Returns:
    {'matmul', 'other', 'kernels', 'exposed', 'between', 'host'}. 'exposed' is time spent waiting
    for collectives within a slice, 'between' for those between slices, 'host' for activations on
    their way to the host's memory and back.

  Raises:
    UserError: The layers do not divide into the pipeline stages.
  """
  m, s, chip = c.model, per_device.share(c, sizes), topology.chip
  assert chip is not None, "the estimate needs a chip's rates"
  tokens = s.tokens * c.optim.accumulate
  pipe = stacks.pipeline_of(c, sizes)
  busy = 1 - (pipe.bubble if pipe else 0)
  saved = per_device.kept_names(c.model.remat)
  flops = _matmul_flops(m, s, saved, tokens) + _forward_flops(c, sizes) * tokens
  matmul = flops / (chip.clocked_flops * chip.matmul_rate) / busy
  sent = counts.sent_bytes(sizes, per_device.itemsize(m))
  gathered = sent * sizes["fsdp"] * (sizes["fsdp"] > 1)
  # A pipeline stage gathers its layers for each tick.
  times = c.optim.accumulate * (pipe.ticks if pipe else 1)
  # The weights are gathered in the forward and in the backward pass, then their gradients are
  # reduced. The reduction is exposed on every chip, the gathers only on some.
  reduced = gathered * (2 if _all_reduces(sizes, topology) else 1)
  hidden, summed = (2 * gathered, reduced) if chip.overlaps_gathers else (0, 2 * gathered + reduced)
  exposed = (
    max(summed, sent * 2 * (sizes["data"] * sizes["seq"] > 1)) * times
    + _activation_bytes_between_devices(c, sizes, s, tokens)
  ) / chip.ici_bandwidth
  between = 0.0
  if topology.slices > 1:
    # With data over slices, one reduction of the gradients crosses the network; with fsdp over
    # slices the weights cross it too.
    bytes_ = 2 * sent if sizes["data"] % topology.slices == 0 else 3 * gathered * times
    between = bytes_ * (topology.slices - 1) / topology.slices / chip.dcn_bandwidth
  other = tokens * _traffic_per_token(c, sizes, s) / chip.hbm_bandwidth / busy
  kernels = kernel_seconds(c, sizes, topology) / busy
  # Activations leave for the host during the forward pass, and come back during the backward pass.
  host = tokens * _host_bytes_per_token(m, s) / chip.host_bandwidth if chip.host_bandwidth else 0.0
  compute = matmul + other + kernels
  forward = compute * _forward_share(m, s, saved)
  return {
    "matmul": matmul,
    "other": other,
    "kernels": kernels,
    "exposed": exposed + max(hidden * times / chip.ici_bandwidth - matmul, 0),
    "between": between,
    "host": max(host - forward, 0) + max(host - (compute - forward), 0),
  }


def _host_bytes_per_token(m: ml_collections.ConfigDict, s: Share) -> float:
  """Bytes per token that a device moves to the host's memory, and later back."""
  widths, names = per_device.widths(m), activations(m.remat).offloaded
  on_device = sum(widths[n] / s.shards(n) for n in names if n != INPUT)
  on_device += m.width / s.residual * (INPUT in names)
  return m.num_layers * per_device.itemsize(m) * on_device


def _all_reduces(sizes: Mapping[str, int], topology: Topology) -> bool:
  """Whether gradients are summed by an all-reduce, of which a device keeps its part.

  libtpu does so over a whole slice, and scatters only the sums over a part of one (docs/log.md).
  """
  assert topology.chip is not None, "the estimate needs a chip's rates"
  return not topology.chip.gpu and sizes["fsdp"] * topology.slices == topology.num_devices


def kernel_seconds(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], topology: Topology
) -> float:
  """Seconds of a step's attention kernels, by measured blocks or `assumed_kernel_seconds`."""
  assert topology.chip is not None, "the estimate needs a chip's rates"
  found = estimate.seconds(c, sizes, topology.chip)
  if found is None:
    return assumed_kernel_seconds(c, sizes, topology)
  forward, backward = found
  again = per_device.share(c, sizes).sequences * c.optim.accumulate
  own = (forward * (1 + _recomputes(c.model) + _gradient_cache(c)) + backward) * again
  for one in _fixed_models(c):
    theirs = estimate.seconds(one, sizes, topology.chip)
    own += again * theirs[0] if theirs else 0.0
  return own


def assumes_kernels(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], topology: Topology
) -> bool:
  """Whether the kernels' seconds are assumed, because no blocks are measured for them."""
  return topology.chip is not None and estimate.seconds(c, sizes, topology.chip) is None


def assumed_kernel_seconds(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], topology: Topology
) -> float:
  """Seconds of attention kernels at the assumed rate, for chips and heads without measurements."""
  m, s, chip = c.model, per_device.share(c, sizes), topology.chip
  assert chip is not None, "the estimate needs a chip's rates"
  pairs = c.data.seq_len * s.tokens * c.optim.accumulate
  passes = 1 + _KERNEL_BACKWARD + _recomputes(m) + _gradient_cache(c)
  of_pair = lambda m: 4 * m.num_layers * per_device.all_heads(m) / s.heads
  fixed = sum(of_pair(one.model) for one in _fixed_models(c))
  flops = pairs * (of_pair(m) * passes + fixed)
  return flops * visible_share(c, chip.attention_block) / (chip.clocked_flops * ASSUMED_RATE)


def _recomputes(m: ml_collections.ConfigDict) -> bool:
  """Whether the backward pass runs the forward kernel again."""
  saved = per_device.kept_names(m.remat)
  return "attention" not in saved


def _gradient_cache(c: ml_collections.ConfigDict) -> bool:
  """Whether microbatches are computed again for their gradients, see `microbatches.mapped`."""
  return objectives.find(c).whole_batch and c.optim.accumulate > 1


def _fixed_models(c: ml_collections.ConfigDict) -> list[ml_collections.ConfigDict]:
  """The configs of the models that the loss runs forward only, see `model.fixed_models`."""
  names = objectives.find(c).fixed(c)
  of = {fixed_models.REFERENCE: lambda: c, fixed_models.TEACHER: lambda: teacher.config_of(c)}
  return [of[name]() for name in names]


def _forward_flops(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> float:
  """FLOPs per token of a device's matmuls in further forward passes: fixed models, and a cache."""
  out = 0.0
  for one in _fixed_models(c) + [c] * _gradient_cache(c):
    m, s = one.model, per_device.share(one, sizes)
    head = m.width * m.vocab_size / s.vocab if m.head == "lm" else 0
    out += 2 * (m.num_layers * sum(_weights(m, s).values()) + head)
  return out


def _weights(m: ml_collections.ConfigDict, s: Share) -> dict[str, float]:
  """Entries of a device's weights by the activation that they produce, for one layer."""
  return {
    name: count / (s.mlp if name in ("gate", "up", "down") else s.heads)
    for name, count in per_device.layer_weights(m).items()
  }


def _matmul_flops(
  m: ml_collections.ConfigDict, s: Share, saved: tuple[str, ...], tokens: float
) -> float:
  """FLOPs of a device's matmuls in a step, recomputation included."""
  weights = _weights(m, s)
  recomputed = sum(weights[n] for n in ("q", "k", "v", "o", "gate", "up") if n not in saved)
  head = m.width * m.vocab_size / s.vocab if m.head == "lm" else 0
  return tokens * (
    6 * (m.num_layers * sum(weights.values()) + head) + 2 * m.num_layers * recomputed
  )


def _forward_share(m: ml_collections.ConfigDict, s: Share, saved: tuple[str, ...]) -> float:
  """Share of the matmuls' FLOPs that the forward pass of the layers has."""
  forward = 2 * m.num_layers * sum(_weights(m, s).values())
  return forward / _matmul_flops(m, s, saved, 1.0)


def _traffic_per_token(c: ml_collections.ConfigDict, sizes: Mapping[str, int], s: Share) -> float:
  """Bytes per token that are read and written outside matmuls and kernels."""
  m, itemsize, widths = c.model, per_device.itemsize(c.model), per_device.widths(c.model)
  saved = per_device.kept_names(m.remat)
  on_device = {n: widths[n] / s.shards(n) for n in saved}
  each = itemsize * (m.width / s.residual * _LAYER_PASSES + sum(on_device.values()) * _SAVED_PASSES)
  if s.heads * s.mlp > 1:  # between the matmuls of a branch a device holds whole tokens
    each += itemsize * m.width / s.residual * _TENSOR_PASSES * (max(s.heads, s.mlp) - 1)
  if sizes["seq"] > 1:  # partial outputs are added up, and so are partial gradients
    each += 4 * widths["q"] / s.heads * (_RING_PASSES[0] + _RING_PASSES[1] * (sizes["seq"] - 1))
  # Logits are written once in the forward pass, read and written again in the backward pass.
  return m.num_layers * each + (4 * 4 * m.vocab_size / s.vocab if m.head == "lm" else 0)


def _activation_bytes_between_devices(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], s: Share, tokens: float
) -> float:
  """Bytes of activations that a device waits for in a step."""
  m, widths = c.model, per_device.widths(c.model)
  each, total = m.num_layers * tokens * per_device.itemsize(m), 0.0
  if s.heads * s.mlp > 1:
    total += _TENSOR_HOPS * each * m.width
  if sizes["seq"] > 1:
    # One hop of keys and values, forward and backward, and one of their gradients; the others are
    # hidden behind the attention of the previous hop.
    total += 3 * each * (widths["k"] + widths["v"]) / s.heads
  if sizes["expert"] > 1:  # to the experts and back, forward, backward and where computed again
    kinds = mlp_kinds(m)
    routed = kinds.count("moe") / len(kinds) * m.moe.per_token * max(m.moe.capacity, 1)
    again = m.remat != "none" and "up" not in per_device.kept_names(m.remat)
    total += (6 if again else 4) * each * m.width * routed
  return total


def visible_share(c: ml_collections.ConfigDict, block: int, seq: int = 1) -> float:
  """Fraction of query-key pairs that attention kernels compute, averaged over the layers.

  A kernel skips a block of pairs only if the mask hides all of them.

  Args:
    c: A resolved config.
    block: Block size of the kernel in tokens, `Chip.attention_block`.
    seq: Devices that share a row and exchange keys in a ring. See `model.attention.ring`.
  """
  T = c.data.seq_len / seq
  # A device computes its own pairs with a causal mask, and for each other device half as many
  # pairs, all of them visible.
  causal = (
    (min((T + block) / (2 * T), 1) + (seq - 1) / 2) / ((seq + 1) / 2) if c.model.causal else 1
  )
  local = causal
  if c.model.window:
    size = T if seq == 1 else T / 2  # of the chunks that a device has; their neighbors lend ends
    far = 0 if seq == 1 else min(c.model.window / size, seq) * (1 if c.model.causal else 2)
    local = min((c.model.window + block) / (size * (1 + far)), causal)
  pattern = c.model.attention_pattern
  return sum(local if kind == "local" else causal for kind in pattern) / len(pattern)
