"""Seconds of attention by arithmetic: the calls of a layer, and what the search makes of them."""

import dataclasses
import json

import pytest

from jaxgpt import config
from jaxgpt.model.attention.blocks import choose, grid
from jaxgpt.model.attention.blocks.grid import Call
from jaxgpt.model.attention.masks import Band
from jaxgpt.parallel import mesh
from jaxgpt.parallel.chips import CHIPS
from jaxgpt.plan import lower, memory_estimate, per_device, time_estimate, topology
from jaxgpt.plan.schedule import estimate

CONFIG = "configs/llama3_8b.py"
SHAPE = dict(heads=32, kv_heads=8, width=128)


def resolved(**changes):
  overrides = [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
  return lower.resolve(config.load(CONFIG, overrides)[0])


@pytest.fixture(scope="module")
def llama():
  """Llama-3-8B on 64 chips, 2 rows of 8,192 tokens on each."""
  return resolved(data__batch_size=128)


def sizes_of(c, devices=64):
  return mesh.axis_sizes(c.mesh, devices)


def test_a_layer_on_whole_rows_is_one_call(llama):
  want = Call(rows=2, T=8192, S=8192, band=Band(True), **SHAPE)
  assert list(estimate.calls(llama, sizes_of(llama), "global")) == [(1, want)]


def test_a_ring_computes_its_own_chunk_and_pairs_of_the_others():
  c = resolved(data__batch_size=8, data__seq_len=131072, model__max_len=131072, mesh__seq=8)
  own, visits = estimate.calls(c, sizes_of(c), "global")
  assert own == (1, Call(rows=1, T=16384, S=16384, band=Band(True), **SHAPE))
  assert visits == (7, Call(rows=2, T=8192, S=8192, band=Band(), **SHAPE))


def test_a_window_needs_the_end_of_the_chunk_before():
  c = resolved(
    data__batch_size=32, mesh__seq=2, model__window=1000, model__attention_pattern="('local',)"
  )
  own, halo = estimate.calls(c, sizes_of(c), "local")
  assert own == (1, Call(rows=2, T=2048, S=2048, band=Band(True, 1000), **SHAPE))
  assert halo == (1, Call(rows=2, T=1024, S=1024, band=Band(True, 1000, 1024), **SHAPE))


def test_a_window_reaches_by_the_blocks_of_the_chip():
  """A window of 600 needs the last 599 keys: three blocks of 256, or one of 1,024."""
  c = resolved(
    data__batch_size=32, mesh__seq=2, model__window=600, model__attention_pattern="('local',)"
  )
  large = dataclasses.replace(CHIPS["v6e"], attention_block=1024)
  reach = lambda chip: list(estimate.calls(c, sizes_of(c), "local", chip))[1][1].T
  assert reach(dataclasses.replace(large, attention_block=256)) == 768
  assert reach(None) == reach(large) == 1024
  c.model.causal = False  # the chunk after this one lends its start too
  assert [call.band.offset for _, call in estimate.calls(c, sizes_of(c), "local", large)] == [
    0,
    1024,
    -1024,
  ]


def test_seconds_are_those_of_the_chosen_blocks(llama):
  chip, (_, call) = CHIPS["v6e"], next(estimate.calls(llama, sizes_of(llama), "global"))
  blocks = choose.find(call, chip)
  forward, backward = estimate.seconds(llama, sizes_of(llama), chip)
  assert forward == 32 * choose.seconds(grid.FORWARD, blocks.forward, call, chip)
  assert backward == 32 * choose.backward_seconds(blocks, call, chip)


def test_attention_that_is_not_saved_runs_forward_twice(llama):
  t = topology.parse("v6e-64")
  of = lambda remat: time_estimate.kernel_seconds(
    resolved(data__batch_size=128, model__remat=remat), sizes_of(llama), t
  )
  forward, _ = estimate.seconds(llama, sizes_of(llama), t.chip)
  assert of("full") - of("save:attention") == pytest.approx(forward)


def test_without_measured_blocks_the_rate_is_assumed(llama):
  t = topology.parse("v6e-64")
  unknown = t._replace(chip=dataclasses.replace(t.chip, name="v9"))
  assert estimate.seconds(llama, sizes_of(llama), unknown.chip) is None
  assumed = time_estimate.assumed_kernel_seconds(llama, sizes_of(llama), unknown)
  assert time_estimate.kernel_seconds(llama, sizes_of(llama), unknown) == assumed


def test_parts_of_a_fused_gradient_take_memory(llama):
  sizes, counts = sizes_of(llama), per_device.count(llama)
  (_, call), chip = next(estimate.calls(llama, sizes, "global")), CHIPS["v6e"]
  blocks = choose.find(call, chip)
  assert blocks.fused
  found = memory_estimate.buffers(llama, sizes, counts, chip)
  (parts,) = [b for b in found if "parts of a gradient" in b.name]
  # Queries of 2 rows, 32 heads, 8,192 x 128 in bfloat16, once for each block of keys.
  assert parts.bytes == 2 * 32 * 8192 * 128 * 2 * (8192 // blocks.backward[1])
  here = memory_estimate.buffers(llama, sizes, counts)  # on CPUs
  assert not any("parts of a gradient" in b.name for b in here)


def test_layers_count_by_their_kind_and_not_by_the_pattern():
  """Gemma 3: 26 layers, of which each sixth is global: 4 of them."""
  changes = dict(data__batch_size=128, model__window=1024, model__num_layers=26)
  c = resolved(**changes, model__attention_pattern=str(("local",) * 5 + ("global",)))
  sizes, chip = sizes_of(c), CHIPS["v6e"]
  alone = lambda kind: resolved(**changes, model__attention_pattern=f"('{kind}',)")
  one = lambda kind: [x / 26 for x in estimate.seconds(alone(kind), sizes, chip)]
  of_layers = [22 * a + 4 * b for a, b in zip(one("local"), one("global"), strict=True)]
  assert estimate.seconds(c, sizes, chip) == pytest.approx(of_layers)
  share = lambda c: time_estimate.visible_share(c, 512)
  mean = (22 * share(alone("local")) + 4 * share(alone("global"))) / 26
  assert share(c) == pytest.approx(mean)


def test_kernels_of_a_teacher_without_measured_blocks_are_assumed():
  t = topology.parse("v6e-64")
  m = config.resolve(config.load(CONFIG)[0]).model
  small = dict(
    vocab_size=m.vocab_size, max_len=m.max_len, num_layers=4, width=512, num_heads=4, head_dim=640
  )
  own = resolved(data__batch_size=128)
  taught = own.copy_and_resolve_references()
  taught.unlock()
  taught.objective.name = "distillation"
  taught.objective.teacher, taught.objective.teacher_config = "RUN", json.dumps(small)
  theirs = per_device.fixed(taught)["teacher"]
  assert estimate.seconds(theirs, sizes_of(own), t.chip) is None
  found = time_estimate.kernel_seconds(taught, sizes_of(own), t)
  assumed = time_estimate._assumed_forward(theirs, sizes_of(own), t.chip)
  assert found == time_estimate.kernel_seconds(own, sizes_of(own), t) + assumed > assumed > 0
  assert time_estimate.assumes_kernels(taught, t) and not time_estimate.assumes_kernels(own, t)
