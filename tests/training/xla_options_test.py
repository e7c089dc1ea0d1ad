"""XLA options of the train step and of the other programs."""

import jax
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.inference import load, scoring
from jaxgpt.parallel import mesh
from jaxgpt.tasks.predict.devices import Devices
from jaxgpt.training import evaluation, xla_options


def test_options_of_the_config_override_those_of_the_chip():
  assert xla_options.options("cpu") == {}
  chips = xla_options.options("TPU v5")
  given = xla_options.options("TPU v5", ("xla_tpu_scoped_vmem_limit_kib=16384", "xla_flag=a=b"))
  assert given == chips | {"xla_tpu_scoped_vmem_limit_kib": "16384", "xla_flag": "a=b"}
  assert chips["xla_tpu_scoped_vmem_limit_kib"] == "65536"


def test_programs_that_run_a_model_have_the_options_of_the_chip(trained, monkeypatch):
  """Attention blocks need the chip's limit of VMEM in evaluations and predictions too."""
  run = load.load(trained, devices=jax.devices()[:1])
  made = {
    "evaluation": lambda: evaluation.make_step(run.parts.objective, run.mesh),
    "scores": lambda: scoring.make_step(run.parts.model, run.mesh),
    "predictions": lambda: Devices(run.mesh).jit(lambda params, batch: batch),
  }
  monkeypatch.setattr(xla_options, "options", lambda kind, given: {"xla_of_the_chip": "1"})
  rows = {name: np.ones((1, 8), np.int32) for name in ("tokens", "targets", "segment_ids")}
  batch = rows | {"positions": np.arange(8)[None], "loss_weights": np.ones((1, 8), np.float32)}
  for name, make in made.items():
    with jax.set_mesh(run.mesh), pytest.raises(Exception, match="xla_of_the_chip"):
      make()(run.params, batch)
      pytest.fail(f"{name} compiles without the options of the chip")


@pytest.mark.parametrize(
  "option, why",
  [
    ("xla_nonsense=1", "No such compile option: 'xla_nonsense'"),
    ("xla_cpu_enable_fast_math=maybe", "'maybe' is not a valid bool"),
  ],
)
def test_an_option_that_xla_refuses_is_named(option, why):
  lowered = jax.jit(lambda x: x + 1).lower(1.0)
  with pytest.raises(UserError, match=rf"mesh.compiler_options=\('{option}',\).*{why}"):
    xla_options.compile(lowered, mesh.make(config.base().mesh), (option,))
