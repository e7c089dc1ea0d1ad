"""Published architectures as values of the config's `model` section: data without code.

A family is a dict of fields. Each of its sizes adds widths and depths, and a few fields of its own.
"""

from typing import Any, NamedTuple


class _Size(NamedTuple):
  """The dimensions in which the sizes of a family differ."""

  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  mlp_width: int


def _sizes(family: str, fields: dict[str, Any], **sizes: tuple[Any, ...]) -> dict[str, Any]:
  """Presets of a family, {'family_size': fields}.

  Args:
    family: Prefix of the names.
    fields: Fields that all sizes share.
    **sizes: For each size the values of `_Size`, then a dict of its own fields.
  """
  return {
    f"{family}_{name}": fields | _Size(*dimensions)._asdict() | own
    for name, (*dimensions, own) in sizes.items()
  }


# fmt: off
_GPT2 = dict(
    vocab_size=50257, max_len=1024, norm="layernorm", norm_eps=1e-5, position="learned",
    activation="gelu", gated=False, bias=True, tie_embeddings=True)  # Radford et al. 2019

_LLAMA: dict[str, Any] = dict(
    norm="rmsnorm", norm_eps=1e-5, position="rotary", activation="silu", gated=True, bias=False,
    tie_embeddings=False)  # arXiv:2302.13971

_LLAMA2 = _LLAMA | dict(vocab_size=32000, max_len=4096)  # arXiv:2307.09288
_LLAMA3 = _LLAMA | dict(vocab_size=128256, max_len=8192, rope=dict(theta=500_000.0))
_LLAMA31: dict[str, Any] = _LLAMA3 | dict(max_len=131072, rope=dict(  # arXiv:2407.21783
    theta=500_000.0, scaling="llama3", factor=8.0, original_len=8192))
_LLAMA32 = _LLAMA31 | dict(tie_embeddings=True, rope=_LLAMA31["rope"] | dict(factor=32.0))

_MISTRAL = _LLAMA | dict(max_len=32768)  # arXiv:2310.06825
_MIXTRAL = _MISTRAL | dict(vocab_size=32000, mlp_pattern=("moe",), rope=dict(theta=1e6),
                           moe=dict(experts=8, per_token=2))  # arXiv:2401.04088

_QWEN25 = _LLAMA | dict(  # arXiv:2412.15115
    vocab_size=151936, max_len=32768, norm_eps=1e-6, qkv_bias=True, rope=dict(theta=1e6))
_QWEN3 = _LLAMA | dict(  # arXiv:2505.09388
    vocab_size=151936, max_len=40960, norm_eps=1e-6, qk_norm="head", head_dim=128,
    rope=dict(theta=1e6))
_TIED = dict(tie_embeddings=True)


def _qwen3_moe(width: int) -> dict[str, Any]:
  return dict(mlp_pattern=("moe",), moe=dict(experts=128, per_token=8, width=width))


_GEMMA = _LLAMA | dict(  # arXiv:2403.08295
    vocab_size=256000, max_len=8192, norm_eps=1e-6, activation="gelu", tie_embeddings=True,
    head_dim=256)
_GEMMA2 = _GEMMA | dict(  # arXiv:2408.00118
    norm_placement="both", attention_pattern=("local", "global"), window=4096,
    attn_softcap=50.0, logit_softcap=30.0)
_GEMMA3 = _GEMMA | dict(  # arXiv:2503.19786, the text model
    vocab_size=262144, max_len=32768, norm_placement="both", qk_norm="head",
    attention_pattern=("local",) * 5 + ("global",), window=512,
    rope=dict(theta=1e6, local_theta=10_000.0))

_PHI3 = _LLAMA | dict(vocab_size=32064, max_len=4096, attention_pattern=("local",),
                      window=2047)  # arXiv:2404.14219
_OLMO2 = _LLAMA | dict(  # arXiv:2501.00656
    vocab_size=100352, max_len=4096, norm_eps=1e-6, norm_placement="branch", qk_norm="all",
    rope=dict(theta=500_000.0))
_STARCODER2 = dict(  # arXiv:2402.19173
    vocab_size=49152, max_len=16384, norm="layernorm", norm_eps=1e-5, position="rotary",
    activation="gelu", gated=False, bias=True, tie_embeddings=True,
    attention_pattern=("local",), window=4096)
_SMOLLM2 = _LLAMA | dict(  # arXiv:2502.02737
    vocab_size=49152, max_len=8192, tie_embeddings=True, rope=dict(theta=100_000.0))

_DEEPSEEK = _LLAMA | dict(  # head_dim: 128 plain and 64 rotated entries
    norm_eps=1e-6, max_len=163840, head_dim=192, mlp_pattern=("moe",),
    rope=dict(scaling="yarn", factor=40.0, original_len=4096, attention_factor=1.0))
_DEEPSEEK_V2_LITE = _DEEPSEEK | dict(  # arXiv:2405.04434
    vocab_size=102400, attn_scale=0.11472138679292609,  # (1 + 0.0707 ln 40)^2 / sqrt(192)
    latent=dict(kv_rank=512, rope_dim=64, v_dim=128),
    moe=dict(experts=64, per_token=6, width=1408, shared=2, first_dense=1, normalize=False))
_DEEPSEEK_V3 = _DEEPSEEK | dict(  # arXiv:2412.19437, without the module that predicts two ahead
    vocab_size=129280, attn_scale=0.1352337788608801,  # (1 + 0.1 ln 40)^2 / sqrt(192)
    latent=dict(kv_rank=512, q_rank=1536, rope_dim=64, v_dim=128),
    moe=dict(experts=256, per_token=8, width=2048, shared=1, first_dense=3, router="sigmoid",
             scale=2.5, groups=8, top_groups=4))

_BERT = dict(  # arXiv:1810.04805, with the head for masked language modelling
    vocab_size=30522, max_len=512, norm="layernorm", norm_eps=1e-12, norm_placement="post",
    position="learned", token_types=2, embed_norm=True, activation="gelu_exact", gated=False,
    bias=True, tie_embeddings=True, causal=False, head_transform="norm", head_bias=True)
_ROBERTA = _BERT | dict(vocab_size=50265, norm_eps=1e-5, token_types=1)  # arXiv:1907.11692
_MODERNBERT = _BERT | dict(  # arXiv:2412.13663
    vocab_size=50368, max_len=8192, norm_eps=1e-5, norm_placement="pre", first_norm=False,
    position="rotary", token_types=0, gated=True, bias=False, window=65,
    attention_pattern=("global", "local", "local"), rope=dict(theta=160_000.0, local_theta=1e4))

PRESETS: dict[str, dict[str, Any]] = {
    **_sizes("gpt2", _GPT2,
             **{"124m": (12, 768, 12, 12, 3072, {}), "355m": (24, 1024, 16, 16, 4096, {}),
                "774m": (36, 1280, 20, 20, 5120, {}), "1558m": (48, 1600, 25, 25, 6400, {})}),
    **_sizes("llama2", _LLAMA2,
             **{"7b": (32, 4096, 32, 32, 11008, {}), "13b": (40, 5120, 40, 40, 13824, {}),
                "70b": (80, 8192, 64, 8, 28672, {})}),
    **_sizes("llama3", _LLAMA3,
             **{"8b": (32, 4096, 32, 8, 14336, {}), "70b": (80, 8192, 64, 8, 28672, {})}),
    **_sizes("llama31", _LLAMA31,
             **{"8b": (32, 4096, 32, 8, 14336, {}), "70b": (80, 8192, 64, 8, 28672, {}),
                "405b": (126, 16384, 128, 8, 53248, {})}),
    **_sizes("llama32", _LLAMA32,
             **{"1b": (16, 2048, 32, 8, 8192, {}), "3b": (28, 3072, 24, 8, 8192, {})}),
    **_sizes("mistral", _MISTRAL,
             **{"7b_v01": (32, 4096, 32, 8, 14336, dict(
                 vocab_size=32000, attention_pattern=("local",), window=4096)),
                "7b_v03": (32, 4096, 32, 8, 14336, dict(
                    vocab_size=32768, rope=dict(theta=1e6)))}),
    **_sizes("mixtral", _MIXTRAL,
             **{"8x7b": (32, 4096, 32, 8, 14336, {}),
                "8x22b": (56, 6144, 48, 8, 16384, dict(max_len=65536))}),
    **_sizes("qwen25", _QWEN25,
             **{"0_5b": (24, 896, 14, 2, 4864, _TIED), "1_5b": (28, 1536, 12, 2, 8960, _TIED),
                "3b": (36, 2048, 16, 2, 11008, _TIED),
                **{size: (*values, dict(vocab_size=152064, max_len=131072))
                   for size, values in {"7b": (28, 3584, 28, 4, 18944),
                                        "14b": (48, 5120, 40, 8, 13824),
                                        "32b": (64, 5120, 40, 8, 27648),
                                        "72b": (80, 8192, 64, 8, 29568)}.items()}}),
    **_sizes("qwen3", _QWEN3,
             **{"0_6b": (28, 1024, 16, 8, 3072, _TIED), "1_7b": (28, 2048, 16, 8, 6144, _TIED),
                "4b": (36, 2560, 32, 8, 9728, _TIED), "8b": (36, 4096, 32, 8, 12288, {}),
                "14b": (40, 5120, 40, 8, 17408, {}), "32b": (64, 5120, 64, 8, 25600, {}),
                "30b_a3b": (48, 2048, 32, 4, 6144, _qwen3_moe(768)),
                "235b_a22b": (94, 4096, 64, 4, 12288, _qwen3_moe(1536))}),
    **_sizes("gemma", _GEMMA,
             **{"2b": (18, 2048, 8, 1, 16384, dict(embed_scale=2048**0.5)),
                "7b": (28, 3072, 16, 16, 24576, dict(embed_scale=3072**0.5))}),
    **_sizes("gemma2", _GEMMA2,
             **{"2b": (26, 2304, 8, 4, 9216, dict(embed_scale=2304**0.5)),
                "9b": (42, 3584, 16, 8, 14336, dict(embed_scale=3584**0.5)),
                "27b": (46, 4608, 32, 16, 36864, dict(
                    embed_scale=4608**0.5, head_dim=128, attn_scale=144**-0.5))}),
    **_sizes("gemma3", _GEMMA3,
             **{"270m": (18, 640, 4, 1, 2048, dict(embed_scale=640**0.5)),
                "1b": (26, 1152, 4, 1, 6912, dict(embed_scale=1152**0.5))}),
    **_sizes("phi3", _PHI3,
             mini=(32, 3072, 32, 32, 8192, {}), medium=(40, 5120, 40, 10, 17920, {})),
    **_sizes("olmo2", _OLMO2,
             **{"1b": (16, 2048, 16, 16, 8192, {}), "7b": (32, 4096, 32, 32, 11008, {}),
                "13b": (40, 5120, 40, 40, 13824, {}), "32b": (64, 5120, 40, 8, 27648, {})}),
    **_sizes("starcoder2", _STARCODER2,
             **{"3b": (30, 3072, 24, 2, 12288, dict(rope=dict(theta=999_999.4420358813))),
                "7b": (32, 4608, 36, 4, 18432, dict(rope=dict(theta=1e6)))}),
    **_sizes("smollm2", _SMOLLM2,
             **{"135m": (30, 576, 9, 3, 1536, {}), "360m": (32, 960, 15, 5, 2560, {}),
                "1_7b": (24, 2048, 32, 32, 8192, dict(rope=dict(theta=130_000.0)))}),
    **_sizes("deepseek", {},
             v2_lite=(27, 2048, 16, 16, 10944, _DEEPSEEK_V2_LITE),
             v3=(61, 7168, 128, 128, 18432, _DEEPSEEK_V3)),
    **_sizes("bert", _BERT,
             base=(12, 768, 12, 12, 3072, {}), large=(24, 1024, 16, 16, 4096, {})),
    **_sizes("roberta", _ROBERTA,
             base=(12, 768, 12, 12, 3072, {}), large=(24, 1024, 16, 16, 4096, {})),
    **_sizes("modernbert", _MODERNBERT,
             base=(22, 768, 12, 12, 1152, {}), large=(28, 1024, 16, 16, 2624, {})),
}
# fmt: on
