import pytest

from jaxgpt import config
from jaxgpt.config.presets import PRESETS
from jaxgpt.errors import UserError
from jaxgpt.hf import convert


def of_preset(name, **changes):
  found = config.flatten(PRESETS[name] | dict(preset=name))
  return convert.configured(found | {k.replace("__", "."): v for k, v in changes.items()}).model


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_what_a_family_publishes(name):
  family = convert.family_of(of_preset(name))
  others = {
    "qwen25": "qwen2",
    "gemma3": "gemma3_text",
    "smollm2": "llama",
    "llama": "llama",
    "qwen3": "qwen3",
    "deepseek": "deepseek",
  }
  expected = next(
    (kind for start, kind in others.items() if name.startswith(start)), name.split("_")[0]
  )
  assert family.model_type.startswith(expected)


def test_the_first_difference_is_named():
  with pytest.raises(UserError, match=r"llama: model\.norm_placement='both', where .* 'pre'"):
    convert.family_of(of_preset("llama3_8b", norm_placement="both"), "llama")
  with pytest.raises(UserError, match="family='lama' is unknown; did you mean 'llama'"):
    convert.family_of(of_preset("llama3_8b"), "lama")
