"""The part of a config that says what a model computes."""

from jaxgpt import config
from jaxgpt.config.architecture import architecture, same_value


def of(changes=()):
  c = config.base()
  c.update_from_flattened_dict({f"model.{key}": value for key, value in dict(changes).items()})
  return architecture(config.resolve(c, vocab_size=8).model)


def test_keys_of_training_and_keys_without_effect_are_left_out():
  plain = of()
  assert plain == of({"dropout": 0.1, "remat": "full", "window": 7, "moe.experts": 3})
  assert "lora.rank" not in plain and "rope.theta" not in plain and "num_labels" not in plain


def test_keys_that_change_the_model_are_compared():
  rotary = of({"position": "rotary"})
  assert "rope.theta" in rotary and "rope.factor" not in rotary
  assert "rope.factor" in of({"position": "rotary", "rope.scaling": "ntk"})
  assert of({"width": 768})["width"] == 768
  local = {"attention_pattern": ("local",), "window": 7}
  assert of(local) != of(local | {"window": 8})


def test_patterns_are_compared_layer_by_layer():
  once = of({"attention_pattern": ("global", "local"), "window": 2, "num_layers": 4})
  twice = of({"attention_pattern": ("global", "local") * 2, "window": 2, "num_layers": 4})
  assert once == twice and once["attention_pattern"] == ("global", "local", "global", "local")
  shallow = of({"attention_pattern": ("global", "local"), "window": 2, "num_layers": 1})
  assert shallow["attention_pattern"] == ("global",) and "window" not in shallow


def test_floats_may_have_gone_through_json():
  assert same_value(0.1, 0.1 + 1e-9) and same_value([1.0, "a"], (1, "a"))
  assert not same_value(0.1, 0.2) and not same_value((1,), (1, 2)) and not same_value("a", "b")
