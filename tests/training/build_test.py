"""What is built from a config: the parameters that an objective can train, and their account."""

import jax
import pytest

from jaxgpt import config, tree
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import build


def built(**changes):
  c = config.base()
  c.model.update(dict(vocab_size=8, num_layers=2, width=8, num_heads=2))
  c.data.seq_len = 8
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return build.build(config.resolve(c), mesh_lib.make(c.mesh, jax.devices()[:1]))


def test_the_reference_is_a_copy_of_what_is_trained_and_not_of_adapters():
  def copied(**changes):
    frozen = built(objective__name="preference", **changes).state["frozen"]
    return set(tree.flatten(frozen.get("reference", {})))

  everything = set(tree.flatten(built().state["params"]))
  assert copied() == everything
  adapters = dict(model__lora__rank=2)
  assert copied(**adapters) == set()
  assert copied(**adapters, optim__trainable=("*",)) == everything
  norm = copied(**adapters, optim__trainable=("*_lora_?", "final_norm/*"))
  assert norm == {"final_norm/scale", "final_norm/bias"}


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


def test_a_pipeline_keeps_the_inputs_of_layers():
  c = config.base()
  c.model.update(dict(num_layers=2, vocab_size=8, width=8, num_heads=2, remat="offload:input"))
  c.data.update(dict(seq_len=8, batch_size=8))
  c.mesh.update(dict(fsdp=1, stage=2))
  c = config.resolve(c)
  with pytest.raises(UserError, match="'offload:input' does not go with mesh.stage=2: a pipeline"):
    build.build(c, mesh_lib.make(c.mesh, jax.devices()[:2]))
