"""Schedules as libtpu 0.0.52 wrote them, without the instructions that no test reads.

`dumps` has splash attention's kernels for 8,192 tokens, 32 heads of 128 and 8 key heads.
"""

import pathlib

import pytest

from jaxgpt.plan.schedule import bundles

DUMPS = pathlib.Path(__file__).parent / "dumps"


def text(name):
  return (DUMPS / f"{name}.txt").read_text()


@pytest.mark.parametrize(
  "name, outside, step, block, ends, grid",
  [
    ("v6e_512_fwd", 39, 268, 911, 252, (32, 16, 16)),
    ("v6e_512_dq", 45, 203, 1008, 68, (32, 16, 16)),
    ("v6e_512_dkv", 51, 286, 1274, 125, (16, 32, 16)),
    ("v6e_1024_fused_dkv", 53, 431, 5740, 236, (8, 32, 8)),
    ("v5p_512_segmented_fwd", 68, 398, 1183, 507, (16, 16, 16)),  # of one of two cores
  ],
)
def test_bundles_by_the_condition_they_run_under(name, outside, step, block, ends, grid):
  found = bundles.parse(text(name))
  assert (found.outside, found.step, found.block, found.ends) == (outside, step, block, ends)
  assert found.grid == grid
  # Every bundle has a kind. The last address of the real file is that of the last line.
  last = int(text(name).splitlines()[-1].split()[0], 16)
  assert outside + step + block + ends == last + 1


def test_windows_of_the_operands():
  q, k, v, ids, out, stats = bundles.parse(text("v6e_512_fwd")).windows
  assert q.whole.dims == (32, 8192, 128) and k.whole.dims == v.whole.dims == (8, 8192, 128)
  assert q.part.dims == k.part.dims == (1, 512, 128)
  assert (q.memory, ids.memory) == ("hbm", "vmem") and (q.kind, out.kind) == ("input", "output")
  assert out.part.dtype == "bf16" and stats.part.dtype == "f32"


def test_a_kernel_without_a_mask_computes_each_block():
  """Without hidden blocks no branch skips the matmuls."""
  lines = [
    line.split("sbr.rel")[0] + "}" if "$region56" in line else line
    for line in text("v6e_512_fwd").splitlines()
  ]
  found = bundles.parse("\n".join(lines))
  # All that the first iteration alone skips runs for each block.
  assert (found.step, found.block, found.ends) == (177, 911 + 268 - 177, 252)


@pytest.mark.parametrize(
  "old, new, reason",
  [
    ("LB:", "PF:", "0 loops"),
    ("vmatmul", "vadd", "no matmul in the loop"),
    ("Start/End empty region 56", "CT", "branches to unknown places"),
  ],
)
def test_other_schedules_are_not_understood(old, new, reason):
  with pytest.raises(bundles.NotUnderstood, match=reason):
    bundles.parse(text("v6e_512_fwd").replace(old, new))
