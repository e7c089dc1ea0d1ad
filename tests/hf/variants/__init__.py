"""Variants of published models: each family with each option of its config.json and each file form.

A variant is a tiny random model of transformers, saved and then edited. `outcome` imports it,
compares the outputs with those of transformers for the same folder, exports it and compares again.
Every variant must be equal to 1e-5 or refused by name: nothing may differ without a word.
"""

from tests.hf.variants.compare import Outcome, Variant, outcome
from tests.hf.variants.file_forms import file_forms
from tests.hf.variants.own_options import own_options
from tests.hf.variants.shared_options import activations, decoder_options, ropes
from tests.hf.variants.small_models import ENCODERS, FAMILIES, PLAIN

__all__ = ["FAMILIES", "VARIANTS", "Outcome", "Variant", "outcome"]


def _all() -> list[Variant]:
  out = [Variant(name, cls, values, {}) for name, (cls, values) in FAMILIES.items()]
  for family in FAMILIES:
    if family not in ENCODERS:
      out += decoder_options(family)
  halves = {"qwen3": 8, "gemma": 8, "gemma2": 8}
  for family in PLAIN:
    out += ropes(family, halves.get(family, 4))
  out += ropes("deepseek_v2", 4) + ropes("deepseek_v3", 4)
  keys = {
    "gpt2": "activation_function",
    "gemma2": "hidden_activation",
    "gemma3": "hidden_activation",
    "modernbert": "hidden_activation",
  }
  for family in FAMILIES:
    out += activations(family, keys.get(family, "hidden_act"))
  return out + file_forms() + own_options()


VARIANTS = _all()
