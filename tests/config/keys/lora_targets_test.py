"""Targets of adapters: each matches a weight, and PEFT's names mean ours."""

import ml_collections
import pytest

from jaxgpt import config, tree
from jaxgpt.config.keys import lora_targets
from jaxgpt.errors import UserError
from jaxgpt.model import lora, transformer

EXPERTS = {"mlp_pattern": ("moe",), "moe.experts": 2, "moe.per_token": 1}
MODELS = {
  "dense": {},
  "gated": {"gated": True},
  "experts": EXPERTS,
  "experts after a dense layer": EXPERTS | {"gated": True, "moe.first_dense": 1},
  "experts and a shared one": EXPERTS | {"moe.shared": 1, "gated": True},
  "latent": {"position": "rotary", "latent.kv_rank": 4, "latent.rope_dim": 2},
  "latent queries": {
    "position": "rotary",
    "latent.kv_rank": 4,
    "latent.q_rank": 4,
    "latent.rope_dim": 2,
  },
}


def resolved(changes, targets, rank=2):
  c = config.base()
  c.model.update(dict(vocab_size=8, num_layers=2, width=8, num_heads=2))
  c.model.update_from_flattened_dict(changes)
  c.model.lora.update(dict(rank=rank, targets=targets))
  return config.resolve(c)


def adapted(c):
  """Names of the weights of a model that have an adapter."""
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  found = lora.adapters(tree.flatten(transformer.abstract(model)[0]))
  return {path.split("/")[-1] for path in found}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_names_are_those_of_the_model(changes):
  c = resolved(changes, ("*",))
  assert adapted(c) == set(lora_targets.weights(c.model))


@pytest.mark.parametrize(
  "changes, targets, words",
  [
    ({}, ("q_porj",), "'q_porj' matches no weight .*there are: q, k, v, o, up, down, or '\\*'"),
    ({}, ("q", "vv"), "'vv' matches no weight .*did you mean 'v'"),
    ({}, ("gate_proj",), "'gate' matches no weight"),
    ({}, ("c_attn",), "'c_attn' .*its weights are q, k, v here"),
    ({}, ("layers/attn/q",), "'layers/attn/q' matches no weight"),
    ({}, (), "model.lora.rank=2 needs weights that get an adapter"),
    (EXPERTS, ("q", "up"), "'up' .*routed experts have no adapters; there are: q, k, v, o, or"),
    (EXPERTS, ("*expert*",), "'\\*expert\\*' .*routed experts have no adapters"),
    ({}, (1,), r"targets=\(1,\): give a tuple of names"),
  ],
)
def test_a_target_without_a_weight_is_refused_with_the_names(changes, targets, words):
  with pytest.raises(UserError, match=words):
    resolved(changes, targets)


def test_targets_do_not_matter_without_adapters():
  assert resolved({}, ("typo",), rank=0).model.lora.targets == ("typo",)


def test_names_of_peft_mean_the_same_weights():
  c = resolved({"gated": True}, ("q_proj", "v_proj", "down_proj", "q"))
  assert c.model.lora.targets == ("q", "v", "down")
  assert adapted(c) == {"q", "v", "down"}
  assert resolved({}, ("all-linear",)).model.lora.targets == ("*",)
  assert resolved({}, ("c_proj",)).model.lora.targets == ("o", "down")
