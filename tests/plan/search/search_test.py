"""What a search compiles, and how it reports."""

import re

import jax
import pytest

from jaxgpt import config
from jaxgpt.config import effects
from jaxgpt.errors import UserError
from jaxgpt.plan import lower, per_device, topology
from jaxgpt.plan.search import candidates, search

LLAMA = "configs/llama3_8b.py:llama2_7b"


def llama(*overrides):
  return lower.resolve(config.load(LLAMA, overrides)[0])


def test_a_search_moves_activations_to_the_host_where_more_rows_fit_by_it(few_axes):
  c, t = llama("--config.data.seq_len=2048"), topology.parse("v5e-256")
  assert not any("offload" in one.c.model.remat for one in candidates.candidates(c, t))
  found = candidates.candidates(c, t, offload=True)
  offloads = {one.c.model.remat for one in found if "offload" in one.c.model.remat}
  assert offloads == set(candidates.OFFLOADS)
  for remat in offloads:
    effects.check(candidates.changed(c, {"model.remat": remat}), {"model.remat": "command line"})
  chosen, _ = search.choose(found, t.chip.hbm_limit, 6)
  best = chosen[0]
  assert "offload" in best.c.model.remat and best.c.data.batch_size > 512  # saved: 2 rows fit
  # Where it fits, keeping the same on the device is preferred.
  small = [one for one in found if one.c.data.batch_size == 256 and one.c.mesh.fsdp == 256]
  few, _ = search.choose(small, t.chip.hbm_limit, 2)
  assert not any("offload" in one.c.model.remat for one in few)
  more, _ = search.choose(small, t.chip.hbm_limit, 6)
  assert len({frozenset(per_device.kept_names(one.c.model.remat)) for one in more}) == len(more) > 1


def test_a_search_moves_nothing_over_a_link_of_unknown_bandwidth(few_axes):
  c, t = llama("--config.data.seq_len=2048"), topology.parse("h100x8")
  with pytest.raises(UserError, match="no bandwidth from h100 to the host's memory"):
    search.search(c, t, offload=True)


def test_a_search_says_which_attention_it_cannot_compile(few_axes):
  wide, gpus = (
    ["--config.model.head_dim=256", "--config.model.remat=full"],
    topology.parse("h100x8"),
  )
  told = []
  refuse = lambda candidate, _: search.Result(candidate, None, UserError("not compiled"))
  search.search(llama(*wide), gpus, 1, say=told.append, run=refuse)
  assert told[0].startswith("training on these GPUs uses attention cudnn")
  with pytest.raises(UserError, match="cuDNN has no kernel for head size 256"):
    search.search(llama(*wide, "--config.model.attention=cudnn"), gpus, run=refuse)


def test_a_kept_batch_may_have_any_rows_and_microbatches(few_axes):
  """10 rows on each of 256 devices."""
  c = llama("--config.data.seq_len=2048", "--config.data.batch_size=2560")
  found = candidates.candidates(c, topology.parse("v5e-256"), keep_batch=True)
  pure = [one for one in found if one.c.mesh.fsdp == 256]
  assert {one.c.optim.accumulate for one in pure} == {1, 2, 5, 10}
  assert {one.c.data.batch_size for one in found} == {2560}
  with pytest.raises(UserError, match="leave --keep-batch out"):
    c = llama("--config.data.seq_len=2048", "--config.data.batch_size=7")
    search.search(c, topology.parse("v5e-256"), keep_batch=True)


def test_a_search_ranks_what_fits_and_what_nearly_does(few_axes):
  c, t = llama("--config.data.seq_len=2048"), topology.parse("v5e-256")
  found = candidates.candidates(c, t)
  chosen, beyond = search.choose(found, t.chip.hbm_limit, 3)
  assert len(chosen) == 3 and all(one.bytes <= t.chip.hbm_limit * 1.02 for one in chosen)
  assert chosen[0].merit == min(one.merit for one in chosen)
  without = [{k: v for k, v in one.changes.items() if k != "model.remat"} for one in chosen]
  assert without[0] == without[1] != without[2]  # two that differ in what they save, then others
  assert beyond.bytes > t.chip.hbm_limit and beyond.merit < chosen[0].merit
  kept = candidates.candidates(
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


@pytest.mark.parametrize(
  "error, words",
  [
    (UserError("mesh.tensor=3 does not suit"), "mesh.tensor=3 does not suit"),
    (
      jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed\nand more"),
      "JaxRuntimeError: INTERNAL: Mosaic failed",
    ),
  ],
)
def test_a_plan_that_is_refused_ends_no_search(error, words, monkeypatch, few_axes):
  c, t = llama("--config.data.seq_len=2048"), topology.parse("v5e-256")

  def compile_step(c, _):
    raise error

  monkeypatch.setattr(lower, "compile_step", compile_step)
  results = search.search(c, t, finalists=2, say=lambda _: None)
  assert len(results) > 2 and not any(r.fits for r in results)
  lines = list(search.table(results))
  assert any(line.endswith(words) for line in lines)
  assert lines[-1].startswith("all of the candidates were refused")


def test_other_barriers_that_the_config_refuses_end_no_search(monkeypatch, few_axes):
  c, t = llama("--config.data.seq_len=2048"), topology.parse("v5e-256")
  changed = candidates.changed

  def strict(c, changes):
    if "model.materialize" in changes:
      raise UserError("model.materialize does not suit")
    return changed(c, changes)

  monkeypatch.setattr(candidates, "changed", strict)
  figures = {
    "merit_with_kernels": 1.0,
    "mfu": 0.5,
    "tokens_per_second_per_chip": 1.0,
    "memory": {"total": 1, "fits": True},
  }
  fits = lambda candidate, _: search.Result(candidate, figures, None)
  results = search.search(c, t, finalists=1, say=lambda _: None, run=fits)
  assert results[0].fits and "does not suit" in str(results[-1].error)


@pytest.mark.parametrize("where, told", [("v4-16", True), ("v5e-16", False)])
def test_a_search_says_which_kernels_it_ranks_by_an_assumption(where, told, few_axes):
  c, t, said = llama("--config.data.seq_len=2048"), topology.parse(where), []
  refused = lambda candidate, _: search.Result(candidate, None, UserError("not compiled here"))
  search.search(c, t, finalists=2, say=said.append, run=refused)
  assert any("ranked at 50% of peak in 2 of these" in line for line in said) == told


def test_the_table_of_a_search_says_why_others_lost(few_axes):
  c, t = llama("--config.data.seq_len=2048"), topology.parse("v5e-256")
  a, b, beyond = candidates.candidates(c, t)[:3]

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
  assert re.match(r"--config\.mesh\.data=\d+ --config\.mesh\.fsdp=\d+", lines[-1])
