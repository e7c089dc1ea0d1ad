"""XLA options of the train step."""

import jax
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh
from jaxgpt.training import xla_options


def test_options_of_the_config_override_those_of_the_chip():
  assert xla_options.options("cpu") == {}
  chips = xla_options.options("TPU v5")
  given = xla_options.options("TPU v5", ("xla_tpu_scoped_vmem_limit_kib=16384", "xla_flag=a=b"))
  assert given == chips | {"xla_tpu_scoped_vmem_limit_kib": "16384", "xla_flag": "a=b"}
  assert chips["xla_tpu_scoped_vmem_limit_kib"] == "65536"


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
