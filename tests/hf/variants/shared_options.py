"""Options that many families share: activations, rotary scalings, heads, biases, windows."""

import torch
import transformers

from tests.hf.variants.compare import Variant
from tests.hf.variants.small_models import FAMILIES, LAYERS, LLAMA3, YARN, longrope, of, rope


def activations(family: str, key: str) -> list[Variant]:
  names = ("gelu", "gelu_pytorch_tanh", "silu", "relu", "quick_gelu")
  if family in ("llama", "bert"):
    names += ("gelu_new", "gelu_fast", "gelu_python", "swish", "relu2", "mish")
  return [of(family, f"act-{name}", **{key: name}) for name in names]


def ropes(family: str, half: int) -> list[Variant]:
  """Scalings of the rotary embedding, as transformers 5 writes them and as version 4 did."""
  kinds = {
    "theta": rope("default", 500.0),
    "linear": rope("linear", factor=4.0),
    "dynamic": rope("dynamic", factor=4.0),
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-factor": YARN | {"attention_factor": 0.7},
    "yarn-beta": YARN | {"beta_fast": 4.0, "beta_slow": 2.0},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5},
    "yarn-truncate": YARN | {"truncate": False},
    "longrope": longrope(half),
    "longrope-beyond": longrope(half, original=8),
    "longrope-factor": longrope(half, factor=3.0),
    "longrope-attention": longrope(half, attention_factor=1.3),
    "partial": rope("default", partial_rotary_factor=0.5),
    "linear-partial": rope("linear", factor=2.0, partial_rotary_factor=0.5),
    "unknown": rope("mrope", mrope_section=[1, 1, 2]),
    "su": {**longrope(half), "rope_type": "su"},
  }
  out = [of(family, f"rope-{k}", {"rope_parameters": v}) for k, v in kinds.items()]
  old = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
    "yarn": {"type": "yarn", "factor": 2.0},
    "default": {"type": "default"},
    "longrope": {k: v for k, v in longrope(half).items() if k != "rope_theta"},
  }
  for k, v in old.items():
    edit = {"rope_parameters": ..., "rope_theta": 5e3, "rope_scaling": v}
    out.append(of(family, f"rope-old-{k}", edit))
  out += [
    of(
      family, "rope-old-theta", {"rope_parameters": ..., "rope_theta": 700.0, "rope_scaling": None}
    ),
    of(family, "rope-none", {"rope_parameters": ...}),
    of(family, "rope-both", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    of(family, "rope-both-theta", {"rope_parameters": rope("default", 300.0), "rope_theta": 900.0}),
    of(
      family,
      "rope-old-partial",
      {"rope_parameters": ..., "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    of(
      family,
      "rope-nested",
      {
        "rope_parameters": {
          "full_attention": rope("default", 300.0),
          "sliding_attention": rope("default"),
        }
      },
    ),
    of(
      family,
      "rope-original-outside",
      {
        "rope_parameters": {
          k: v for k, v in YARN.items() if k != "original_max_position_embeddings"
        },
        "original_max_position_embeddings": 8,
      },
    ),
  ]
  return out


def decoder_options(family: str) -> list[Variant]:
  out = [
    of(family, "tied", tie_word_embeddings=True),
    of(family, "untied", tie_word_embeddings=False),
    of(family, "bfloat16", dtype=torch.bfloat16),
    of(family, "float16", dtype=torch.float16),
    of(family, "no-architectures", {"architectures": None}),
    of(family, "other-class", {"architectures": ["SomethingForVideo"]}),
    of(family, "per-layer", {"per_layer_config": {"0": {"intermediate_size": 24}}}),
    of(family, "quantized", {"quantization_config": {"quant_method": "fp8"}}),
    of(family, "unknown-key", {"residual_multiplier": 3.0}),
  ]
  if family != "gpt2":
    out += [
      of(family, "mqa", num_key_value_heads=1),
      of(family, "mha", num_key_value_heads=4),
      of(family, "head-dim", head_dim=12),
      of(family, "layer-types", {"layer_types": ["full_attention", "sliding_attention"]}),
      of(family, "layer-types-short", {"layer_types": ["full_attention"]}),
      of(family, "layer-types-sliding", {"layer_types": ["sliding_attention"] * LAYERS}),
      of(family, "window", {"sliding_window": 4}),
      of(family, "window-null", {"sliding_window": None}),
      of(family, "window-missing", {"sliding_window": ...}),
      of(
        family,
        "window-use",
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
      ),
      of(family, "attention-bias", attention_bias=True),
      of(family, "mlp-bias", mlp_bias=True),
      of(family, "both-biases", attention_bias=True, mlp_bias=True),
    ]
  bare = {"Gemma3ForCausalLM": "Gemma3TextModel"}
  cls = FAMILIES[family][0]
  model = bare.get(cls, cls.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model"))
  out.append(of(family, "bare", cls=model))
  for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
    name = model.replace("TextModel", "TextModel").replace("Model", "") + f"For{head}"
    name = name.replace("Gemma3TextFor", "Gemma3TextFor")
    if hasattr(transformers, name):
      out.append(of(family, head.lower(), cls=name, num_labels=3))
  return out
