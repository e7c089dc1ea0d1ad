"""Costs of programs written by hand: branches, collectives, kernels that hide them, loops."""

import json
import pathlib
from types import SimpleNamespace

import pytest

from jaxgpt.parallel import chips
from jaxgpt.plan import cost, hlo, report, time_estimate

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'

# The update of the optimizer, as libtpu prints it: the conditional itself has no estimate.
UPDATE = """HloModule m, is_scheduled=true

%fused (q: f32[8]) -> f32[8] {
  %q = f32[8] parameter(0)
  ROOT %n = f32[8] negate(%q)
}

%alone (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  %norm = f32[8] fusion(%p), kind=kLoop, calls=%fused, CYCLES30
  ROOT %r = f32[8] all-reduce(%norm), channel_id=3, replica_groups={{0,1}}, to_apply=%add
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8] get-tuple-element(%t), index=1
  %moment = f32[8] fusion(%x), kind=kLoop, calls=%fused, CYCLES100
  ROOT %o = (s32[], f32[8]) tuple(%i, %moment)
}

%update (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %p.1)
  %w = (s32[], f32[8]) while(%start), condition=%c, body=%body, TRIPS
  %y = f32[8] get-tuple-element(%w), index=1
  ROOT %r.1 = f32[8] all-reduce(%y), channel_id=4, replica_groups={{0,1}}, to_apply=%add
}

%called (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8] parameter(0)
  ROOT %z = f32[8] fusion(%p.2), kind=kLoop, calls=%fused, CYCLES7
}

ENTRY %main (a: f32[8], b: pred[]) -> f32[8] {
  %a = f32[8] parameter(0)
  %b = pred[] parameter(1)
  %inner = f32[8] call(%a), to_apply=%called
  ROOT %c = f32[8] conditional(%b, %inner, %inner), BRANCHES
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')
for n in (30, 100, 7):
  UPDATE = UPDATE.replace(f"CYCLES{n}", CYCLES % n)


@pytest.mark.parametrize(
  "branches",
  ["branch_computations={%alone, %update}", "true_computation=%update, false_computation=%alone"],
)
def test_of_a_conditional_the_branch_with_the_most_cycles_counts_once(branches):
  program = hlo.parse(UPDATE.replace("BRANCHES", branches))
  found = cost.of_program(program)
  assert found.cycles["other"] == 3 * 100 + 7
  assert found.collectives == {("all-reduce", "f32", "exposed"): [1, 32.0]}
  lines = cost.heaviest(program, 5)
  assert [(line.name, line.runs, line.cycles) for line in lines] == [
    ("moment", 3, 300),
    ("z", 1, 7),
  ]


def test_a_call_with_an_estimate_of_its_own_counts_by_it():
  one = UPDATE.replace("to_apply=%called", f"to_apply=%called, {CYCLES % 11}")
  program = hlo.parse(one.replace("BRANCHES", "branch_computations={%alone, %update}"))
  assert cost.of_program(program).cycles["other"] == 3 * 100 + 11


COMBINED = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[8], b: f32[16]) -> f32[8] {
  %a = f32[8] parameter(0)
  %b = f32[16] parameter(1)
  %s = (f32[8], f32[16]) all-reduce-start(%a, %b), channel_id=3, to_apply=%add
  %d = (f32[8], f32[16]) all-reduce-done(%s)
  %g = ((f32[8], f32[16]), (f32[16], f32[32])) all-gather-start(%a, %b), channel_id=4
  %h = (f32[16], f32[32]) all-gather-done(%g)
  %p = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%a), channel_id=5
  %q = f32[8] collective-permute-done(%p)
  %e = ((f32[8], f32[16]), f32[4], f32[8], u32[]{:S(2)}) reduce-scatter-start(%a, %b), channel_id=6
  %f = (f32[4], f32[8]) reduce-scatter-done(%e)
  ROOT %r = f32[8] get-tuple-element(%d), index=0
}
"""


def test_all_arrays_of_a_combined_collective_count():
  assert cost.of_program(hlo.parse(COMBINED)).collectives == {
    ("all-reduce", "f32", "overlapped"): [1, 4 * (8 + 16)],
    ("all-gather", "f32", "overlapped"): [1, 4 * (16 + 32)],
    ("collective-permute", "f32", "overlapped"): [1, 4 * 8],
    ("reduce-scatter", "f32", "overlapped"): [1, 4 * (8 + 16)],
  }


# There and back, as libtpu prints them: one array has the rows of an even load, the other room.
RAGGED = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[1024,2], b: bf16[2048,2], n: s32[2]) -> bf16[1024,2] {
  %a = bf16[1024,2] parameter(0)
  %b = bf16[2048,2] parameter(1)
  %n = s32[2] parameter(2)
  %s = ((bf16[1024,2], bf16[2048,2], s32[2], s32[2], s32[2], s32[2]), bf16[2048,2], u32[]{:S(2)}, \
u32[]{:S(2)}) ragged-all-to-all-start(%a, %b, %n, %n, %n, %n), channel_id=1
  %t = bf16[2048,2] ragged-all-to-all-done(%s)
  ROOT %r = bf16[1024,2] ragged-all-to-all(%t, %a, %n, %n, %n, %n), channel_id=2
}
"""


def test_a_ragged_all_to_all_moves_the_rows_of_an_even_load():
  assert cost.of_program(hlo.parse(RAGGED)).collectives == {
    ("ragged-all-to-all", "bf16", "overlapped"): [1, 4096],
    ("ragged-all-to-all", "bf16", "exposed"): [1, 4096],
  }


def test_an_all_reduce_takes_twice_its_bytes_and_is_listed_with_them_once():
  text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[8], b: f32[16]) -> f32[8] {
  %a = f32[8] parameter(0)
  %g = f32[16] all-gather(%a), channel_id=4, dimensions={0}
  %s = f32[8] all-reduce-start(%a), channel_id=5, to_apply=%add
  %d = f32[8] all-reduce-done(%s)
  ROOT %r = f32[8] all-reduce(%a), channel_id=3, to_apply=%add
}
"""
  found = cost.of_program(hlo.parse(text), bytes_per_cycle=1.0)
  assert found.bytes("exposed") == 64 + 32 and found.moved("exposed") == 64 + 2 * 32
  assert found.unhidden_bytes == 2 * 32


RING = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[256], q: bf16[2,8,256,128]) -> bf16[256] {
  %a = bf16[256] parameter(0)
  %q = bf16[2,8,256,128] parameter(1)
  %next = (bf16[256], bf16[256], u32[], u32[]) collective-permute-start(%a), channel_id=10
  %splash_mha_fwd.1 = bf16[2,8,256,128] custom-call(%q, %q), custom_call_target="tpu_custom_call"
  ROOT %d = bf16[256] collective-permute-done(%next)
}
"""


def test_kernels_hide_the_collectives_next_to_them():
  program = hlo.parse(RING)
  (call,) = cost.of_program(program, 10.0).calls
  assert cost.of_program(program, 10.0).unhidden_bytes == 512
  found = cost.of_program(program, 10.0, {call: 40.0})
  assert found.unhidden_bytes == 512 - 400 and found.cycles["other"] == 0
  assert cost.of_program(program, 10.0, {call: 60.0}).unhidden_bytes == 0


LOOP = """HloModule m, is_scheduled=true

%cond (s: (f32[4], s32[])) -> pred[] {
  %s = (f32[4], s32[]) parameter(0)
  %l = s32[] constant(8)
  %i = s32[] get-tuple-element(%s), index=1
  ROOT %c = pred[] compare(%i, %l), direction=LT
}

%fused (q: f32[4]) -> f32[4] {
  %q = f32[4] parameter(0)
  ROOT %n = f32[4] negate(%q)
}

%body (t: (f32[4], s32[])) -> (f32[4], s32[]) {
  %t = (f32[4], s32[]) parameter(0)
  %x = f32[4] get-tuple-element(%t), index=0
  %y = f32[4] fusion(%x), kind=kLoop, calls=%fused, CYCLES
  %j = s32[] get-tuple-element(%t), index=1
  %two = s32[] constant(2)
  %k = s32[] add(%j, %two)
  ROOT %o = (f32[4], s32[]) tuple(%y, %k)
}

ENTRY %main (a: (f32[4], s32[])) -> (f32[4], s32[]) {
  %a = (f32[4], s32[]) parameter(0)
  ROOT %w = (f32[4], s32[]) while(%a), condition=%cond, body=%body
}
""".replace("CYCLES", CYCLES % 10)


@pytest.mark.parametrize(
  "old, new, runs",
  [
    ("", "", 4),  # the first value of the counter is in a parameter: 0 is assumed
    ("compare(%i, %l), direction=LT", "and(%i, %l)", 1),
    ("%l = s32[] constant(8)", "%l = pred[] constant(true)", 1),
    ("%k = s32[] add(%j, %two)", "%k = s32[] multiply(%j, %two)", 8),
  ],
)
def test_loops_whose_trip_count_is_assumed_are_named(old, new, runs):
  found = cost.of_program(hlo.parse(LOOP.replace(old, new) if old else LOOP))
  assert found.cycles["other"] == 10 * runs
  assert found.assumed_trips == {"w": runs}


def compiled(text):
  """Stands in for `lower.Compiled`: a program of one device."""
  executable = SimpleNamespace(as_text=lambda: text)
  mesh = SimpleNamespace(shape={"seq": 1}, devices=SimpleNamespace(flat=[]))
  return SimpleNamespace(c=None, mesh=mesh, executable=executable)


def by_cycles(text, monkeypatch):
  monkeypatch.setattr(time_estimate, "visible_share", lambda *_: 0.5)
  monkeypatch.setattr(report.per_device, "grouped_room", lambda *_: 2.0)
  return report._by_cycles(hlo.parse(text), compiled(text), chips.CHIPS["v5e"])


HOST, PART = "bf16[4,8,128]{2,1,0:T(8,128)S(5)}", "bf16[1,8,128]{2,1,0}"
OFFLOADED = """HloModule m, is_scheduled=true

%put (h: bf16[4,8,128], p: bf16[1,8,128], i: s32[]) -> bf16[4,8,128] {
  %h = HOST parameter(0)
  %p = PART parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = HOST dynamic-update-slice(%h, %p, %i, %i, %i)
}

ENTRY %main (h: bf16[4,8,128], p: bf16[1,8,128], i: s32[]) -> bf16[1,8,128] {
  %h = HOST parameter(0)
  %p = PART parameter(1)
  %i = s32[] parameter(2)
  %s = ((HOST, PART, s32[]), HOST, u32[]{:S(2)}) async-start(%h, %p, %i), calls=%put
  %f = f32[8] fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"100"}
  %d = HOST async-done(%s)
  %c = (PART, bf16[1,8,128]{2,1,0:S(5)}, u32[]) copy-start(%d)
  ROOT %e = PART copy-done(%c)
}
""".replace("HOST", HOST).replace("PART", PART)


def test_a_program_waits_for_what_compute_does_not_hide_of_the_way_to_the_host(monkeypatch):
  program, part = hlo.parse(OFFLOADED), 2 * 8 * 128
  found = cost.of_program(program, host_bytes_per_cycle=10.0)
  assert found.host_bytes == {cost.TO_HOST: part, cost.FROM_HOST: part}
  # 100 cycles of compute lie within the first transfer, and nothing within the second.
  assert found.host_wait_cycles == pytest.approx(part / 10 - 100 + part / 10)
  fast = cost.of_program(program, host_bytes_per_cycle=100.0)
  assert fast.host_wait_cycles == pytest.approx(part / 100)
  assert cost.of_program(program).host_wait_cycles == 0  # a bandwidth that is not known
  f = by_cycles(OFFLOADED, monkeypatch)
  v5e = chips.CHIPS["v5e"]
  assert f["seconds"]["host"] == pytest.approx(2 * part / v5e.host_bandwidth - 100 / v5e.clock)
  assert (
    "2.05e+03 bytes from host, 2.05e+03 bytes to host at 15 GB/s per direction"
    in report._host_line(f)
  )
  assert "not counted" in report._host_line(f | {"host_bandwidth": 0.0})


@pytest.mark.parametrize("kind", ["loop", "branch"])
def test_loops_and_branches_hide_transfers_to_the_host(kind):
  body = """%body (b: (s32[], bf16[2,8,256,128])) -> (s32[], bf16[2,8,256,128]) {
  %b = (s32[], bf16[2,8,256,128]) parameter(0)
  %q = bf16[2,8,256,128] get-tuple-element(%b), index=1
  ROOT %splash_mha_fwd.1 = bf16[2,8,256,128] custom-call(%q, %q), custom_call_target="KIND"
}

""".replace("KIND", "tpu_custom_call")
  inner = {
    "loop": "%w = (s32[], bf16[2,8,256,128]) while(%x), condition=%body, body=%body, "
    'backend_config={"known_trip_count":{"n":"3"}}',
    "branch": "%w = bf16[2,8,256,128] conditional(%i, %x), branch_computations={%body}",
  }[kind]
  text = OFFLOADED.replace("ENTRY", body + "ENTRY").replace("  %f = ", f"  {inner}\n  %f = ")
  program, part = hlo.parse(text), 2 * 8 * 128
  (call,) = cost.of_program(program).calls
  runs = 3 if kind == "loop" else 1
  found = cost.of_program(program, 0.0, {call: 20.0}, 10.0)
  assert found.host_wait_cycles == pytest.approx(part / 10 - 100 - 20 * runs + part / 10)


def test_transfers_to_the_host_take_their_turns():
  one = "  %s = ((HOST, PART, s32[]), HOST, u32[]{:S(2)}) async-start(%h, %p, %i), calls=%put\n"
  again = "  %s2 = ((HOST, PART, s32[]), HOST, u32[]) async-start(%h, %p, %i), calls=%put\n"
  ends = "  %d = HOST async-done(%s)\n", "  %d2 = HOST async-done(%s2)\n"
  real = lambda text: text.replace("HOST", HOST).replace("PART", PART)
  text = OFFLOADED.replace(real(one), real(one + again)).replace(real(ends[0]), real("".join(ends)))
  assert text.count("async-start") == text.count("async-done") == 2
  found = cost.of_program(hlo.parse(text), host_bytes_per_cycle=10.0)
  part = 2 * 8 * 128
  assert found.host_bytes == {cost.TO_HOST: 2 * part, cost.FROM_HOST: part}
  assert found.host_wait_cycles == pytest.approx(2 * part / 10 - 100 + part / 10)


def test_figures_of_time_follow_the_links_and_the_kernels(monkeypatch):
  v5e = chips.CHIPS["v5e"]
  found = by_cycles(
    UPDATE.replace("BRANCHES", "branch_computations={%alone, %update}"), monkeypatch
  )
  assert found["seconds"]["other"] == 307 / v5e.clock
  assert found["seconds"]["exposed"] == 2 * 32 / v5e.ici_bandwidth
  assert [row["bytes"] for row in found["collectives"]] == [32]
  found = by_cycles(RING, monkeypatch)
  assert found["seconds"]["kernels"] > 0 == found["seconds"]["unhidden"]
  assert by_cycles(LOOP, monkeypatch)["assumed_trips"] == {"w": 4}
  assert by_cycles(RAGGED, monkeypatch)["overlapped_bytes"] == 4096


def test_the_report_names_what_is_assumed():
  kinds = ("matmul", "other", "unestimated", "kernels", "exposed", "unhidden", "between")
  f = {
    "estimate": "schedule",
    "seconds": dict.fromkeys(kinds, 0.0),
    "cycles": {},
    "matmul_flops": 0.0,
    "model_flops": 0.0,
    "kernels": {},
    "kernel_calls": [],
    "exposed_bytes": 0.0,
    "overlapped_bytes": 0.0,
    "between_bytes": 0.0,
    "host_bytes": {},
    "remat": "save:q,k,v",
    "assumed_trips": {"while.3": 1},
  }
  assert any("how often loops run; assumed: while.3 x 1" in line for line in report._time_lines(f))
  known = "\n".join(report._time_lines(f | {"assumed_trips": {}}))
  assert "how often" not in known and "host" not in known
  hidden = "\n".join(report._time_lines(f | {"remat": "save:up+offload:q,k,v"}))
  assert "transfers were not found in the program, and are not counted" in hidden
  row = {"opcode": "ragged-all-to-all", "dtype": "bf16", "phase": "exposed", "calls": 1}
  lines = list(report._collective_lines({"collectives": [row | {"bytes": 2e6}]}))
  assert lines[-1].endswith("0.002 GB at an even load")


def test_the_golden_budget_of_the_exchange_is_of_an_even_load():
  path = pathlib.Path(__file__).parent / "communication_budgets" / "exchange.json"
  stored = json.loads(path.read_text())["collectives"]["ragged-all-to-all bf16"]
  # 10 calls on 512 tokens of a device, 2 experts each, of 256 numbers in bfloat16.
  assert stored == {"calls": 10, "bytes": 10 * 512 * 2 * 256 * 2}
