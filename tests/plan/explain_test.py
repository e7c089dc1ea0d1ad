"""Explanations of programs that do not fit."""

from types import SimpleNamespace

from jaxgpt import config
from jaxgpt.commands.actions import plan
from jaxgpt.plan import explain, lower, report, topology
from jaxgpt.plan.search import search

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

OOM = (
  "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
  "required for HLO temporaries (22.66G) exceeds available HBM (15.75G). HLO module: jit_f."
)


def llama(*overrides):
  return lower.resolve(config.load(LLAMA, overrides)[0])


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
  outputs = plan.Outputs(new_golden=tmp_path / "golden.json")
  assert plan.plan(LLAMA, (), "v5e-256", outputs) == 1
  out = capsys.readouterr().out
  assert (
    out.index("the table")
    < out.index("DOES NOT FIT: v5e has 16.00 GiB")
    < out.index("the remedies")
  )


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
  got = [ways[0].changes for ways in explain.changes(c, topology.parse("v5e-256"))]
  assert got == [
    {"model.remat": "save:q,k,v,attention"},
    {"optim.accumulate": 2},
    {"data.batch_size": 512},
  ]


def test_remedies_save_less_than_the_config_does():
  c = llama(
    "--config.data.seq_len=2048",
    "--config.data.batch_size=1536",
    "--config.model.remat=save:attention",
    "--config.optim.accumulate=2",
  )
  kinds = list(explain.changes(c, topology.parse("v5e-256")))
  assert {one.c.model.remat for one in kinds[0]} <= {"full"}
  c = llama(
    "--config.data.seq_len=2048", "--config.data.batch_size=256", "--config.model.remat=full"
  )
  kinds = list(explain.changes(c, topology.parse("v5e-256")))
  assert kinds == [[], [], []]  # a row per device, and nothing saved


def test_a_config_without_remedies_is_told_so():
  c = llama("--config.data.seq_len=2048", "--config.data.batch_size=4", "--config.model.remat=full")
  lines = list(explain.remedies(c, topology.parse("v5e-4")))
  assert len(lines) == 2 and "should make it fit: use more devices" in lines[1]


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
