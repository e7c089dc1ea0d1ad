"""Eight fake devices, a compilation cache that all tests share, and a tiny corpus."""

import gc
import os
import pathlib

from tests import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags.EIGHT_DEVICES

# Read when gcsfs is imported: the emulator has no zonal buckets, and would not answer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import jax
import pytest

from jaxgpt import config
from jaxgpt.parallel import mesh
from jaxgpt.text.prepare import prepare

# Fixtures are found by the name under which a conftest imports them.
from tests.browser import browser  # noqa: F401
from tests.servers import _s3_server, gcs, s3, web  # noqa: F401
from tests.trained import other_trained, trained, trained_config  # noqa: F401

# As are the hooks of pytest.
from tests.worker_deaths import (  # noqa: F401
  pytest_configure,
  pytest_handlecrashitem,
  pytest_terminal_summary,
  pytest_testnodedown,
)

# Tracing makes many objects and few cycles: the collector takes a tenth of a test's time.
gc.set_threshold(200_000, 20, 20)

mesh.prepare_cpu()
jax.config.update(
  "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  """A prepared folder of bytes: 60 short documents whose words follow a pattern."""
  folder = tmp_path_factory.mktemp("corpus")
  words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs"]
  for i in range(60):
    text = " ".join(words[(i * j + j // 3) % 10] for j in range(10 + 3 * i))
    (folder / f"{i:02}.txt").write_text(text + "\n")
  prepare.prepare(
    [folder], folder / "data", tokenizer="bytes", validation=0.15, test=0.1, cut_chars=0
  )
  return folder / "data"


@pytest.fixture(scope="session")
def tiny(corpus):
  """A function (overrides) -> locked config of a model that compiles in seconds."""

  def make(**overrides):
    c = config.base()
    c.model.update(
      dict(
        num_layers=2,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=64,
        norm="rmsnorm",
        position="rotary",
        activation="silu",
        gated=True,
        bias=False,
      )
    )
    c.data.update(dict(path=str(corpus), seq_len=32, batch_size=8))
    c.optim.lr = 1e-2
    c.schedule.warmup_steps = 2
    c.train.steps = 8
    c.eval.every = 0
    c.checkpoint.every = 100
    c.log.every = 1
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return c

  return make
