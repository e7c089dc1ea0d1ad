"""The choice of block sizes, and parity of the kernel at every form of blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model.attention import masks, reference
from jaxgpt.model.attention.blocks import choose, grid
from jaxgpt.model.attention.blocks.choose import Blocks
from jaxgpt.model.attention.blocks.grid import DKV, DQ, FORWARD, FUSED, Call
from jaxgpt.model.attention.kernels import splash
from jaxgpt.model.attention.masks import Band
from jaxgpt.model.attention.spec import Spec
from jaxgpt.parallel.chips import CHIPS
from tests import quick

CAUSAL = Band(causal=True)
V6E = CHIPS["v6e"]
ROW = Call(2, 32, 8, 8192, 8192, 128, CAUSAL)
SMALL, LARGE = (512, 512, 512), (1024, 1024, 512)
TABLE = {  # large blocks are faster per pair, and fused ones more so
  ("v6e", 128, FORWARD, *SMALL): (300, 1000, 250),
  ("v6e", 128, FORWARD, *LARGE): (300, 3600, 500),
  ("v6e", 128, DQ, *SMALL): (300, 1200, 100),
  ("v6e", 128, DKV, *SMALL): (400, 1450, 100),
  ("v6e", 128, FUSED, *LARGE): (600, 6200, 200),
}


@pytest.fixture
def table(monkeypatch):
  monkeypatch.setattr(choose, "MEASURED", TABLE)


def test_a_long_row_takes_large_blocks_and_the_fused_kernel(table):
  assert choose.find(ROW, V6E) == Blocks(LARGE, LARGE, fused=True)


def test_lengths_that_large_blocks_do_not_divide_take_small_ones(table):
  odd = ROW._replace(T=8192 + 512, S=8192 + 512)
  assert choose.find(odd, V6E) == Blocks(SMALL, SMALL, fused=False)


def test_a_short_window_takes_small_blocks(table):
  """A large block computes mostly hidden pairs, and the fused grid visits all of them."""
  assert choose.find(ROW._replace(band=Band(True, 256)), V6E) == Blocks(SMALL, SMALL, fused=False)


def test_parts_of_the_gradient_take_their_share_of_memory_at_most(table):
  # 2 rows x 32 heads x 8,192 x 128 in bfloat16, for each of 8 blocks of keys: 1 GiB.
  assert choose.parts_bytes(LARGE, ROW) == 2**30
  small = dataclasses.replace(V6E, hbm_limit=2**34)
  assert choose.find(ROW, small) == Blocks(LARGE, SMALL, fused=False)


@pytest.mark.parametrize("chip", [None, CHIPS["v4"], CHIPS["h100"]])
def test_without_measurements_all_blocks_are_the_chips(table, chip):
  assert choose.find(ROW, chip) == Blocks(SMALL, SMALL)
  assert choose.find(ROW._replace(T=640, S=1280), chip) == Blocks((128, 256, 256), (128, 256, 256))


def test_other_heads_are_not_measured(table):
  assert choose.find(ROW._replace(width=256), V6E) == Blocks(SMALL, SMALL)
  assert choose.seconds(FORWARD, SMALL, ROW._replace(width=256), V6E) is None


def test_seconds_are_the_bundles_of_the_grid(table):
  # 16 x 16 pairs of blocks of 64 heads, 136 of them visible; 16 rows of blocks each.
  cycles = 64 * (256 * 300 + 136 * 1000 + 16 * 250)
  assert choose.seconds(FORWARD, SMALL, ROW, V6E) == pytest.approx(cycles / V6E.clock)
  both = choose.backward_seconds(Blocks(SMALL, SMALL), ROW, V6E)
  assert both == choose.seconds(DQ, SMALL, ROW, V6E) + choose.seconds(DKV, SMALL, ROW, V6E)
  # The parts of the gradient and the sum: 1 GiB read, an eighth of it written.
  fused = 64 * (64 * 600 + 36 * 6200) + 16 * 8 * 200
  want = fused / V6E.clock + 2**30 * 9 / 8 / V6E.hbm_bandwidth
  assert choose.seconds(FUSED, LARGE, ROW, V6E) == pytest.approx(want)


@pytest.mark.parametrize(
  "chip, kernel, rows, cores",
  [("v5p", FORWARD, 1, 2), ("v5p", DQ, 1, 1), ("v5p", FUSED, 2, 2), ("v5e", FORWARD, 2, 1)],
)
def test_two_cores_divide_heads_forward_and_rows_backward(chip, kernel, rows, cores):
  assert grid.cores(kernel, ROW._replace(rows=rows), CHIPS[chip]) == cores


@pytest.mark.parametrize(
  "chip, call, parts",
  [
    ("v5p", ROW._replace(rows=1), 2),
    ("v5p", ROW, 1),  # the rows divide
    ("v5p", ROW._replace(rows=1, kv_heads=1), 1),  # no half of a key head
    ("v6e", ROW._replace(rows=1), 1),
    ("tpu7x", ROW._replace(rows=1), 1),  # two devices
  ],
)
def test_heads_of_a_single_row_are_spread_over_two_cores(chip, call, parts):
  got = grid.spread_call(call, CHIPS[chip])
  assert grid.spread(call, CHIPS[chip]) == parts == got.rows // call.rows
  assert got.rows * got.heads == call.rows * call.heads
  assert grid.cores(DKV, got, CHIPS[chip]) == (2 if chip == "v5p" and got.rows == 2 else 1)


def test_the_table_has_every_kernel_of_a_size():
  """`find` compares forward and backward kernels of each chip and width."""
  kinds = {}
  for chip, width, kernel, *size in choose.MEASURED:
    kinds.setdefault((chip, width), {}).setdefault(tuple(size), set()).add(kernel)
  assert {"v5e", "v5p", "v6e"} <= {chip for chip, _ in kinds}
  for sizes in kinds.values():
    assert all(FORWARD in kernels and kernels & {DKV, FUSED} for kernels in sizes.values())
    assert all((DQ in kernels) == (DKV in kernels) for kernels in sizes.values())


FORMS = [
  Blocks((128, 256, 128), (256, 256, 128), fused=True),  # several matmuls per block
  Blocks((256, 128, 128), (128, 128, 128), fused=True),  # parts without scratch memory
  Blocks((256, 256, 256), (256, 128, 128)),
]


@pytest.mark.parametrize(
  "blocks, parts, fields",
  quick.first(
    [
      (FORMS[0], 1, dict(causal=True, softcap=2.0)),
      (FORMS[1], 2, dict(causal=True, window=100)),
      (FORMS[2], 2, dict(causal=True)),
    ],
    1,
  ),
)
def test_every_form_of_blocks_agrees_with_the_definition(blocks, parts, fields, monkeypatch):
  monkeypatch.setattr(choose, "find", lambda call, chip: blocks)
  monkeypatch.setattr(grid, "spread", lambda call, chip: parts)  # heads as rows, for two cores
  T, keys = 512, jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (1, T, 4, 16))
  k, v = (jax.random.normal(key, (1, T, 2, 16)) for key in keys[1:])
  segments = jnp.array([[1] * 200 + [2] * (T - 200)])
  spec = Spec(scale=0.3, interpret=True, **fields)
  mask = masks.visible(segments, causal=True, window=spec.window)

  def both(f):
    out, vjp = jax.vjp(f, q, k, v)
    return out, vjp(jnp.cos(out))

  got = both(lambda q, k, v: splash.attention(q, k, v, segments, spec))
  want = both(lambda q, k, v: reference.attention(q, k, v, mask, scale=0.3, softcap=spec.softcap))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), got, want)
