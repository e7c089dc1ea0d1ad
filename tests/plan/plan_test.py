import json
import math
from types import SimpleNamespace

import jax
import pytest

from jaxgpt import config
from jaxgpt.commands.actions import plan
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh
from jaxgpt.plan import (
  explain,
  lower,
  memory_estimate,
  per_device,
  report,
  search,
  time_estimate,
  topology,
)
from jaxgpt.training import build as build_lib

LLAMA = "configs/llama3_8b.py:llama2_7b"
SMALL = [
  "--config.model.num_layers=2",
  "--config.model.width=256",
  "--config.model.num_heads=2",
  "--config.model.num_kv_heads=2",
  "--config.model.mlp_width=512",
  "--config.model.vocab_size=1024",
  "--config.model.head_dim=128",
  "--config.data.seq_len=256",
  "--config.data.batch_size=8",
]


@pytest.mark.parametrize(
  "name, chip, shape, slices, num_chips, num_devices",
  [
    ("v5e-256", "v5e", (16, 16), 1, 256, 256),
    ("v5p-128", "v5p", (4, 4, 4), 1, 64, 64),
    ("v6e-64x2", "v6e", (8, 8), 2, 128, 128),
    ("v4-64", "v4", (2, 4, 4), 1, 32, 32),
    ("tpu7x-128", "tpu7x", (4, 4, 4), 1, 64, 128),
    ("v5p:4x4x8", "v5p", (4, 4, 8), 1, 128, 128),
    ("v5p-12288", "v5p", (16, 16, 24), 1, 6144, 6144),
  ],
)
def test_names_of_topologies(name, chip, shape, slices, num_chips, num_devices):
  t = topology.parse(name)
  assert (t.chip.name, t.shape, t.slices, t.num_chips, t.num_devices) == (
    chip,
    shape,
    slices,
    num_chips,
    num_devices,
  )


@pytest.mark.parametrize(
  "name, wraps",
  [
    ("v5p-128", [True] * 3),
    ("v4-32", [False] * 3),
    ("v5e-256", [True, True, False]),
    ("v6e-128", [False, True, False]),
    ("v5e-64", [False] * 3),
  ],
)
def test_sides_whose_ends_are_linked(name, wraps):
  assert topology.parse(name).wraps == wraps


@pytest.mark.parametrize(
  "name, words",
  [
    ("pod", "write CHIP-SIZE"),
    ("v5e-24", "slices of 1, 4, 8"),
    ("v9-8", "topology=v9-8: chip='v9'.*choose one of v4, v5e"),
    ("v5p-7", "counted in cores, 2 per chip"),
    ("v5e:4x4x4", "2 dimensions"),
    ("v5e:0x4", "each side needs at least one chip"),
    ("h100-8", "h100 is a GPU"),
    ("v5e-0", "write"),
  ],
)
def test_a_topology_that_is_not_there_is_named(name, words):
  with pytest.raises(UserError, match=words):
    topology.parse(name)


def test_shapes_of_the_batch_are_those_of_the_data():
  c = lower.resolve(config.load(LLAMA, SMALL)[0])
  shapes = lower.batch_shapes(c)
  assert set(shapes) == {"tokens", "targets", "loss_weights", "segment_ids", "positions"}
  assert {s.shape for s in shapes.values()} == {(8, 256)}


def test_memory_of_a_step_on_pretended_devices():
  c = lower.resolve(config.load(LLAMA, SMALL)[0])
  where = mesh.make(c.mesh)
  parts = build_lib.build(c, where)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(parts.state["params"]))
  small = 4 * sum(
    math.prod(x.shape)
    for x in jax.tree.leaves(parts.state["params"])
    if len(x.shape) == 1 or x.shape[-1] == x.shape[0]
  )
  got = lower.device_bytes(parts.state["params"])
  assert 4 * count / 8 <= got <= 4 * count / 8 + 4 * small + 20_000
  assert lower.device_bytes(parts.state["opt"]) >= 2 * got


def test_a_plan_needs_a_vocabulary_but_no_data():
  with pytest.raises(UserError, match=r"--config\.model\.vocab_size=N"):
    lower.resolve(config.base())


def test_a_program_that_does_not_fit_is_explained_beside_its_budget(monkeypatch, tmp_path, capsys):
  class Compiled:
    executable = SimpleNamespace(as_text=lambda: "")

  memory = {"total": 40 << 30, "limit": 16 << 30, "fits": False}
  monkeypatch.setattr(lower, "compile_step", lambda *_, **__: Compiled)
  monkeypatch.setattr(
    report, "figures", lambda *_: {"estimate": "schedule", "memory": memory, "collectives": []}
  )
  monkeypatch.setattr(report, "table", lambda _: ["the table"])
  monkeypatch.setattr(explain, "remedies", lambda *_: ["the remedies"])
  assert plan.plan(LLAMA, (), "v5e-256", golden=tmp_path / "golden.json") == 1
  out = capsys.readouterr().out
  assert (
    out.index("the table")
    < out.index("DOES NOT FIT: v5e has 16.00 GiB")
    < out.index("the remedies")
  )


OOM = (
  "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
  "required for HLO temporaries (22.66G) exceeds available HBM (15.75G). HLO module: jit_f."
)


def llama(*overrides):
  return lower.resolve(config.load(LLAMA, overrides)[0])


def test_out_of_memory_is_said_in_words_of_the_config():
  error = lower.read_out_of_memory(OOM, 0)
  assert error.needed == int(22.66 * 2**30) and error.limit == int(15.75 * 2**30)
  assert lower.read_out_of_memory(OOM, 0, given=5).needed == error.needed + 5
  c = llama(
    "--config.data.seq_len=2048",
    "--config.data.batch_size=1024",
    "--config.model.remat=save:q,k,v,attention,gate,up",
  )
  lines = list(explain.out_of_memory(error, c, topology.parse("v5e-256")))
  assert "v5e has 15.75 GiB for a program and its state, which need 22.66 GiB" in lines[0]
  largest = next(line for line in lines if "layers/mlp" in line)
  assert "5.38 GiB" in largest and "[32,4,2048,11008]" in largest
  assert "model.remat without 'gate'" in largest and "optim.accumulate" in largest


def test_remedies_are_the_least_that_should_fit():
  c = llama(
    "--config.data.seq_len=2048",
    "--config.data.batch_size=1024",
    "--config.model.remat=save:q,k,v,attention,gate,up",
  )
  got = [ways[0].changes for ways in search.remedies(c, topology.parse("v5e-256"))]
  assert got == [
    {"model.remat": "save:q,k,v,attention,o"},
    {"optim.accumulate": 2},
    {"data.batch_size": 512},
  ]


def test_remedies_are_compiled_until_one_fits(monkeypatch):
  c = llama(
    "--config.data.seq_len=2048",
    "--config.data.batch_size=1024",
    "--config.model.remat=save:q,k,v,attention,gate,up",
  )

  def compiled(candidate, _):
    fits = candidate.bytes < 12 * 2**30
    error = None if fits else lower.OutOfMemory(20 << 30, 16 << 30)
    return search.Result(
      candidate,
      {"mfu": 0.5, "tokens_per_second_per_chip": 1.0, "memory": {"total": 1, "fits": True}}
      if fits
      else None,
      error,
    )

  monkeypatch.setattr(search, "compiled", compiled)
  lines = list(explain.remedies(c, topology.parse("v5e-256")))
  assert [
    line.split(":")[0].strip() + (" no" if "does not fit" in line else "")
    for line in lines
    if "accumulate" in line
  ] == ["--config.optim.accumulate=2 no", "--config.optim.accumulate=4"]


# Llama-2-7B and parts of it on v5e: what libtpu allocated (docs/benchmarks.md).
@pytest.mark.parametrize(
  "where, overrides, gib",
  [
    (
      "v5e-256",
      (
        "--config.data.seq_len=2048",
        "--config.data.batch_size=512",
        "--config.model.remat=save:q,k,v,attention,gate,up",
      ),
      12.80,
    ),
    (
      "v5e-256",
      (
        "--config.data.seq_len=2048",
        "--config.data.batch_size=512",
        "--config.model.remat=save:q,k,v,attention,o,gate,up",
      ),
      13.96,
    ),
    (
      "v5e-256",
      (
        "--config.data.seq_len=2048",
        "--config.data.batch_size=256",
        "--config.model.remat=save:q,k,v,attention,o,gate,up",
      ),
      7.92,
    ),
  ],
)
def test_memory_by_arithmetic_is_near_the_compilers(where, overrides, gib):
  c, t = llama(*overrides), topology.parse(where)
  assert memory_estimate.total(c, t.num_devices) / 2**30 == pytest.approx(gib, rel=0.1)


# Microseconds a token and device of the schedules that libtpu made (docs/log.md).
@pytest.mark.parametrize(
  "preset, where, axes, rows, length, remat, micros",
  [
    ("llama2_7b", "v5e-256", dict(fsdp=256), 512, 2048, "save:q,k,v,attention,gate,up", 298.1),
    ("llama2_7b", "v5p-128", dict(fsdp=64), 256, 4096, "save:q,k,v,attention,gate,up", 132.9),
    ("llama2_70b", "v5p-128", dict(fsdp=64), 128, 4096, "save:q,k,v,o,down", 1357.4),
    ("llama3_8b", "v5e-256", dict(fsdp=256), 256, 8192, "save_attention", 427.3),
    (
      "llama3_8b",
      "v5e-256",
      dict(fsdp=128, tensor=2),
      128,
      8192,
      "save:q,k,v,attention,gate,up",
      440.4,
    ),
    ("llama3_8b", "v5e-256", dict(fsdp=64, tensor=4), 128, 8192, "save_attention", 518.6),
    ("llama3_8b", "v5e-256", dict(fsdp=64, seq=4), 64, 8192, "save:q,k,v,attention,gate,up", 538.0),
    ("llama3_8b", "v6e-64", dict(fsdp=64), 64, 8192, "full", 127.5),
    ("llama3_8b", "v6e-64", dict(fsdp=64), 128, 8192, "save_attention", 112.4),
  ],
)
def test_seconds_by_arithmetic_are_near_the_compilers(
  preset, where, axes, rows, length, remat, micros
):
  t = topology.parse(where)
  c = lower.resolve(
    config.load(
      f"configs/llama3_8b.py:{preset}",
      [
        f"--config.data.seq_len={length}",
        f"--config.data.batch_size={rows}",
        f"--config.model.remat={remat}",
        *(f"--config.mesh.{k}={v}" for k, v in axes.items()),
      ],
    )[0]
  )
  took = time_estimate.seconds(c, mesh.axis_sizes(c.mesh, t.num_devices), per_device.count(c), t)
  mine = rows * length / t.num_devices
  assert sum(took.values()) / mine * 1e6 == pytest.approx(micros, rel=0.04)


def test_arithmetic_knows_of_narrow_moments_and_of_chunks_of_the_loss():
  def bytes_of(name, *overrides):
    c, t = llama("--config.data.seq_len=2048", *overrides), topology.parse("v5e-256")
    found = memory_estimate.buffers(c, mesh.axis_sizes(c.mesh, t.num_devices), per_device.count(c))
    return next(b.bytes for b in found if b.name == name)

  narrow = bytes_of("opt", "--config.optim.first_dtype=bfloat16")
  assert narrow == pytest.approx(bytes_of("opt") * 0.75)
  rows = bytes_of("head/logits", "--config.data.batch_size=512")
  in_chunks = bytes_of(
    "head/logits", "--config.data.batch_size=512", "--config.objective.loss_chunk=1024"
  )
  assert in_chunks == pytest.approx(rows / 4)


@pytest.fixture
def few_axes(monkeypatch):
  """A search over fewer meshes: thousands of plans take seconds."""
  monkeypatch.setattr(search, "_SEQS", (1,))
  monkeypatch.setattr(search, "_STAGES", (1,))


def test_a_search_looks_at_all_axes_that_suit():
  t = topology.parse("v6e-64x2")
  found = search.meshes(llama("--config.data.seq_len=2048"), t)
  assert all(math.prod(sizes.values()) == 128 and sizes["data"] % 2 == 0 for sizes in found)
  assert {sizes["seq"] for sizes in found} == {1, 2, 4, 8}  # 256 tokens of a row at least
  assert {sizes["stage"] for sizes in found} == {1, 2, 4}
  assert {sizes["expert"] for sizes in found} == {1}
  experts = llama(
    "--config.model.mlp_pattern=('moe',)",
    "--config.model.moe.experts=4",
    "--config.model.moe.capacity=1.0",
    "--config.data.seq_len=2048",
  )
  assert {sizes["expert"] for sizes in search.meshes(experts, t)} == {1, 2, 4}


def test_a_search_ranks_what_fits_and_what_nearly_does(few_axes):
  c, t = llama("--config.data.seq_len=2048"), topology.parse("v5e-256")
  found = search.candidates(c, t)
  chosen, beyond = search.choose(found, t.chip.hbm_limit, 3)
  assert len(chosen) == 3 and all(one.bytes <= t.chip.hbm_limit * 1.02 for one in chosen)
  assert chosen[0].merit == min(one.merit for one in chosen)
  without = [{k: v for k, v in one.changes.items() if k != "model.remat"} for one in chosen]
  assert without[0] == without[1] != without[2]  # two that differ in what they save, then others
  assert beyond.bytes > t.chip.hbm_limit and beyond.merit < chosen[0].merit
  kept = search.candidates(
    llama("--config.data.seq_len=2048", "--config.data.batch_size=1024"), t, keep_batch=True
  )
  assert {one.changes["data.batch_size"] for one in kept} == {1024}
  assert {one.changes["optim.accumulate"] for one in kept} >= {1, 2, 4}


def test_a_search_compiles_the_best_with_other_barriers_too(monkeypatch, few_axes):
  c, t, seen = llama("--config.data.seq_len=2048"), topology.parse("v5e-256"), []

  def compiled(candidate, _):
    seen.append(candidate)
    if candidate.bytes > t.chip.hbm_limit:
      return search.Result(candidate, None, lower.OutOfMemory(20 << 30, 16 << 30))
    faster = candidate.c.model.materialize == "gradients"
    return search.Result(
      candidate,
      {
        "merit_with_kernels": candidate.merit * (0.9 if faster else 1),
        "mfu": 0.5,
        "tokens_per_second_per_chip": 1.0,
        "memory": {"total": 1, "fits": True},
      },
      None,
    )

  monkeypatch.setattr(search, "compiled", compiled)
  results = search.search(c, t, finalists=2, say=lambda _: None)
  assert len(seen) == 4 and [r.fits for r in results] == [True, True, True, False]
  assert results[0].candidate.changes["model.materialize"] == "gradients"
  assert results[0].candidate.c.model.remat == results[1].candidate.c.model.remat


def test_a_plan_that_is_refused_ends_no_search(monkeypatch, few_axes):
  c, t = llama("--config.data.seq_len=2048"), topology.parse("v5e-256")

  def compile_step(c, _):
    raise UserError("mesh.tensor=3 does not divide the heads")

  monkeypatch.setattr(lower, "compile_step", compile_step)
  results = search.search(c, t, finalists=2, say=lambda _: None)
  assert len(results) > 2 and not any(r.fits for r in results)
  lines = list(search.table(results))
  assert (
    any("mesh.tensor=3" in line for line in lines) and "none of the candidates fits" in lines[-1]
  )


def test_a_search_says_where_evaluation_needs_other_rows(few_axes):
  c, t = llama("--config.data.seq_len=2048", "--config.eval.batch_size=24"), topology.parse("v5e-8")
  found = search.candidates(c, t)
  assert all("eval.batch_size" not in one.changes and one.c.eval.batch_size == 24 for one in found)
  found = search.candidates(c, topology.parse("v5e-16"))
  assert any(one.changes.get("eval.batch_size") == one.c.data.batch_size for one in found)


def test_the_table_of_a_search_says_why_others_lost(few_axes):
  c, t = llama("--config.data.seq_len=2048"), topology.parse("v5e-256")
  a, b, beyond = search.candidates(c, t)[:3]

  def result(candidate, exposed):
    seconds = {
      "matmul": 1.0,
      "other": 0.1,
      "kernels": 0.1,
      "exposed": exposed,
      "unhidden": 0.0,
      "between": 0.0,
    }
    return search.Result(
      candidate,
      {
        "seconds": seconds,
        "batch_size": 512,
        "merit_with_kernels": 1.2 + exposed,
        "mfu": 0.5,
        "tokens_per_second_per_chip": 1000.0,
        "memory": {"total": 1 << 30, "fits": True},
      },
      None,
    )

  lost = search.Result(beyond, None, lower.OutOfMemory(20 << 30, 16 << 30))
  lines = list(search.table([result(a, 0.1), result(b, 0.4), lost]))
  assert any(line.endswith("best") for line in lines)
  assert any("+23.1%: more exposed collectives" in line for line in lines)
  assert any("too much memory" in line and " 20.00" in line for line in lines)
  assert lines[-1].startswith("--config.mesh.data=1 --config.mesh.fsdp=")


def test_causal_attention_computes_half_and_a_window_less():
  c = config.load(LLAMA, ["--config.data.seq_len=4096"])[0]
  assert time_estimate.visible_share(c, 512) == (4096 + 512) / 8192
  c.model.window, c.model.attention_pattern = 512, ("local", "global")
  assert time_estimate.visible_share(c, 512) == (0.25 + 0.5625) / 2


@pytest.mark.slow
def test_a_plan_of_a_small_model(tmp_path, capsys):
  pytest.importorskip("libtpu")
  out, budget = tmp_path / "plan.json", tmp_path / "golden.json"
  args = dict(price=1.2, out=out, golden=budget)
  assert plan.plan(LLAMA, SMALL, "v5e-8", **args) == 0
  f = json.loads(out.read_text())
  assert f["attention"] == "splash" and f["mesh"]["fsdp"] == 8 and f["memory"]["fits"]
  # Nothing but attention is computed again: forward and two kernels backward, in two layers.
  assert {name.split("_seg")[0]: calls for name, calls in f["kernels"].items()} == {
    "splash_mha_fwd": 4,
    "splash_mha_dq": 2,
    "splash_mha_dkv": 2,
  }
  text = capsys.readouterr().out
  assert "fits" in text and "chip-hours" in text and "cost" in text
  assert "xla_tpu_scoped_vmem_limit_kib=65536" in text and f["options"]
