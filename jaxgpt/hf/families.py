"""Families as Hugging Face publishes them: a row of config keys and a row of tensor names each.

A new family is an entry here, and nothing else where the model already has its fields. Semantics
are those of transformers' `models/FAMILY/modeling_FAMILY.py`, version 5.

In layouts: D width, F MLP, N heads, K key/value heads, H head size, V vocabulary, P positions.
"""

from typing import NamedTuple

from jaxgpt.hf import fields
from jaxgpt.hf.fields import must, ours, same


class Part(NamedTuple):
  """One of our parameters as a published tensor, or a part of one, holds it."""
  path: str  # with leading dimensions by the template's {i}
  layout: str
  plus: float = 0.0  # ours = theirs + plus


class Row(NamedTuple):
  """A published tensor. It exists where our model has the parameters of its parts."""
  name: str  # {i}: layer
  parts: tuple  # in the order in which they lie along `axis`
  axis: int = 0


class Family(NamedTuple):
  """What is known of a family."""
  model_type: str
  architecture: str  # what an export is named
  config: tuple  # of fields.Entry
  rows: tuple  # of Row
  prefix: str = "model."  # what files of the bare model lack
  ignored: tuple = ()  # patterns of tensors that hold no weights


def row(name, path, layout, plus=0.0):
  """A tensor that is one parameter."""
  return Row(name, (Part(path, layout, plus),))


def vector(name, path, plus=0.0):
  """A norm's scale, or a bias."""
  return row(name, path, "D -> D", plus)


def linear(name, path, layout, out):
  """A projection's weight, stored [out, in], and its bias, laid out as `out`."""
  return (row(f"{name}.weight", path, layout), row(f"{name}.bias", f"{path}_bias", out))


def norm(name, path):
  """A LayerNorm's two vectors; of an RMSNorm only the first exists."""
  return (vector(f"{name}.weight", f"{path}/scale"), vector(f"{name}.bias", f"{path}/bias"))


_HEADS = {"q": "(N H) D -> D N H", "k": "(K H) D -> D K H", "v": "(K H) D -> D K H"}
_HEAD_BIAS = {"q": "(N H) -> N H", "k": "(K H) -> K H", "v": "(K H) -> K H"}


def _fused(name, layouts, axis):
  return Row(name, tuple(Part(path, layout) for path, layout in layouts), axis)


def _gpt2():
  h = "transformer.h.{i}."
  qkv = [f"layers/attn/{x}" for x in "qkv"]
  flat = lambda theirs, path: (row(f"{h}{theirs}.weight", path, "I O -> I O"),
                               vector(f"{h}{theirs}.bias", f"{path}_bias"))
  return Family(
      "gpt2", "GPT2LMHeadModel", prefix="transformer.",
      config=(
          ours(norm="layernorm", position="learned", gated=False, bias=True),
          same("vocab_size", "vocab_size"), same("n_positions", "max_len"),
          same("n_embd", "width"), same("n_layer", "num_layers"), same("n_head", "num_heads"),
          same("n_inner", "mlp_width", lambda hf: 4 * hf["n_embd"]),
          same("layer_norm_epsilon", "norm_eps", 1e-5),
          fields.activation("activation_function", "gelu_new"),
          same("tie_word_embeddings", "tie_embeddings", True), must("scale_attn_weights", True),
          must("scale_attn_by_inverse_layer_idx", False), must("add_cross_attention", False)),
      rows=(
          row("transformer.wte.weight", "embed", "V D -> V D"),
          row("transformer.wpe.weight", "pos_embed", "P D -> P D"),
          *norm(h + "ln_1", "layers/attn_norm"), *norm(h + "ln_2", "layers/mlp_norm"),
          _fused(h + "attn.c_attn.weight", [(p, "D (N H) -> D N H") for p in qkv], 1),
          _fused(h + "attn.c_attn.bias", [(f"{p}_bias", "(N H) -> N H") for p in qkv], 0),
          row(h + "attn.c_proj.weight", "layers/attn/o", "(N H) D -> N H D"),
          vector(h + "attn.c_proj.bias", "layers/attn/o_bias"),
          *flat("mlp.c_fc", "layers/mlp/up"), *flat("mlp.c_proj", "layers/mlp/down"),
          *norm("transformer.ln_f", "final_norm"),
          row("lm_head.weight", "head", "V D -> D V")),
      ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",))


_LAYER = "model.layers.{i}."
_DECODER_CONFIG = (
    same("vocab_size", "vocab_size"), same("hidden_size", "width"),
    same("intermediate_size", "mlp_width"), same("num_hidden_layers", "num_layers"),
    same("num_attention_heads", "num_heads"),
    same("num_key_value_heads", "num_kv_heads", fields.heads),
    same("head_dim", "head_dim", fields.head_dim), same("max_position_embeddings", "max_len"))


def _decoder_rows():
  """Names that Llama gave, and most decoders have kept."""
  attn = (*(linear(f"{_LAYER}self_attn.{x}_proj", f"layers/attn/{x}", _HEADS[x], _HEAD_BIAS[x])
            for x in "qkv"),
          linear(_LAYER + "self_attn.o_proj", "layers/attn/o", "D (N H) -> N H D", "D -> D"))
  mlp = (linear(f"{_LAYER}mlp.{x}_proj", f"layers/mlp/{x}", "O I -> I O", "O -> O")
         for x in ("gate", "up", "down"))
  return (
      row("model.embed_tokens.weight", "embed", "V D -> V D"),
      *norm(_LAYER + "input_layernorm", "layers/attn_norm"),
      *(r for rows in (*attn, *mlp) for r in rows),
      *norm(_LAYER + "post_attention_layernorm", "layers/mlp_norm"),
      *norm("model.norm", "final_norm"),
      row("lm_head.weight", "head", "V D -> D V"))


def _llama():
  return Family(
      "llama", "LlamaForCausalLM",
      config=(
          ours(norm="rmsnorm", position="rotary", gated=True, bias=False), *_DECODER_CONFIG,
          same("rms_norm_eps", "norm_eps", 1e-6), fields.activation("hidden_act", "silu"),
          same("tie_word_embeddings", "tie_embeddings", False), fields.rope(),
          must("attention_bias", False), must("mlp_bias", False)),
      rows=_decoder_rows(), ignored=(r".*rotary_emb\.inv_freq",))


# In this order a model that no family was named for looks for one that has its fields.
FAMILIES = {f.model_type: f for f in (_gpt2(), _llama())}
