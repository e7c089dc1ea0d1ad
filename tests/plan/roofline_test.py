"""The roofline of programs in the form in which XLA prints them."""

import dataclasses

import pytest

from jaxgpt.parallel import chips
from jaxgpt.plan import hlo, roofline

PROGRAM = """HloModule m, is_scheduled=true

%copied (p: f32[4,1024], i: s32[]) -> f32[1,1024] {
  %p = f32[4,1024] parameter(0)
  %i = s32[] parameter(1)
  %flat = f32[4,1024] bitcast(%p)
  ROOT %slice = f32[1,1024] dynamic-slice(%flat, %i, %i), dynamic_slice_sizes={1,1024}
}

%written (q: f32[4,1024], n: f32[1,1024], j: s32[]) -> f32[4,1024] {
  %q = f32[4,1024] parameter(0)
  %n = f32[1,1024] parameter(1)
  %j = s32[] parameter(2)
  ROOT %update = f32[4,1024] dynamic-update-slice(%q, %n, %j, %j)
}

%body (state: (s32[], f32[4,1024])) -> (s32[], f32[4,1024]) {
  %state = (s32[], f32[4,1024]) parameter(0)
  %k = s32[] get-tuple-element(%state), index=0
  %x = f32[4,1024] get-tuple-element(%state), index=1
  %row = f32[1,1024] fusion(%x, %k), kind=kLoop, calls=%copied
  %y = f32[4,1024] fusion(%x, %row, %k), kind=kLoop, calls=%written
  ROOT %out = (s32[], f32[4,1024]) tuple(%k, %y)
}

%condition (state.1: (s32[], f32[4,1024])) -> pred[] {
  %state.1 = (s32[], f32[4,1024]) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: bf16[512,1024], b: bf16[1024,2048], c: (s32[], f32[4,1024])) -> bf16[512,2048] {
  %a = bf16[512,1024] parameter(0)
  %b = bf16[1024,2048] parameter(1)
  %c = (s32[], f32[4,1024]) parameter(2)
  %start = ((bf16[512,1024]), bf16[1024,1024]) all-gather-start(%a), GROUPS, dimensions={0}
  %while = (s32[], f32[4,1024]) while(%c), condition=%condition, body=%body, TRIPS
  %d = bf16[512,2048] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = bf16[1024,1024] all-gather-done(%start)
  ROOT %sum = bf16[512,2048] all-reduce(%d), GROUPS, to_apply=%add
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')


def of(groups, hosts):
  chip = dataclasses.replace(
    chips.CHIPS["h100"],
    hbm_bandwidth=1e9,
    ici_bandwidth=1e9,
    dcn_bandwidth=1e8,
    clock=1e9,
    flops_per_cycle=1000,
  )
  return roofline.of_program(hlo.parse(PROGRAM.replace("GROUPS", groups)), chip, hosts)


def test_a_roofline_takes_what_limits_each_instruction():
  got = of("replica_groups={{0,1}}", [0, 0])
  flops, moved = 2 * 512 * 1024 * 2048, 2 * (512 * 1024 + 1024 * 2048 + 512 * 2048)
  assert got.flops == flops
  assert got.seconds["matmul"] == max(flops / 1e12, moved / 1e9) == moved / 1e9
  # Of the four rows one is read and one is written, in each of three runs; and the counter.
  assert (
    got.traffic == 3 * (2 * 4096 + 2 * 4096 + 2 * 4) == pytest.approx(1e9 * got.seconds["other"])
  )


def test_collectives_are_hidden_by_what_is_scheduled_beside_them():
  got = of("replica_groups={{0,1}}", [0, 0])
  gathered, reduced = 1024 * 1024 * 2 / 2, 2 * 512 * 2048 * 2 / 2
  assert got.collectives == {
    ("all-gather", "bf16", roofline.NVLINK, "overlapped"): [1, gathered],
    ("all-reduce", "bf16", roofline.NVLINK, "exposed"): [1, reduced],
  }
  assert got.seconds["exposed"] == pytest.approx(reduced / 1e9)
  assert got.seconds["unhidden"] == 0  # the gather takes less than the matmul
  slow = of("replica_groups={{0,1}}", [0, 1])
  beside = slow.seconds["matmul"] + slow.seconds["other"]
  assert slow.seconds["unhidden"] == pytest.approx(gathered / 1e8 - beside)


def test_members_of_a_host_share_its_network():
  assert of("replica_groups={{0,1}}", [0, 1]).bytes(link=roofline.NETWORK) > 0
  one = of("replica_groups={{0,2},{1,3}}", [0, 0, 1, 1])
  both = of("replica_groups={{0,1,2,3}}", [0, 0, 1, 1])
  assert one.bytes(link=roofline.NVLINK) == both.bytes(link=roofline.NVLINK) == 0
  rate = lambda r: r.bytes("exposed") / r.seconds["exposed"]
  assert rate(both) == pytest.approx(2 * rate(one))  # each sends over two cards
  inside = of("replica_groups={{0,1},{2,3}}", [0, 0, 1, 1])
  assert inside.bytes(link=roofline.NETWORK) == 0


@pytest.mark.parametrize(
  "target, mask, name, flops",
  [
    ("__cudnn$fmhaScaleBiasSoftmax", "CAUSAL", "cudnn_attention_forward", 2),
    ("__cudnn$fmhaSoftmax", "NO_MASK", "cudnn_attention_forward", 4),
    ("__cudnn$fmhaScaleBiasSoftmaxBackward", "CAUSAL", "cudnn_attention_backward", 5),
  ],
)
def test_cudnns_attention_is_known_by_its_call(target, mask, name, flops):
  of_heads = "bf16[8,1024,12,64]{3,2,1,0}"
  made = hlo.Instruction(
    "fwd",
    (),
    "custom-call",
    (),
    (
      f'custom_call_target="{target}", '
      f"operand_layout_constraints={{{of_heads}, {of_heads}, {of_heads}}}"
      f', backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "{mask}"}}}}'
    ),
    False,
  )
  assert roofline.attention_kernel(made) == (name, flops * 8 * 1024 * 1024 * 12 * 64)
  other = made._replace(attributes='custom_call_target="__cudnn$convForward"')
  assert roofline.attention_kernel(other) is None


@pytest.mark.parametrize(
  "lhs, rhs, rate",
  [("bf16", "bf16", 1), ("f8e4m3fn", "f8e5m2", 2), ("s8", "s8", 2), ("bf16", "s8", 1)],
)
@pytest.mark.parametrize(
  "matmul",
  [
    "dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    'custom-call(%a, %b), custom_call_target="__cublas$lt$matmul$f8", '
    'backend_config={"lhs_contracting_dimensions":["1"]}',
    "fusion(%a, %b), kind=kCustom, calls=%fused",
  ],
)
def test_matmuls_of_eight_bit_numbers_run_at_twice_the_rate(lhs, rhs, rate, matmul):
  text = f"""HloModule m, is_scheduled=true

%fused (p: {lhs}[4096,4096], q: {rhs}[4096,4096]) -> f32[4096,4096] {{
  %p = {lhs}[4096,4096] parameter(0)
  %q = {rhs}[4096,4096] parameter(1)
  ROOT %d = f32[4096,4096] dot(%p, %q), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

ENTRY %main (a: {lhs}[4096,4096], b: {rhs}[4096,4096]) -> f32[4096,4096] {{
  %a = {lhs}[4096,4096] parameter(0)
  %b = {rhs}[4096,4096] parameter(1)
  ROOT %r = f32[4096,4096] {matmul}
}}
"""
  chip = chips.CHIPS["h100"]
  got = roofline.of_program(hlo.parse(text), chip, [0])
  assert got.flops == 2 * 4096**3
  assert got.seconds["matmul"] == pytest.approx(got.flops / chip.clocked_flops / rate)


def test_of_a_condition_the_longer_branch_counts():
  text = """HloModule m, is_scheduled=true

%long (p: f32[1024]) -> f32[1024] {
  %p = f32[1024] parameter(0)
  ROOT %c = f32[1024] copy(%p)
}

%short (q: f32[1024]) -> f32[1024] {
  ROOT %q = f32[1024] parameter(0)
}

ENTRY %main (a: f32[1024], b: pred[]) -> f32[1024] {
  %a = f32[1024] parameter(0)
  %b = pred[] parameter(1)
  ROOT %r = f32[1024] conditional(%b, %a, %a), true_computation=%long, false_computation=%short
}
"""
  chip = chips.CHIPS["h100"]
  assert roofline.of_program(hlo.parse(text), chip, [0]).traffic == 8192


def test_a_ragged_all_to_all_sends_the_rows_of_an_even_load():
  text = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[1024,2], b: bf16[2048,2], n: s64[2]) -> bf16[2048,2] {
  %a = bf16[1024,2] parameter(0)
  %b = bf16[2048,2] parameter(1)
  %n = s64[2] parameter(2)
  ROOT %r = bf16[2048,2] ragged-all-to-all(%a, %b, %n, %n, %n, %n), replica_groups={{0,1}}
}
"""
  got = roofline.of_program(hlo.parse(text), chips.CHIPS["h100"], [0, 0])
  assert got.bytes("exposed") == 1024 * 2 * 2 / 2


def test_loops_without_a_known_trip_count_are_named():
  text = PROGRAM.replace('"known_trip_count":{"n":"3"}', "").replace("GROUPS", "")
  got = roofline.of_program(hlo.parse(text), chips.CHIPS["h100"], [0, 0])
  assert got.assumed_trips == {"while": 1}
