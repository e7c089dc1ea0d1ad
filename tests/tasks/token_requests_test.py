"""Log likelihoods of requests, without a folder or the harness."""

import jax
import pytest

from jaxgpt import config
from jaxgpt.inference import load
from jaxgpt.model import transformer
from jaxgpt.run import generation
from jaxgpt.tasks.token_requests import Requests
from jaxgpt.text.tokenizers.base import ByteTokenizer
from tests.model.transformer_test import STYLES

REQUEST = (tuple(range(70, 80)), (80, 81, 82, 83))
LONG = (tuple(range(60, 110)), (70,))


def experts_run():
  """A run of random weights whose experts drop tokens in training."""
  c = config.base()
  moe = dict(experts=4, width=16, capacity=0.5)
  fields = dict(vocab_size=300, max_len=64, num_layers=2, width=32, num_heads=4, init_std=0.3)
  c.model.update(STYLES["llama"] | fields | dict(mlp_pattern=("moe",), moe=moe))
  c.data.update(dict(seq_len=64, path=""))
  c = config.resolve(c)
  mesh, parts = load.place(c, jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = jax.jit(lambda: transformer.init(parts.model, jax.random.key(0)))()
  return load.Run(c, parts, mesh, params, 0, ByteTokenizer(), "", generation.Generation({}))


def test_experts_drop_no_token_of_a_request_whatever_it_is_padded_to():
  requests = Requests(experts_run(), batch_size=2)
  (alone, _), (got, _) = (
    requests.log_likelihoods(given)[0] for given in ([REQUEST], [REQUEST, LONG])
  )
  assert got == pytest.approx(alone, abs=1e-4)
