"""Runs of a few steps with checkpoints, for tests that read them."""

import contextlib
import io

import pytest

from jaxgpt import config
from jaxgpt.training import loop


def train(c, folder, **options):
  """Trains without printing. Returns what was printed."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    loop.train(c, folder, dict.fromkeys(config.flatten(c), "file"), **options)
  return out.getvalue()


@pytest.fixture(scope="session")
def trained_config(tiny):
  """The config of the run."""
  return tiny(checkpoint__every=4, checkpoint__keep=3, eval__every=4)


@pytest.fixture(scope="session")
def trained(trained_config, tmp_path_factory):
  """The run folder. Tests do not write into it."""
  folder = tmp_path_factory.mktemp("trained") / "run"
  train(trained_config, folder)
  return folder


@pytest.fixture(scope="session")
def other_trained(trained_config, tmp_path_factory):
  """The same with another learning rate, for 4 steps."""
  folder = tmp_path_factory.mktemp("other") / "run"
  c = trained_config.copy_and_resolve_references()
  c.optim.lr = 2e-2
  c.train.steps = 4
  train(c, folder)
  return folder
