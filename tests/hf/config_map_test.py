"""Keys of config.json: none that transformers reads is passed over, none has another default."""

import json

import pytest

from jaxgpt.errors import UserError
from jaxgpt.hf import config_map, convert, families

transformers = pytest.importorskip("transformers")
variants = pytest.importorskip("tests.hf.variants")


def config_json(family):
  """(all keys of a small model with their values, the class's defaults)."""
  cls, values = variants.FAMILIES[family]
  of_class = getattr(transformers, cls).config_class
  as_json = lambda c: json.loads(c.to_json_string(use_diff=False))
  return as_json(of_class(**values)) | {"architectures": [cls]}, as_json(of_class())


def fields_or_refusal(hf):
  try:
    return convert.read(hf).fields
  except UserError as e:
    return str(e)


@pytest.mark.parametrize("family", variants.FAMILIES)
def test_every_key_of_transformers_is_read_or_has_no_effect(family):
  hf, _ = config_json(family)
  recorded = config_map.ConfigJson(hf)
  for entry in (*config_map.EVERYWHERE, *families.FAMILIES[hf["model_type"]].config):
    entry.read(recorded)
  passed_over = hf.keys() - recorded.seen
  assert [key for key in sorted(passed_over) if not config_map.is_harmless(key)] == []


# Their defaults follow from other values, not from those of a model without any.
DERIVED = {"head_dim", "num_key_value_heads", "layer_types", "no_rope_layers"}


@pytest.mark.parametrize("family", variants.FAMILIES)
def test_a_missing_key_has_the_default_of_transformers(family):
  hf, defaults = config_json(family)
  for key in hf.keys() & defaults.keys() - DERIVED - {"architectures"}:
    missing = fields_or_refusal({k: v for k, v in hf.items() if k != key})
    if isinstance(missing, dict):  # else a required key
      assert missing == fields_or_refusal(hf | {key: defaults[key]}), key


def test_hints_are_for_typos_and_not_for_other_architectures():
  from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

  for name in CONFIG_MAPPING_NAMES:
    if name not in families.FAMILIES:
      with pytest.raises(UserError, match=r"is not supported; supported are"):
        convert.read({"model_type": name})
  for name, meant in {"lama": "llama", "gema2": "gemma2", "phi-3": "phi3"}.items():
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
      convert.read({"model_type": name})


def test_keys_without_a_meaning_are_named():
  hf, _ = config_json("llama")
  assert convert.read(hf).notes == []
  notes = convert.read(hf | {"residual_multiplier": 3.0, "use_cache": False, "x": None}).notes
  assert notes == ["keys of config.json without a meaning here: residual_multiplier=3.0"]


@pytest.mark.parametrize(
  "types", [["sliding_attention"] * 2, ["full_attention"], ["full_attention"] * 3, ["other"] * 2]
)
def test_layer_types_that_a_family_does_not_read_must_agree_with_its_layers(types):
  """Llama's code has one kind of layer, but its masks are made from the key."""
  hf, _ = config_json("llama")
  assert convert.read(hf | {"layer_types": ["full_attention"] * 2}).notes == []
  with pytest.raises(UserError, match="layer_types=.* is not supported"):
    convert.read(hf | {"layer_types": types})


@pytest.mark.parametrize(
  "values",
  [
    {"num_hidden_layers": "two"},
    {"hidden_size": [32]},
    {"rope_parameters": ["linear"]},
    {"rope_parameters": {"rope_type": "linear", "factor": "x"}},
    {"architectures": 7},
  ],
)
def test_values_of_the_wrong_form_are_one_line(values):
  hf, _ = config_json("llama")
  with pytest.raises(UserError) as e:
    convert.configured(convert.read(hf | values).fields)
  assert "\n" not in str(e.value)
