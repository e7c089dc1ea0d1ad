"""Compilation of a step: its batch, its memory, and what a plan needs."""

import math
import re
from types import SimpleNamespace

import jax
import pytest

from jaxgpt import config
from jaxgpt.commands.actions import plan
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh, sharding
from jaxgpt.plan import lower, topology
from jaxgpt.training import build as build_lib

topology_mesh = topology.mesh
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


def test_shapes_of_the_batch_are_those_of_the_data():
  c = lower.resolve(config.load(LLAMA, SMALL)[0])
  shapes = lower.batch_shapes(c)
  assert set(shapes) == {"tokens", "targets", "loss_weights", "segment_ids", "positions"}
  assert {s.shape for s in shapes.values()} == {(8, 256)}


def test_memory_of_a_step_on_fake_devices():
  c = lower.resolve(config.load(LLAMA, SMALL)[0])
  where = mesh.make(c.mesh)
  parts = build_lib.build(c, where)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(parts.state["params"]))
  small = 4 * sum(
    math.prod(x.shape)
    for x in jax.tree.leaves(parts.state["params"])
    if len(x.shape) == 1 or x.shape[-1] == x.shape[0]
  )
  got = sharding.device_bytes(parts.state["params"])
  assert 4 * count / 8 <= got <= 4 * count / 8 + 4 * small + 20_000
  assert sharding.device_bytes(parts.state["opt"]) >= 2 * got


def test_a_plan_needs_a_vocabulary_but_no_data():
  with pytest.raises(UserError, match=r"--config\.model\.vocab_size=N"):
    lower.resolve(config.base())


SCOPED = (  # of libtpu 0.0.52, shortened
  "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for "
  "%splash_mha_fwd.1 = bf16[1,2,8192,128] custom-call(...), metadata="
  '{op_name="jit(f)/splash_mha_fwd_segmented/pallas_call" stack_frame_id=13}. Scoped allocation '
  "with size 16.56M and limit 16.00M exceeded scoped vmem limit by 572.0K.\nSee more"
)
HBM = (
  "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.66G of 15.75G hbm. Exceeded "
  "hbm capacity by 6.91G."
)


@pytest.mark.parametrize(
  "message, kind, told",
  [
    (SCOPED, UserError, r"VMEM.*splash_mha_fwd_segmented: it needs 16.56M, the limit is 16.00M"),
    (SCOPED, UserError, r"mesh\.compiler_options=.*vmem_limit_kib=KIB.*blocks of attention"),
    (HBM, lower.OutOfMemory, "22.66 GiB needed, 15.75 GiB available"),
    ("INTERNAL: E3000: Kernel:\nno layout\nmore", UserError, "E3000: Kernel: no layout$"),
    ("INTERNAL: Mosaic failed\nmore", UserError, "compiler for v5e-8 refuses .*Mosaic failed$"),
  ],
)
def test_errors_of_a_compiler_are_told_apart(message, kind, told):
  error = jax.errors.JaxRuntimeError(message)
  got = lower.refusal(error, topology.parse("v5e-8"), given=0)
  assert type(got) is kind and re.search(told, str(got)) and "\n" not in str(got)


class Refused(Exception):
  """Ends a compilation."""


@pytest.mark.parametrize("where, cached", [("v5e-8", False), ("here", True)])
def test_a_tpus_program_never_comes_from_the_cache(where, cached, monkeypatch):
  # It has no schedules of its kernels there, so plans would be ranked on different terms.
  def compile(*_):
    raise Refused(jax.config.jax_enable_compilation_cache)

  here = topology.parse("here")
  monkeypatch.setattr(lower.topology_lib, "mesh", lambda c, _: topology_mesh(c, here))
  monkeypatch.setattr(lower.xla_options, "compile", compile)
  c = lower.resolve(config.load(LLAMA, SMALL)[0])
  with pytest.raises(Refused) as e:
    lower.compile_step(c, topology.parse(where))
  assert e.value.args == (cached,)


def test_an_error_of_the_compiler_has_one_line(monkeypatch):
  def compile(*_):
    raise jax.errors.JaxRuntimeError("INTERNAL: no way\nstack")

  monkeypatch.setattr(lower.xla_options, "compile", compile)
  c = lower.resolve(config.load(LLAMA, SMALL)[0])
  with pytest.raises(UserError, match="for here refuses the program: INTERNAL: no way$"):
    lower.compile_step(c, topology.parse("here"))


def _program_that_raises(message):
  """A compiled step whose program JAX cannot read."""

  class Executable:
    def as_text(self):
      raise jax.errors.JaxRuntimeError(message)

  return SimpleNamespace(executable=Executable())


def test_a_program_that_jax_cannot_read_is_an_error_with_a_way_out(monkeypatch):
  # JAX 0.10.2 raises this for programs of libtpu 0.0.52 that gather on the SparseCore.
  message = (
    "INTERNAL: RET_CHECK failure (external/xla/xla/hlo/ir/hlo_instruction.cc:390) "
    "proto.operand_ids_size() == *arity async-update instruction should have 1 operands but sees 4"
  )
  monkeypatch.setattr(lower, "compile_step", lambda *_, **__: _program_that_raises(message))
  with pytest.raises(UserError, match=r"gathers on the SparseCore .* but sees 4.*jax\[tpu\]") as e:
    plan.plan(LLAMA, SMALL, "v6e-8")
  assert jax.__version__ in str(e.value) and "\n" not in str(e.value)


def test_other_errors_of_a_program_keep_their_traceback():
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: other"):
    lower.text(_program_that_raises("INTERNAL: other"))
