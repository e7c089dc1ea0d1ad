"""Programs written by hand in the form in which XLA prints them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.plan import cost, hlo

TARGET = 'custom_call_target="tpu_custom_call"'
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'

LOOP = """HloModule m, is_scheduled=true

%condition (state: (s32[], f32[4])) -> pred[] {
  %state = (s32[], f32[4]) parameter(0)
  %limit = s32[] constant(8)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %compare = pred[] compare(%i, %limit), direction=LT
}

%body (state.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state.1 = (s32[], f32[4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %step = s32[] constant(2)
  %next = s32[] add(%i.1, %step)
  %x = f32[4] get-tuple-element(%state.1), index=1
  %y = f32[4] fusion(%x), kind=kLoop, calls=%fused, CYCLES10
  ROOT %out = (s32[], f32[4]) tuple(%next, %y)
}

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  ROOT %neg = f32[4] negate(%p)
}

ENTRY %main (a: f32[4]) -> (s32[], f32[4]) {
  %a = f32[4] parameter(0), metadata={op_name="state[\\'params\\'][\\'embed\\']"}
  %zero = s32[] constant(0)
  %start = (s32[], f32[4]) tuple(%zero, %a)
  ROOT %while = (s32[], f32[4]) while(%start), condition=%condition, body=%body
}
""".replace("CYCLES10", CYCLES % 10)


def test_a_loop_runs_as_often_as_its_counter_says():
  program = hlo.parse(LOOP)
  loop = program.find("main", "while")
  assert hlo.trips(program, "main", loop) == (4, True)  # 0, 2, 4, 6
  assert cost.of_program(program).cycles["other"] == 40
  noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
  assert cost.of_program(hlo.parse(noted)).cycles["other"] == 70
  counting_down = (
    LOOP.replace("direction=LT", "direction=GT")
    .replace("%zero = s32[] constant(0)", "%zero = s32[] constant(14)")
    .replace("%step = s32[] constant(2)", "%step = s32[] constant(-3)")
  )
  assert cost.of_program(hlo.parse(counting_down)).cycles["other"] == 20  # 14, 11


def test_work_without_an_estimate_is_named_and_not_added_as_cycles():
  absurd = LOOP.replace(CYCLES % 10, CYCLES % (2**63 - 1)).replace(
    "calls=%fused, ", 'calls=%fused, metadata={op_name="jit(step)/ragged_dot"}, '
  )
  found = cost.of_program(hlo.parse(absurd))
  assert found.cycles["other"] == 0
  assert found.unestimated == {"ragged_dot": [4, 4 * 2 * 16, 0]}
  assert found.unestimated_seconds(64.0, 1.0) == 2.0
  offloaded = LOOP.replace(
    "  %y = f32[4] fusion",
    """  %started = ((f32[9], s32[4]), f32[4], u32[]{:S(8)}) call-start(%x, %i.1), \
async_execution_thread="sparsecore", to_apply=%fused, metadata={op_name="jit(step)/gather"}
  %sorted = f32[4] sort(%x), dimensions={0}
  %y = f32[4] fusion""",
  )
  found = cost.of_program(hlo.parse(offloaded))
  assert found.cycles["other"] == 40
  assert found.unestimated == {
    "gather on the SparseCore": [4, 4 * 2 * 16, 0],
    "sort": [4, 4 * 2 * 16, 0],
  }


def test_names_of_arguments_are_read():
  assert hlo.parse(LOOP).find("main", "a").op_name == "state['params']['embed']"


def test_a_program_of_this_compiler_is_read():
  def f(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 16), (16, 16))]
  text = jax.jit(f).lower(*shapes).compile().as_text()
  assert cost.of_program(hlo.parse(text)).flops == 5 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
  "window, labels, lhs, rhs, out, flops",
  [
    ("{size=1}", "0bf_io0->0bf", "2,1024,64", "64,32,1", "2,1024,32", 2 * 2048 * 64 * 32),
    # A window of 3 over 8 with padding 1: the first and the last place meet padding once.
    ("{size=3 pad=1_1}", "b0f_0io->b0f", "1,8,4", "3,4,4", "1,8,4", 2 * 22 * 4 * 4),
    # Stride 2 over 8: 4 outputs, of which the first meets padding.
    ("{size=3 stride=2 pad=1_0}", "b0f_0io->b0f", "1,8,4", "3,4,4", "1,4,4", 2 * 11 * 4 * 4),
    # Holes between the inputs: every other place meets none.
    ("{size=2 lhs_dilate=2}", "b0f_0io->b0f", "1,4,4", "2,4,4", "1,6,4", 2 * 6 * 4 * 4),
  ],
)
def test_flops_of_what_a_tpu_makes_of_a_dot(window, labels, lhs, rhs, out, flops):
  text = f"""HloModule m
ENTRY %main (a: bf16[{lhs}], b: bf16[{rhs}]) -> bf16[{out}] {{
  %a = bf16[{lhs}] parameter(0)
  %b = bf16[{rhs}] parameter(1)
  ROOT %c = bf16[{out}] convolution(%a, %b), window={window}, dim_labels={labels}
}}
"""
  assert cost.of_program(hlo.parse(text)).flops == flops


GATHERS = """HloModule m, is_scheduled=true

%start (p.0: bf16[256]) -> (bf16[256], bf16[4096]) {
  %p.0 = bf16[256] parameter(0)
  %g.0 = bf16[4096] all-gather(%p.0), channel_id=7, dimensions={0}
  ROOT %s = (bf16[256], bf16[4096]) custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (p.1: bf16[256], p.2: f32[8]) -> (f32[8], bf16[4096]) {
  %p.1 = bf16[256] parameter(0)
  %p.2 = f32[8] parameter(1)
  %g.1 = bf16[4096] all-gather(%p.1), channel_id=7, dimensions={0}
  ROOT %t = (f32[8], bf16[4096]) tuple(%p.2, %g.1)
}

%all-reduce-scatter.1 (p.3: f32[4096]) -> f32[256] {
  %p.3 = f32[4096] parameter(0)
  %r = f32[4096] all-reduce(%p.3), channel_id=8, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %d = f32[256] dynamic-slice(%r, %zero), dynamic_slice_sizes={256}
}

ENTRY %main (a: bf16[256], b: f32[8], c: f32[4096]) -> f32[256] {
  %a = bf16[256] parameter(0)
  %b = f32[8] parameter(1)
  %c = f32[4096] parameter(2)
  %one = (bf16[256], bf16[4096]) fusion(%a), kind=kCustom, calls=%start
  %two = (f32[8], bf16[4096]) fusion(%a, %b), calls=%async_collective_fusion.3, CYCLES5
  %three = bf16[4096] all-gather(%a), channel_id=9, dimensions={0}
  %four = (bf16[256], bf16[4096], u32[], u32[]) collective-permute-start(%a), channel_id=10
  %kernel.1 = bf16[2,4,64,128] custom-call(%q, %q), TARGET, attributes={
"words":"in a line of their own"
}, metadata={op_name="jit(f)/pallas_call"}
  ROOT %five = f32[256] fusion(%c), calls=%all-reduce-scatter.1
}
""".replace("CYCLES5", CYCLES % 5).replace("TARGET", TARGET)


def test_each_collective_counts_once_and_as_what_it_is():
  found = cost.of_program(hlo.parse(GATHERS))
  assert found.collectives == {
    ("all-gather", "bf16", "overlapped"): [1, 8192],
    ("all-gather", "bf16", "exposed"): [1, 8192],
    ("collective-permute", "bf16", "overlapped"): [1, 8192],
    ("reduce-scatter", "f32", "exposed"): [1, 16384],
  }
  assert found.bytes("exposed") == 8192 + 16384
  assert found.kernels == {"kernel": [1, 0]}


def test_what_overlaps_is_hidden_only_as_long_as_there_is_something_to_compute():
  program = hlo.parse(GATHERS)
  assert cost.of_program(program).unhidden_bytes == 0
  assert cost.of_program(program, bytes_per_cycle=1000).unhidden_bytes == 2 * 8192 - 5000
  assert cost.of_program(program, bytes_per_cycle=1e6).unhidden_bytes == 0


def test_attention_kernels_are_known_by_name_and_shape():
  text = """HloModule m
ENTRY %main (q: bf16[2,8,256,128], k: bf16[2,2,512,128]) -> bf16[2,8,256,128] {
  %q = bf16[2,8,256,128] parameter(0)
  %k = bf16[2,2,512,128] parameter(1)
  ROOT %splash_mha_fwd_segmented.2 = bf16[2,8,256,128] custom-call(%q, %k), TARGET
}
""".replace("TARGET", TARGET)
  found = cost.of_program(hlo.parse(text))
  assert found.kernels == {"splash_mha_fwd_segmented": [1, 2 * 2 * 2 * 8 * 256 * 512 * 128]}


def test_the_heaviest_instructions_are_those_of_all_trips():
  program = hlo.parse(LOOP)
  (line,) = cost.heaviest(program, 3)
  assert (line.name, line.runs, line.cycles, line.shapes) == ("y", 4, 40, "f32[4]")
  assert cost.heaviest(program, 0) == []


@pytest.mark.parametrize(
  "text, groups",
  [
    ("replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
    ("replica_groups={{0,1,2,3}}", [[0, 1, 2, 3]]),
    ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), use_global", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'c'}, dimensions={1}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
  ],
)
def test_who_takes_part_in_a_collective(text, groups):
  made = hlo.Instruction("c", (), "all-gather", (), text, False)
  np.testing.assert_array_equal(hlo.groups(made), groups)


def test_a_collective_that_does_not_say_who_takes_part_is_all():
  assert hlo.groups(hlo.Instruction("c", (), "all-gather", (), "replica_groups={}", False)) is None
