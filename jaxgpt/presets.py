"""Published architectures as values of the config's `model` section: data, no code.

A family is nothing but the fields it sets; sizes of it override widths and depths.
"""

_GPT2 = dict(
    vocab_size=50257, max_len=1024, norm="layernorm", norm_eps=1e-5, position="learned",
    activation="gelu", gated=False, bias=True, tie_embeddings=True, num_layers=12, width=768,
    num_heads=12)  # Radford et al. 2019

_LLAMA = dict(
    norm="rmsnorm", norm_eps=1e-5, position="rotary", activation="silu", gated=True, bias=False,
    tie_embeddings=False)  # Touvron et al. 2023, arXiv:2302.13971

PRESETS = {
    "gpt2_124m": _GPT2,
    "gpt2_355m": dict(_GPT2, num_layers=24, width=1024, num_heads=16),
    "gpt2_774m": dict(_GPT2, num_layers=36, width=1280, num_heads=20),
    "gpt2_1558m": dict(_GPT2, num_layers=48, width=1600, num_heads=25),
    "llama2_7b": dict(
        _LLAMA, vocab_size=32000, max_len=4096, num_layers=32, width=4096, num_heads=32,
        mlp_width=11008),
    "llama3_8b": dict(
        _LLAMA, vocab_size=128256, max_len=8192, num_layers=32, width=4096, num_heads=32,
        num_kv_heads=8, mlp_width=14336, rope=dict(theta=500_000.0)),
    "llama3_70b": dict(
        _LLAMA, vocab_size=128256, max_len=8192, num_layers=80, width=8192, num_heads=64,
        num_kv_heads=8, mlp_width=28672, rope=dict(theta=500_000.0)),
}
