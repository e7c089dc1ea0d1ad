"""What is built from a config: the parameters that an objective can train, and their account."""

import jax
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import build


def built(**changes):
  c = config.base()
  c.model.update(dict(vocab_size=8, num_layers=2, width=8, num_heads=2))
  c.data.seq_len = 8
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return build.build(config.resolve(c), mesh_lib.make(c.mesh, jax.devices()[:1]))


def test_preferences_train_nothing_but_adapters():
  changes = dict(objective__name="preference", model__lora__rank=2)
  assert "frozen" in built(**changes).state
  assert "frozen" in built(**changes, optim__trainable=("*_lora_?",)).state
  with pytest.raises(UserError, match="must stay fixed, but .* also trains embed, final_norm"):
    built(**changes, optim__trainable=("*",))


def test_the_trained_parameters_are_counted_and_named():
  assert build.describe_trained(built()) == []
  q_and_v = built(model__lora__rank=1)
  assert build.describe_trained(q_and_v) == [
    "training 64 of 1,952 parameters: layers/attn/q_lora_a, layers/attn/q_lora_b, "
    "layers/attn/v_lora_a, layers/attn/v_lora_b"
  ]
  experts = dict(model__mlp_pattern=("moe",), model__moe__experts=2)
  line = build.describe_trained(built(model__lora__rank=1, model__lora__targets=("*",), **experts))
  assert line[0].endswith("; the routed experts have no adapters")


def test_muon_needs_matrices_and_adam_lr_something_else():
  muon = dict(optim__name="muon", optim__adam_lr=1e-4)
  built(**muon)
  with pytest.raises(UserError, match=r"optim.name='muon' has no effect: .*\(embed\) is a matrix"):
    built(**muon, optim__trainable=("embed",))
  with pytest.raises(UserError, match="optim.adam_lr=0.0001 has no effect: .*q_lora_a"):
    built(**muon, model__lora__rank=2)
  built(optim__name="muon", model__lora__rank=2)


def test_an_option_that_no_metric_writer_reads_is_refused_at_the_start():
  c = config.base()
  assert build.check_settings(c, {}) == []
  c.log.options.csv = True
  with pytest.raises(UserError, match="log.options.csv: no metric writer reads it"):
    build.check_settings(c, {})
