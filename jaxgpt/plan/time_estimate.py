"""Seconds of a train step by arithmetic, by kind of work. The search ranks its candidates by them.

Compiled figures decide. How far the arithmetic is from them is in `docs/benchmarks.md`.
"""

import functools
import math
from collections.abc import Callable, Mapping

import ml_collections

from jaxgpt.config.keys.layer_kinds import attention_kinds, mlp_kinds
from jaxgpt.config.remat import ATTENTION, INPUT, QKV, activations
from jaxgpt.model import stacks
from jaxgpt.model.attention.masks import Band
from jaxgpt.parallel import mesh
from jaxgpt.parallel.chips import Chip
from jaxgpt.plan import per_device, weight_traffic
from jaxgpt.plan.per_device import Counts, Share
from jaxgpt.plan.schedule import estimate
from jaxgpt.plan.schedule.kernels import ASSUMED_RATE
from jaxgpt.plan.topology import Topology
from jaxgpt.training import objectives, xla_options

_KERNEL_BACKWARD = 3.5  # work of the backward kernels relative to the forward kernel

# Share of the activations' bytes that matmuls read and write while they do not compute. With it all
# but one of 24 schedules of widths from 1,024 to 8,192 on v5e, v5p and v6e agree (docs/log.md).
_UNHIDDEN_MATMUL_BYTES = 0.85

_PIPELINED = "xla_tpu_pipeline_memory_host_transfers"  # libtpu's option, true if it is not given

# Memory traffic in units of an array of one layer. The counts were fitted to the schedules of
# compiled programs (docs/log.md).
_LAYER_PASSES = 18, 40  # x residual stream, x queries: what is neither a matmul nor a kernel
_SAVED_PASSES = 2.5  # x saved activations: stacked, sliced out of the stack, read
_TENSOR_PASSES = 33  # x residual stream, for each additional device that shards the heads
_RING_PASSES = 45, 35  # x queries in float32: once per ring, and for each of its hops
_EXPERT_PASSES = 34, 8  # x tokens in the slots of experts, x their hidden activations
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
    UserError: The layers do not divide into the pipeline stages, or no mesh axis into the slices.
  """
  m, s, chip = c.model, per_device.share(c, sizes), topology.chip
  assert chip is not None, "the estimate needs a chip's rates"
  tokens = s.tokens * c.optim.accumulate
  pipe = stacks.pipeline_of(c, sizes)
  busy = 1 - (pipe.bubble if pipe else 0)
  saved = per_device.kept_names(c.model.remat)
  trained = counts.trained_shares(m)
  flops = _matmul_flops(m, s, saved, trained)
  bytes_ = _matmul_bytes(m, s, saved, trained[0])
  matmul = _matmul_seconds(tokens * flops, tokens * bytes_, chip)
  matmul = (matmul + tokens * _forward_seconds(c, sizes, chip)) / busy
  traffic = weight_traffic.of_step(c, sizes, counts)
  # The weights are gathered in the forward and in the backward pass, then their gradients are
  # reduced. The reduction is exposed on every chip, the gathers only on some.
  gathers = 2 * traffic.gathered + _gathered_forward(c, sizes)
  reduced = traffic.scattered * (2 if _all_reduces(sizes, topology) else 1) + 2 * traffic.summed
  hidden, shown = (gathers, reduced) if chip.overlaps_gathers else (0, gathers + reduced)
  exposed = shown + _activation_bytes_between_devices(c, sizes, s, tokens)
  other = tokens * _traffic_per_token(c, sizes, s, not chip.gpu) / chip.hbm_bandwidth / busy
  kernels = kernel_seconds(c, sizes, topology) / busy
  host = 0.0
  if chip.host_bandwidth:
    forward = 2 * m.num_layers * sum(_weights(m, s).values()) / flops
    host = _host_waits(c, s, saved, tokens, matmul + other + kernels, forward, chip)
  return {
    "matmul": matmul,
    "other": other,
    "kernels": kernels,
    "exposed": exposed / chip.ici_bandwidth + max(hidden / chip.ici_bandwidth - matmul, 0),
    "between": _seconds_between_slices(c, sizes, counts, gathers + traffic.scattered, topology),
    "host": host,
  }


def _seconds_between_slices(
  c: ml_collections.ConfigDict,
  sizes: Mapping[str, int],
  counts: Counts,
  of_fsdp: float,
  topology: Topology,
) -> float:
  """Seconds of what crosses the network between slices, over the mesh axis that covers them.

  One reduction of the gradients of weights that the slices share. With fsdp over slices the other
  weights and their gradients, with stages over them the activations of each tick.

  Args:
    c: A resolved config.
    sizes: Sizes of the mesh axes.
    counts: The model's weights.
    of_fsdp: Bytes of weights and gradients that are gathered and scattered over fsdp.
    topology: The hardware.
  """
  if topology.slices == 1:
    return 0.0
  assert topology.chip is not None, "the estimate needs a chip's rates"
  axis = mesh.axis_over_slices(sizes, topology.slices)
  around = 2 * weight_traffic.summed_over(c, sizes, counts, axis)
  if axis == "fsdp":
    around += of_fsdp
  bytes_ = around * (topology.slices - 1) / topology.slices
  if axis == "stage":
    bytes_ += _stage_bytes(c, sizes)
  return bytes_ / topology.chip.dcn_bandwidth


def _gathered_forward(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> float:
  """Bytes of weights that are gathered for further forward passes in a step."""
  passes = _forward_passes(c)
  return sum(weight_traffic.of_step(one, sizes, per_device.count(one)).gathered for one in passes)


def _stage_bytes(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> float:
  """Bytes of activations and their gradients that a device sends to the next stage in a step."""
  m, s, pipe = c.model, per_device.share(c, sizes), stacks.pipeline_of(c, sizes)
  if pipe is None:
    return 0.0
  # The results of a tick, and the buffer of microbatches that enter and leave: see `pipeline.run`.
  rows = s.rows * pipe.stages / pipe.microbatches
  each = 2 * rows * s.length * m.width / s.residual * per_device.itemsize(m)
  return 2 * pipe.ticks * each * s.sequences * c.optim.accumulate


def _host_waits(
  c: ml_collections.ConfigDict,
  s: Share,
  saved: tuple[str, ...],
  tokens: float,
  compute: float,
  forward_share: float,
  chip: Chip,
) -> float:
  """Seconds that a step waits for activations on their way to the host's memory and back.

  An activation leaves after its matmul, those that attention reads after its kernel, and has time
  until the end of its layer. It comes back from the start of its layer's backward pass to its first
  use. If the loops are pipelined, other layers hide the transfers too.

  Args:
    c: A resolved config.
    s: Shares of a device.
    saved: Activations that are kept, from `per_device.kept_names`.
    tokens: Tokens of a device in a step.
    compute: Seconds of compute in a step.
    forward_share: Share of the matmuls' FLOPs that the forward pass of the layers has.
    chip: Its rates.
  """
  m, widths = c.model, per_device.widths(c.model, s.routed, not chip.gpu)
  names = activations(m.remat).offloaded
  each = m.num_layers * tokens * per_device.itemsize(m) / chip.host_bandwidth
  moves = {n: each * widths[n] / s.shards(n) for n in names if n != INPUT}
  if INPUT in names:
    moves[INPUT] = each * m.width / s.residual
  options = xla_options.options(chip.device_kinds[0], c.mesh.compiler_options)
  if options.get(_PIPELINED, "true") == "true":
    forward = compute * forward_share
    return sum(max(sum(moves.values()) - hides, 0) for hides in (forward, compute - forward))
  of_weight = 2 * m.num_layers * tokens / chip.clocked_flops
  took = {name: of_weight * count for name, count in _weights(m, s).items()}
  of_mlp = took["gate"] + took["up"] + took["down"]
  again = sum(took[n] for n in ("gate", "up") if n not in saved)
  attention = (*QKV, ATTENTION)
  # Seconds of matmuls after an activation in the forward pass, and before it in the backward pass.
  after = dict.fromkeys(attention, took["o"] + of_mlp) | {INPUT: sum(took.values()), "o": of_mlp}
  after |= {"gate": took["up"] + took["down"], "up": took["gate"] + took["down"], "down": 0.0}
  before = dict.fromkeys(attention, 2 * of_mlp + again)
  before |= dict.fromkeys(("gate", "up"), took["down"] + again)
  before |= dict.fromkeys((INPUT, "o", "down"), 0.0)
  return _wait_to_host(moves, after) + _wait_from_host(moves, before)


def _wait_to_host(moves: Mapping[str, float], hides: Mapping[str, float]) -> float:
  """Seconds that transfers to the host, one after the other, last beyond the end of their layer.

  Args:
    moves: {activation: seconds of its transfer}.
    hides: {activation: seconds of compute from its start to the end of the layer}.
  """
  now = -math.inf
  for name in sorted(moves, key=lambda name: hides[name], reverse=True):
    now = max(now, -hides[name]) + moves[name]
  return max(now, 0.0)


def _wait_from_host(moves: Mapping[str, float], hides: Mapping[str, float]) -> float:
  """Seconds that compute waits for transfers from the host, one after the other.

  Args:
    moves: {activation: seconds of its transfer}.
    hides: {activation: seconds of compute from the start of the layer to its first use}.
  """
  now, waited = 0.0, 0.0
  for name in sorted(moves, key=lambda name: hides[name]):
    now += moves[name]
    waited = max(waited, now - hides[name])
  return waited


def _all_reduces(sizes: Mapping[str, int], topology: Topology) -> bool:
  """Whether gradients are summed by an all-reduce, of which a device keeps its part.

  libtpu does so over a whole slice, and scatters only the sums over a part of one (docs/log.md).
  """
  assert topology.chip is not None, "the estimate needs a chip's rates"
  return not topology.chip.gpu and sizes["fsdp"] * topology.slices == topology.num_devices


def kernel_seconds(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], topology: Topology
) -> float:
  """Seconds of a step's attention kernels, by measured blocks or at the assumed rate."""
  assert topology.chip is not None, "the estimate needs a chip's rates"
  again = per_device.share(c, sizes).sequences * c.optim.accumulate
  found = estimate.seconds(c, sizes, topology.chip)
  own = (
    again * (found[0] * (1 + _recomputes(c.model) + _gradient_cache(c)) + found[1])
    if found
    else _own_assumed(c, sizes, topology.chip)
  )
  for one in per_device.fixed(c).values():
    theirs = estimate.seconds(one, sizes, topology.chip)
    own += again * theirs[0] if theirs else _assumed_forward(one, sizes, topology.chip)
  return own


def assumes_kernels(c: ml_collections.ConfigDict, topology: Topology) -> bool:
  """Whether kernels' seconds are assumed, because no blocks are measured for them."""
  sizes, chip = mesh.axis_sizes(c.mesh, topology.num_devices), topology.chip
  models = (c, *per_device.fixed(c).values())
  return chip is not None and any(estimate.seconds(one, sizes, chip) is None for one in models)


def assumed_kernel_seconds(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], topology: Topology
) -> float:
  """Seconds of attention kernels at the assumed rate, for chips and heads without measurements."""
  assert topology.chip is not None, "the estimate needs a chip's rates"
  fixed = (_assumed_forward(one, sizes, topology.chip) for one in per_device.fixed(c).values())
  return _own_assumed(c, sizes, topology.chip) + sum(fixed)


def _own_assumed(c: ml_collections.ConfigDict, sizes: Mapping[str, int], chip: Chip) -> float:
  """Seconds of the trained model's kernels in a step, at the assumed rate."""
  passes = 1 + _KERNEL_BACKWARD + _recomputes(c.model) + _gradient_cache(c)
  return passes * _assumed_forward(c, sizes, chip)


def _assumed_forward(c: ml_collections.ConfigDict, sizes: Mapping[str, int], chip: Chip) -> float:
  """Seconds of a model's kernels in the forward passes of a step, at the assumed rate."""
  m, s = c.model, per_device.share(c, sizes)
  pairs = c.data.seq_len * s.tokens * c.optim.accumulate
  flops = pairs * 4 * m.num_layers * per_device.all_heads(m) / s.heads
  return flops * visible_share(c, chip.attention_block) / (chip.clocked_flops * ASSUMED_RATE)


def _recomputes(m: ml_collections.ConfigDict) -> bool:
  """Whether the backward pass runs the forward kernel again."""
  saved = per_device.kept_names(m.remat)
  return "attention" not in saved


def _gradient_cache(c: ml_collections.ConfigDict) -> bool:
  """Whether microbatches are computed again for their gradients, see `microbatches.mapped`."""
  return objectives.find(c).whole_batch and c.optim.accumulate > 1


def _forward_passes(c: ml_collections.ConfigDict) -> list[ml_collections.ConfigDict]:
  """Configs of the models with a further forward pass: fixed models, and a gradient cache."""
  return [*per_device.fixed(c).values(), *[c] * _gradient_cache(c)]


def _matmul_seconds(flops: float, bytes_: float, chip: Chip) -> float:
  """Seconds of matmuls by their FLOPs, and by the bytes of activations that they read and write.

  The bytes count on TPUs. `matmul_rate` of GPUs includes them.
  """
  unhidden = 0.0 if chip.gpu else _UNHIDDEN_MATMUL_BYTES * bytes_ / chip.hbm_bandwidth
  return flops / (chip.clocked_flops * chip.matmul_rate) + unhidden


def _forward_seconds(c: ml_collections.ConfigDict, sizes: Mapping[str, int], chip: Chip) -> float:
  """Seconds per token of matmuls in further forward passes: fixed models, and a gradient cache."""
  out = 0.0
  for one in _forward_passes(c):
    m, s = one.model, per_device.share(one, sizes)
    head = m.width * m.vocab_size / s.vocab if m.head == "lm" else 0
    flops = 2 * (m.num_layers * sum(_weights(m, s).values()) + head)
    bytes_ = m.num_layers * per_device.itemsize(m) * sum(_matmul_numbers(m, s).values())
    out += _matmul_seconds(flops, bytes_, chip)
  return out


def _weights(m: ml_collections.ConfigDict, s: Share) -> dict[str, float]:
  """Entries of a device's weights by the activation that they produce, for one layer."""
  return {
    name: count / (s.mlp if name in ("gate", "up", "down") else s.heads)
    for name, count in per_device.layer_weights(m, s.routed).items()
  }


def _matmul_flops(
  m: ml_collections.ConfigDict, s: Share, saved: tuple[str, ...], trained: tuple[float, float]
) -> float:
  """FLOPs per token of a device's matmuls in a step, recomputation included.

  Args:
    m: The `model` section.
    s: Shares of a device.
    saved: Activations that are kept, from `per_device.kept_names`.
    trained: From `Counts.trained_shares`. Frozen weights need no gradient of their own.
  """
  weights = _weights(m, s)
  recomputed = _recomputed(_weights, m, s, saved)
  head = m.width * m.vocab_size / s.vocab if m.head == "lm" else 0
  of_layers = (4 + 2 * trained[0]) * sum(weights.values()) + 2 * recomputed
  return m.num_layers * of_layers + (4 + 2 * trained[1]) * head


def _recomputed(
  of: Callable[[ml_collections.ConfigDict, Share], dict[str, float]],
  m: ml_collections.ConfigDict,
  s: Share,
  saved: tuple[str, ...],
) -> float:
  """Of a figure per matmul, the sum over those that the backward pass computes again."""
  figures = of(m, s)
  kept = of(m, s._replace(routed=per_device.kept_rows(m, s.routed)))
  names = ("q", "k", "v", "o", "gate", "up")
  return sum(figures[n] - kept[n] * (n in saved) for n in names)


def _matmul_bytes(
  m: ml_collections.ConfigDict, s: Share, saved: tuple[str, ...], trained: float
) -> float:
  """Bytes per token that the layers' matmuls read and write in a step, weights left out."""
  again = _recomputed(_matmul_numbers, m, s, saved)
  forward = sum(_matmul_numbers(m, s).values())
  return m.num_layers * per_device.itemsize(m) * ((2 + trained) * forward + again)


def _matmul_numbers(m: ml_collections.ConfigDict, s: Share) -> dict[str, float]:
  """Numbers per token that a device's matmul of each activation reads and writes, for one layer."""
  w = per_device.widths(m, s.routed)
  copies = w["up"] / (m.moe.width if m.moe.experts else m.mlp_width)  # experts of a token
  latent = m.latent
  into = {"q": latent.q_rank or m.width, "o": w["attention"] / s.heads, "down": w["up"] / s.mlp}
  into |= dict.fromkeys(("k", "v"), latent.kv_rank or m.width)
  into |= {"gate": copies * m.width * m.gated, "up": copies * m.width}
  out = {name: w[name] / s.shards(name) for name in (*QKV, "gate", "up")}
  out |= {"o": m.width, "down": copies * m.width}
  return {name: into[name] + out[name] for name in into}


def _traffic_per_token(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], s: Share, padded: bool
) -> float:
  """Bytes per token that are read and written outside matmuls and kernels, heads perhaps padded."""
  m, itemsize = c.model, per_device.itemsize(c.model)
  widths = per_device.widths(m, s.routed, padded)
  kept = per_device.widths(m, per_device.kept_rows(m, s.routed), padded)
  saved = sum(kept[n] / s.shards(n) for n in per_device.kept_names(m.remat))
  of_residual, of_queries = _LAYER_PASSES
  each = m.width / s.residual * of_residual + widths["q"] / s.heads * of_queries
  each = itemsize * (each + saved * _SAVED_PASSES)
  of_tokens, of_hidden = _EXPERT_PASSES
  each += itemsize * _routed(m, s) * (of_tokens * m.width + of_hidden * m.moe.width / s.mlp)
  if s.heads * s.mlp > 1:  # between the matmuls of a branch a device holds whole tokens
    each += itemsize * m.width / s.residual * _TENSOR_PASSES * (max(s.heads, s.mlp) - 1)
  if sizes["seq"] > 1:  # partial outputs are added up, and so are partial gradients
    each += 4 * widths["q"] / s.heads * (_RING_PASSES[0] + _RING_PASSES[1] * (sizes["seq"] - 1))
  if m.head != "lm":
    return m.num_layers * each
  # Logits are written once in the forward pass, read and written again in the backward pass. For
  # each chunk of them, the gradient of the head's weight is read and written.
  logits = 4 * 4 * m.vocab_size / s.vocab
  if 0 < (chunk := c.objective.loss_chunk) < s.tokens:
    logits += 2 * 4 * m.width * m.vocab_size / s.vocab / chunk
  return m.num_layers * each + logits


def _activation_bytes_between_devices(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], s: Share, tokens: float
) -> float:
  """Bytes of activations that a device waits for in a step."""
  m, widths = c.model, per_device.widths(c.model, s.routed)
  each, total = m.num_layers * tokens * per_device.itemsize(m), 0.0
  if s.heads * s.mlp > 1:
    total += _TENSOR_HOPS * each * m.width
  if sizes["seq"] > 1:
    # One hop of keys and values, forward and backward, and one of their gradients; the others are
    # hidden behind the attention of the previous hop.
    total += 3 * each * (widths["k"] + widths["v"]) / s.heads
  if per_device.experts(c, sizes).exchanged > 1:
    # To the experts and back, in the forward and the backward pass and where computed again.
    total += (4 if m.remat == "none" else 5) * each * m.width * _routed(m, s)
  return total


def _routed(m: ml_collections.ConfigDict, s: Share) -> float:
  """Rows in the routed experts for each token, as a mean over the layers. 0 without experts."""
  kinds = mlp_kinds(m)
  return kinds.count("moe") / len(kinds) * s.routed


def visible_share(c: ml_collections.ConfigDict, block: int, seq: int = 1) -> float:
  """Fraction of query-key pairs that attention kernels compute, averaged over the layers.

  A kernel skips a block of pairs only if the mask hides all of them.

  Args:
    c: A resolved config.
    block: Block size of the kernel in tokens, `Chip.attention_block`.
    seq: Devices that share a row and exchange keys in a ring. See `model.attention.ring`.
  """
  m, T = c.model, c.data.seq_len // seq
  # A device computes its own pairs with a causal mask, and for each other device half as many
  # pairs, all of them visible.
  own = _computed(Band(m.causal), T, block)
  whole = (own + (seq - 1) / 2) / ((seq + 1) / 2) if m.causal else 1
  local = whole
  if m.window and seq == 1:
    local = _computed(Band(m.causal, m.window), T, block)
  elif m.window:
    size = T / 2  # of the chunks that a device has; their neighbors lend ends
    far = min(m.window / size, seq) * (1 if m.causal else 2)
    keys = m.window if m.causal else 2 * m.window - 1
    local = min((keys + block) / (size * (1 + far)), whole)
  kinds = attention_kinds(m)
  return sum(local if kind == "local" else whole for kind in kinds) / len(kinds)


@functools.cache  # the search asks for the same few masks thousands of times
def _computed(band: Band, T: int, block: int) -> float:
  """Fraction of the pairs of T queries and T keys in blocks that a mask does not hide."""
  block = math.gcd(T, block)
  return float(band.blocks(T, T, block, block).mean())
