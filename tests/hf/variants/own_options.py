"""Options that only some families have."""

import torch

from tests.hf.variants.compare import Variant
from tests.hf.variants.file_forms import plus, renamed, without
from tests.hf.variants.small_models import LAYERS, YARN, V, longrope, of, rope


def own_options() -> list[Variant]:
  """All of them."""
  return _sizes_and_windows() + _gemmas_and_others() + _deepseeks() + _berts()


def _sizes_and_windows() -> list[Variant]:
  out = []
  for k, v in {
    "inner": dict(n_inner=20),
    "eps": dict(layer_norm_epsilon=1e-2),
    "no-scale": dict(scale_attn_weights=False),
    "by-layer": dict(scale_attn_by_inverse_layer_idx=True),
    "upcast": dict(reorder_and_upcast_attn=True),
    "cross": dict(add_cross_attention=True),
  }.items():
    out.append(of("gpt2", k, **v))
  for family in (
    "llama",
    "qwen2",
    "gemma2",
    "olmo2",
    "mixtral",
    "deepseek_v3",
    "deepseek_v2",
    "phi3",
  ):
    out.append(of(family, "eps", rms_norm_eps=1e-2))
  out.append(of("starcoder2", "eps", norm_epsilon=1e-2))
  out.append(of("starcoder2", "no-bias", use_bias=False))
  for family in ("bert", "roberta"):
    out.append(of(family, "eps", layer_norm_eps=1e-2))
  out.append(of("modernbert", "eps", norm_eps=1e-2))
  for family in ("qwen2", "qwen3"):
    out += [
      of(family, "window-all", use_sliding_window=True, sliding_window=4, max_window_layers=0),
      of(family, "window-first", use_sliding_window=True, sliding_window=4, max_window_layers=1),
      of(family, "window-late", use_sliding_window=True, sliding_window=4),
      of(
        family,
        "window-types",
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
      ),
      of(
        family,
        "types-unused",
        {
          "layer_types": ["sliding_attention", "full_attention"],
          "sliding_window": 4,
          "use_sliding_window": False,
        },
      ),
    ]
  return out


def _gemmas_and_others() -> list[Variant]:
  out = []
  for family in ("gemma2", "gemma3"):
    out += [
      of(family, "caps", final_logit_softcapping=2.0, attn_logit_softcapping=0.5),
      of(family, "no-caps", final_logit_softcapping=None, attn_logit_softcapping=None),
      of(family, "scalar", query_pre_attn_scalar=3),
      of(family, "global", layer_types=["full_attention"] * LAYERS),
      of(family, "local", layer_types=["sliding_attention"] * LAYERS),
      of(family, "global-first", layer_types=["full_attention", "sliding_attention"]),
      of(family, "pattern-missing", {"layer_types": ...}),
      of(
        family, "hidden-act-too", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}
      ),
      of(family, "only-hidden-act", {"hidden_act": "gelu", "hidden_activation": ...}),
      of(family, "null-activation", {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None}),
      of(family, "bidirectional", use_bidirectional_attention=True),
      of(family, "caps-missing", {"final_logit_softcapping": ..., "attn_logit_softcapping": ...}),
    ]
  out += [
    of("gemma", "legacy-gelu", {"hidden_act": "gelu", "hidden_activation": None}),
    of(
      "gemma", "both-activations", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}
    ),
    of("gemma", "hidden-activation-silu", {"hidden_activation": "silu"}),
    of("gemma", "act-missing", {"hidden_act": ...}),
    of("gemma", "bidirectional", use_bidirectional_attention=True),
    of("gemma3", "pattern", {"layer_types": ..., "sliding_window_pattern": 2}),
    of("gemma3", "old-pattern", {"layer_types": ..., "_sliding_window_pattern": 2}),
    of(
      "gemma3",
      "rope-old",
      {
        "rope_parameters": ...,
        "rope_theta": 700.0,
        "rope_local_base_freq": 90.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
      },
    ),
    of(
      "gemma3", "rope-old-null", {"rope_parameters": ..., "rope_theta": 700.0, "rope_scaling": None}
    ),
    of("gemma3", "rope-missing", {"rope_parameters": ...}),
    of("gemma3", "rope-flat", {"rope_parameters": rope("linear", 300.0, factor=2.0)}),
    of(
      "gemma3",
      "rope-local-scaled",
      {
        "rope_parameters": {
          "full_attention": rope("default"),
          "sliding_attention": rope("linear", factor=4.0),
        }
      },
    ),
    of(
      "gemma3",
      "rope-yarn",
      {"rope_parameters": {"full_attention": YARN, "sliding_attention": rope("default")}},
    ),
    of(
      "gemma3",
      "rope-full-only",
      {"rope_parameters": {"full_attention": rope("linear", 300.0, factor=2.0)}},
    ),
    of("gemma3", "rope-both", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    of(
      "gemma3",
      "rope-partial",
      {
        "rope_parameters": {
          "full_attention": rope("default", partial_rotary_factor=0.5),
          "sliding_attention": rope("default"),
        }
      },
    ),
    of("smollm3", "all-rope", no_rope_layers=[1, 1]),
    of("smollm3", "no-rope", no_rope_layers=[0, 0]),
    of("smollm3", "first-no-rope", no_rope_layers=[0, 1]),
    of("smollm3", "short-no-rope", {"no_rope_layers": [0]}),
    of("smollm3", "interval", {"no_rope_layers": ..., "no_rope_layer_interval": 1}),
    of("smollm3", "interval-missing", {"no_rope_layers": ..., "no_rope_layer_interval": ...}),
    of("smollm3", "use-window", use_sliding_window=True, sliding_window=4),
    of("phi3", "partial", {"rope_parameters": rope("default", partial_rotary_factor=0.5)}),
    of("phi3", "partial-old", {"rope_parameters": ..., "partial_rotary_factor": 0.75}),
    of("phi3", "partial-odd", {"rope_parameters": rope("default", partial_rotary_factor=0.4)}),
    of("phi3", "window-on", sliding_window=4),
    of(
      "phi3",
      "old-su",
      {
        "rope_parameters": ...,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
          "type": "su",
          "short_factor": [1.0, 1.1, 1.2, 1.3],
          "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
      },
    ),
    of(
      "phi3",
      "old-yarn",
      {
        "rope_parameters": ...,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 8,
        "rope_scaling": {
          "type": "yarn",
          "short_factor": [1.0, 1.1, 1.2, 1.3],
          "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
      },
    ),
    of("phi3", "longrope-short", {"rope_parameters": longrope(3)}),
    of(
      "phi3",
      "longrope-outside",
      {"original_max_position_embeddings": 8, "rope_parameters": longrope(4)},
    ),
    of("phi3", "longrope-partial", {"rope_parameters": longrope(2, partial_rotary_factor=0.5)}),
    of("mixtral", "one-expert", num_experts_per_tok=1),
    of("mixtral", "all-experts", num_experts_per_tok=4),
    of("mixtral", "window-on", sliding_window=4),
    of("mixtral", "jitter", router_jitter_noise=0.5),
    of("qwen3_moe", "normalized", norm_topk_prob=True),
    of("qwen3_moe", "dense-layers", mlp_only_layers=[0]),
    of("qwen3_moe", "all-dense", mlp_only_layers=[0, 1]),
    of("qwen3_moe", "step", decoder_sparse_step=2),
    of("qwen3_moe", "step-0", {"decoder_sparse_step": 0}),
    of("qwen3_moe", "local-experts-name", {"num_experts": ..., "num_local_experts": 4}),
    of("qwen3_moe", "normalized-missing", {"norm_topk_prob": ...}),
  ]
  return out


def _deepseeks() -> list[Variant]:
  out = []
  for family in ("deepseek_v2", "deepseek_v3"):
    out += [
      of(family, "no-q-rank", q_lora_rank=None),
      of(family, "all-moe", first_k_dense_replace=0),
      of(family, "all-dense", first_k_dense_replace=2),
      of(family, "scale", routed_scaling_factor=3.0),
      of(family, "shared-2", n_shared_experts=2),
      of(family, "no-shared", {"n_shared_experts": None}, tensors=without("shared_experts")),
      of(family, "normalized", norm_topk_prob=True),
      of(family, "not-normalized", norm_topk_prob=False),
      of(family, "v-dim", v_head_dim=12),
      of(family, "kv-heads", num_key_value_heads=2),
      of(family, "groups", n_group=4, topk_group=2),
      of(family, "one-group", n_group=1, topk_group=1),
      of(family, "softmax", {"scoring_func": "softmax"}),
      of(family, "sigmoid", {"scoring_func": "sigmoid"}),
      of(family, "noaux", {"topk_method": "noaux_tc"}),
      of(family, "every-second", {"moe_layer_freq": 2}),
      of(family, "interleave", {"rope_interleave": False}),
      of(
        family, "yarn-all-dim", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}
      ),
      of(family, "yarn-one-mscale", {"rope_parameters": YARN | {"mscale": 0.7}}),
      of(family, "yarn-only-all-dim", {"rope_parameters": YARN | {"mscale_all_dim": 0.7}}),
      of(
        family,
        "yarn-old",
        {
          "rope_parameters": ...,
          "rope_theta": 5e3,
          "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 8,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
          },
        },
      ),
      of(
        family,
        "mtp",
        {"num_nextn_predict_layers": 1},
        tensors=plus(
          model__layers__2__eh_proj__weight=torch.ones(32, 64),
          model__layers__2__enorm__weight=torch.ones(32),
        ),
      ),
    ]
  out += [
    of("deepseek_v2", "group-limited", topk_method="group_limited_greedy", n_group=2, topk_group=1),
    of("deepseek_v2", "greedy-groups", topk_method="greedy", n_group=2, topk_group=1),
    of(
      "deepseek_v3",
      "moonlight",
      {"auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"}, "seq_aux": True},
      rms_norm_eps=1e-5,
      q_lora_rank=None,
      n_group=1,
      topk_group=1,
      routed_scaling_factor=2.446,
    ),
  ]
  return out


def _berts() -> list[Variant]:
  out = []
  for family, cls in (
    ("bert", "Bert"),
    ("roberta", "Roberta"),
    ("xlm_roberta", "XLMRoberta"),
    ("camembert", "Camembert"),
  ):
    bias = "cls.predictions.{}bias" if family == "bert" else "lm_head.{}bias"
    out += [
      of(family, "untied", tie_word_embeddings=False),
      of(family, "untied-old", {"tie_word_embeddings": False}),
      of(
        family,
        "untied-one-bias",
        tie_word_embeddings=False,
        tensors=without(bias.format("decoder.")),
      ),
      of(
        family,
        "untied-no-own-bias",
        tie_word_embeddings=False,
        tensors=without(bias.format("")),
      ),
      of(
        family,
        "tied-other-bias",
        tensors=lambda t, name=bias.format("decoder."): t | {name: torch.linspace(-1, 1, V)},  # noqa: B008
      ),
      of(
        family,
        "tied-moved-bias",
        tensors=renamed(bias.format(""), bias.format("decoder.")),
      ),
      of(family, "classifier", cls=f"{cls}ForSequenceClassification", num_labels=3),
      of(family, "regression", cls=f"{cls}ForSequenceClassification", num_labels=1),
      of(
        family,
        "classifier-labels-missing",
        {"id2label": ...},
        cls=f"{cls}ForSequenceClassification",
      ),
      of(family, "pooler", cls=f"{cls}Model"),
      of(family, "no-pooler", cls=f"{cls}Model", tensors=without("pooler")),
      of(family, "half-pooler", cls=f"{cls}Model", tensors=without("pooler.dense.bias")),
      of(family, "tokens", cls=f"{cls}ForTokenClassification", num_labels=3),
      of(family, "answers", cls=f"{cls}ForQuestionAnswering"),
      of(family, "choice", cls=f"{cls}ForMultipleChoice"),
      of(family, "decoder", {"is_decoder": True}),
      of(family, "cross", {"is_decoder": True, "add_cross_attention": True}),
      of(family, "relative", {"position_embedding_type": "relative_key"}),
      of(family, "types", type_vocab_size=1),
      of(family, "chunked", chunk_size_feed_forward=4),
      of(family, "dropout", classifier_dropout=0.5, hidden_dropout_prob=0.3),
      of(family, "pad", pad_token_id=3),
      of(family, "bfloat16", dtype=torch.bfloat16),
    ]
  out += [
    of("bert", "pretraining", cls="BertForPreTraining", load="BertForMaskedLM"),
    of("bert", "next-sentence", cls="BertForNextSentencePrediction"),
    of("bert", "causal", cls="BertLMHeadModel", is_decoder=True),
    of(
      "bert",
      "lm-with-pooler",
      tensors=plus(
        bert__pooler__dense__weight=torch.ones(32, 32), bert__pooler__dense__bias=torch.ones(32)
      ),
    ),
    of("modernbert", "untied", tie_word_embeddings=False),
    of("modernbert", "global", layer_types=["full_attention"] * LAYERS),
    of("modernbert", "local", layer_types=["sliding_attention"] * LAYERS),
    of("modernbert", "every-1", {"layer_types": ..., "global_attn_every_n_layers": 1}),
    of("modernbert", "every-missing", {"layer_types": ..., "global_attn_every_n_layers": ...}),
    of("modernbert", "odd-window", local_attention=7),
    of("modernbert", "window-missing", {"local_attention": ...}),
    of("modernbert", "classifier", cls="ModernBertForSequenceClassification", num_labels=3),
    of(
      "modernbert",
      "classifier-mean",
      cls="ModernBertForSequenceClassification",
      classifier_pooling="mean",
    ),
    of(
      "modernbert",
      "classifier-silu",
      cls="ModernBertForSequenceClassification",
      classifier_activation="silu",
    ),
    of("modernbert", "head-silu", classifier_activation="silu"),
    of("modernbert", "both-silu", classifier_activation="silu", hidden_activation="silu"),
    of("modernbert", "bare", cls="ModernBertModel"),
    of("modernbert", "bare-silu", cls="ModernBertModel", hidden_activation="silu"),
    of("modernbert", "tokens", cls="ModernBertForTokenClassification"),
    of("modernbert", "norm-bias", norm_bias=True),
    of("modernbert", "attention-bias", attention_bias=True),
    of("modernbert", "mlp-bias", mlp_bias=True),
    of("modernbert", "classifier-bias", classifier_bias=True),
    of("modernbert", "no-decoder-bias", decoder_bias=False),
    of("modernbert", "sparse", sparse_prediction=True),
    of(
      "modernbert",
      "rope-old",
      {"rope_parameters": ..., "global_rope_theta": 700.0, "local_rope_theta": 90.0},
    ),
    of("modernbert", "rope-missing", {"rope_parameters": ...}),
    of(
      "modernbert",
      "rope-scaled",
      {"rope_parameters": ..., "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    of(
      "modernbert",
      "rope-linear",
      {
        "rope_parameters": {
          "full_attention": rope("linear", factor=2.0),
          "sliding_attention": rope("default"),
        }
      },
    ),
    of("modernbert", "bfloat16", dtype=torch.bfloat16),
  ]
  return out
