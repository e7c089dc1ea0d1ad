"""The search: which meshes it considers, what it compiles, and how it reports."""

import math

import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.plan import (
  lower,
  search,
  topology,
)

LLAMA = "configs/llama3_8b.py:llama2_7b"


def llama(*overrides):
  return lower.resolve(config.load(LLAMA, overrides)[0])


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
  shown = []
  show = lambda *given: shown.append(given)
  results = search.search(c, t, finalists=2, say=lambda _: None, show=show)
  assert [given[:2] for given in shown] == [(n, 4) for n in range(4)]
  assert shown[-1][2].endswith("materialize gradients")
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


@pytest.mark.parametrize("where, told", [("v4-16", True), ("v5e-16", False)])
def test_a_search_says_which_kernels_it_ranks_by_an_assumption(where, told, few_axes):
  c, t, said = llama("--config.data.seq_len=2048"), topology.parse(where), []
  refused = lambda candidate, _: search.Result(candidate, None, UserError("not compiled here"))
  search.search(c, t, finalists=2, say=said.append, run=refused)
  assert any("ranked at 50% of peak in 2 of these" in line for line in said) == told


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
