"""A small model of each family, and parts of which variants are made."""

from typing import Any

from tests.hf.variants.compare import IDS, Json, Variant

V, T, LAYERS = IDS["vocab_size"], 32, 2
SIZES = dict(
  IDS,
  hidden_size=32,
  intermediate_size=24,
  num_hidden_layers=LAYERS,
  num_attention_heads=4,
  max_position_embeddings=T,
)
DECODER = dict(SIZES, num_key_value_heads=2)
LATENT = dict(
  SIZES,
  num_key_value_heads=4,
  n_routed_experts=4,
  num_experts_per_tok=2,
  moe_intermediate_size=8,
  first_k_dense_replace=1,
  n_shared_experts=1,
  kv_lora_rank=8,
  q_lora_rank=8,
  qk_nope_head_dim=8,
  qk_rope_head_dim=8,
  v_head_dim=8,
)
ROBERTA = dict(SIZES, max_position_embeddings=T + 2, pad_token_id=1, bos_token_id=0)

FAMILIES: dict[str, tuple[str, Json]] = {
  "gpt2": ("GPT2LMHeadModel", dict(IDS, n_positions=T, n_embd=32, n_layer=LAYERS, n_head=4)),
  "llama": ("LlamaForCausalLM", DECODER),
  "mistral": ("MistralForCausalLM", dict(DECODER, sliding_window=5)),
  "qwen2": ("Qwen2ForCausalLM", DECODER),
  "qwen3": ("Qwen3ForCausalLM", dict(DECODER, head_dim=16)),
  "smollm3": ("SmolLM3ForCausalLM", dict(DECODER, no_rope_layer_interval=2)),
  "starcoder2": ("Starcoder2ForCausalLM", DECODER),
  "gemma": ("GemmaForCausalLM", dict(DECODER, head_dim=16)),
  "gemma2": ("Gemma2ForCausalLM", dict(DECODER, head_dim=16, sliding_window=5)),
  "gemma3": ("Gemma3ForCausalLM", dict(DECODER, head_dim=16, sliding_window=5)),
  "phi3": ("Phi3ForCausalLM", DECODER),
  "olmo2": ("Olmo2ForCausalLM", DECODER),
  "mixtral": ("MixtralForCausalLM", dict(DECODER, num_local_experts=4)),
  "qwen3_moe": (
    "Qwen3MoeForCausalLM",
    dict(DECODER, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
  ),
  "deepseek_v2": ("DeepseekV2ForCausalLM", LATENT),
  "deepseek_v3": ("DeepseekV3ForCausalLM", dict(LATENT, n_group=2, topk_group=1)),
  "bert": ("BertForMaskedLM", SIZES),
  "roberta": ("RobertaForMaskedLM", ROBERTA),
  "xlm_roberta": ("XLMRobertaForMaskedLM", ROBERTA),
  "camembert": ("CamembertForMaskedLM", ROBERTA),
  "modernbert": (
    "ModernBertForMaskedLM",
    dict(SIZES, local_attention=8, global_attn_every_n_layers=2),
  ),
}
ROTARY = [k for k in FAMILIES if k not in ("gpt2", "bert", "roberta", "xlm_roberta", "camembert")]
PLAIN = [k for k in ROTARY if k not in ("modernbert", "gemma3", "deepseek_v2", "deepseek_v3")]
ENCODERS = ["bert", "roberta", "xlm_roberta", "camembert", "modernbert"]


def of(family: str, name: str, edit: Json | None = None, **values: Any) -> Variant:
  """A variant of a family with other values of its config class, or edits of its config.json.

  `values` may also hold `cls`, `tensors`, `files` and `load` of `Variant`.
  """
  cls, base = FAMILIES[family]
  more = {key: values.pop(key) for key in ("tensors", "files", "load") if key in values}
  cls = values.pop("cls", cls)
  return Variant(f"{family}-{name}", cls, base | values, edit or {}, **more)


def rope(kind: str, theta: float = 10_000.0, **more: Any) -> Json:
  return {"rope_type": kind, "rope_theta": theta, **more}


LLAMA3 = rope(
  "llama3",
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=8)


def longrope(half: int, original: int = 16, **more: Any) -> Json:
  return rope(
    "longrope",
    short_factor=[1.0 + 0.1 * i for i in range(half)],
    long_factor=[2.0 + 0.5 * i for i in range(half)],
    original_max_position_embeddings=original,
    **more,
  )
