"""Model families as Hugging Face publishes them: two tables each, of config keys and of tensors.

To add a family, add an entry to `FAMILIES`. Nothing else changes if `model` already has the fields
that the family needs. Semantics are those of transformers' `models/FAMILY/modeling_FAMILY.py`,
version 5.

How to read this file. A `Family` has two tables, whose vocabulary is small:

    config    entries of `config_map`: which key of config.json is which field of `model`.
              same("rms_norm_eps", "norm_eps", 1e-6)    hf["rms_norm_eps"] is model.norm_eps
              ours(norm="rmsnorm")                      true of every member, not in config.json
              must("attention_bias", False)             any other value is refused
              classes(LlamaForCausalLM=_LM)             the class in `architectures` gives the head
              rope(), layer_types(...), moe(...)        several keys that belong together
    tensors   templates of `tensor_map`: which tensor is which parameter, in which axis order.
              norm("model.norm", "final_norm")          model.norm.weight is final_norm/scale
              heads(_L + "self_attn.q_proj", "q")       _L = "model.layers.{i}.", for every layer i
              one("lm_head.weight", "head", "V D -> D V", ("lm",))
                                                        transposed; only if model.head is "lm"

Names that begin with "_" and a capital (`_SIZES`, `_QKV`) are groups that several families share.
`_llama_like`, `_gemma`, `_deepseek`, `_bert_config` build families that differ in few entries.
Tables are aligned by hand, therefore `fmt: off`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgpt.config.architecture import each_layer
from jaxgpt.hf import labels
from jaxgpt.hf.config_map import (
  Entry,
  Fields,
  HfConfig,
  WindowKey,
  activation,
  biases,
  classes,
  derived,
  get,
  head_dim,
  layer_types,
  mapped,
  moe,
  must,
  old_gemma_activation,
  ours,
  per_layer,
  refuse,
  repeated,
  same,
  sames,
  shortest,
  unless,
)
from jaxgpt.hf.rotary import DEFAULT_ONLY, PHI3_KINDS, latent_rope, rope
from jaxgpt.hf.tensor_map import (
  PieceTemplate,
  Templates,
  TensorTemplate,
  conv1d,
  dense,
  flat,
  fused,
  heads,
  norm,
  one,
  output,
  qkv,
  vector,
)


class Family(NamedTuple):
  """A model family: its `model_type`, config table and tensor table."""

  model_type: str
  config: tuple[Entry, ...]
  tensors: Templates
  prefix: str = "model."  # of tensor names; files of a model without a head omit it
  answers_prefix: str = ""  # in place of it in *ForQuestionAnswering, if that has another
  ignored: tuple[str, ...] = ()  # patterns of tensors that are not read


# fmt: off
# --- Decoders: most keep Llama's names.

_L = "model.layers.{i}."
_LM: dict[str, Any] = dict(head="lm", head_bias=False, head_transform="none")
_BARE: dict[str, Any] = dict(head="none")
# *ForSequenceClassification of decoders: a linear layer on the last token that is not padding.
_SCORE: dict[str, Any] = dict(head="classifier", head_bias=False, head_transform="none",
                              pooling="last")
# *ForQuestionAnswering and *ForTokenClassification: the same output for each token.
_ANSWERS: dict[str, Any] = dict(head="token_classifier", head_bias=True, head_transform="none",
                                **labels.ANSWERS)
_TAGS: dict[str, Any] = dict(head="token_classifier", head_bias=True, head_transform="none")
_SIZES = sames(vocab_size="vocab_size", hidden_size="width", intermediate_size="mlp_width",
               num_hidden_layers="num_layers", num_attention_heads="num_heads",
               max_position_embeddings="max_len")


def _kv_heads(missing: int | None) -> Entry:
  """Heads of keys and values: null for one per query head, `missing` where there is no key."""
  def read(hf: HfConfig) -> Fields:
    given = hf.get("num_key_value_heads", missing)
    return {"num_kv_heads": get(hf, "num_attention_heads") if given is None else given}
  return Entry(read, lambda model: {"num_key_value_heads": model["num_kv_heads"]})


_HEAD_DIM = same("head_dim", "head_dim", head_dim)
_OWN_HEAD_DIM = unless("head_dim", "head_dim", head_dim)
_EMBED = one("model.embed_tokens.weight", "embed", "V D -> V D")
_HEAD = (one("lm_head.weight", "head", "V D -> D V", ("lm",)),
         one("score.weight", "head", "V D -> D V", ("classifier", "tags")),
         vector("score.bias", "head_bias", ("tags",)),
         *dense("qa_outputs", "head", ("answers",)))
_QKV = tuple(heads(f"{_L}self_attn.{x}_proj", x) for x in "qkv")
_O = output(_L + "self_attn.o_proj")
_QK_NORM = (vector(_L + "self_attn.q_norm.weight", "layers/attn/q_norm/scale"),
            vector(_L + "self_attn.k_norm.weight", "layers/attn/k_norm/scale"))
_MLP = tuple(dense(f"{_L}mlp.{x}_proj", f"layers/mlp/{x}", ("dense",))
             for x in ("gate", "up", "down"))
_NORMS = (norm(_L + "input_layernorm", "layers/attn_norm"),
          norm(_L + "post_attention_layernorm", "layers/mlp_norm"))
_FINAL = norm("model.norm", "final_norm")
_TRANSFORMER: dict[str, Any] = dict(per_token="answers tags", answers_prefix="transformer.")
_FREQUENCIES = r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)"


def _decoder(cls: str, per_token: str = "tags", bare: str = "") -> Entry:
  """The classes of a decoder.

  Args:
    cls: How their names begin.
    per_token: 'tags' if there is a *ForTokenClassification, 'answers' if there is a
      *ForQuestionAnswering, or both words.
    bare: Name of the bare model, if it is not `cls` and Model.
  """
  known = {"answers": {f"{cls}ForQuestionAnswering": _ANSWERS},
           "tags": {f"{cls}ForTokenClassification": _TAGS}}
  more = {name: f for head in per_token.split() for name, f in known[head].items()}
  return classes(**{f"{cls}ForCausalLM": _LM, bare or f"{cls}Model": _BARE,
                    f"{(bare or cls).removesuffix('Model')}ForSequenceClassification": _SCORE},
                 **more)


def _llama_like(kind: str, cls: str, *config: Entry, eps: float = 1e-6, act: str = "silu",
                tied: bool = False, kv_heads: int | None = None, per_token: str = "tags",
                answers_prefix: str = "", **fields: Any) -> Family:
  """A decoder with Llama's tensors, entries of its own (`config`) and constants (`fields`)."""
  fixed = dict(norm="rmsnorm", position="rotary", gated=True, causal=True) | fields
  return Family(
      kind, (_decoder(cls, per_token), ours(**fixed), _SIZES,
             _kv_heads(kv_heads), same("rms_norm_eps", "norm_eps", eps),
             activation("hidden_act", act), same("tie_word_embeddings", "tie_embeddings", tied),
             *config),
      flat(_EMBED, _NORMS, _QKV, _QK_NORM, _O, _MLP, _FINAL, _HEAD), ignored=(_FREQUENCIES,),
      answers_prefix=answers_prefix)


def _gpt2() -> Family:
  h = "transformer.h.{i}."
  return Family(
      "gpt2", (
          classes(GPT2LMHeadModel=_LM, GPT2Model=_BARE, GPT2ForSequenceClassification=_SCORE,
                  GPT2ForQuestionAnswering=_ANSWERS, GPT2ForTokenClassification=_TAGS),
          ours(norm="layernorm", position="learned", gated=False, bias=True, causal=True),
          sames(vocab_size="vocab_size", n_positions="max_len", n_embd="width",
                n_layer="num_layers", n_head="num_heads"),
          same("n_inner", "mlp_width", lambda hf: 4 * hf["n_embd"]),
          same("layer_norm_epsilon", "norm_eps", 1e-5),
          activation("activation_function", "gelu_new"),
          same("tie_word_embeddings", "tie_embeddings", True), must("scale_attn_weights", True),
          must("scale_attn_by_inverse_layer_idx", False), must("add_cross_attention", False)),
      flat(one("transformer.wte.weight", "embed", "V D -> V D"),
           one("transformer.wpe.weight", "pos_embed", "P D -> P D"),
           norm(h + "ln_1", "layers/attn_norm"),
           qkv(h + "attn.c_attn", "D (N H) -> D N H", axis=1),
           output(h + "attn.c_proj", "(N H) D -> N H D"),
           norm(h + "ln_2", "layers/mlp_norm"),
           conv1d(h + "mlp.c_fc", "layers/mlp/up"), conv1d(h + "mlp.c_proj", "layers/mlp/down"),
           norm("transformer.ln_f", "final_norm"), _HEAD[0],
           one("score.weight", "head", "V D -> D V", ("classifier",)),
           dense("classifier", "head", ("tags",)), dense("qa_outputs", "head", ("answers",))),
      prefix="transformer.", ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",))


def _one_window(default: int | None = None) -> Entry:
  """One window for all layers, or none. `layer_types` is neither read nor written.

  Args:
    default: The window of a config.json without the key. null means that there is none.
  """
  def read(hf: HfConfig) -> Fields:
    window = hf.get("sliding_window", default)
    if window is None:
      return {"attention_pattern": ("global",)}
    return {"attention_pattern": ("local",), "window": window}

  def write(model: Fields) -> HfConfig:
    local = "local" in model["attention_pattern"]
    return {"sliding_window": model["window"] if local else None}
  return Entry(read, write)


def _qwen_window() -> Entry:
  """A window for the layers from `max_window_layers` on, if `use_sliding_window`."""
  def default(hf: HfConfig) -> list[str]:
    local = hf.get("use_sliding_window") and hf.get("sliding_window", 4096) is not None
    first = get(hf, "max_window_layers", 28)
    return ["local" if local and i >= first else "global"
            for i in range(get(hf, "num_hidden_layers"))]

  def also(model: Fields) -> HfConfig:
    return {"use_sliding_window": "local" in model["attention_pattern"],
            "max_window_layers": model["num_layers"]}

  types = layer_types(default, WindowKey(4096), also=also)

  def read(hf: HfConfig) -> Fields:
    found, used = types.read(hf), hf.get("use_sliding_window")
    if "local" in found["attention_pattern"] and not used:
      refuse("layer_types", "sliding_attention", "use_sliding_window is false")
    return found
  return Entry(read, types.write)


def _smollm3_positions() -> Entry:
  """Layers without rotary positions: `no_rope_layers` has a 0 for each of them."""
  def read(hf: HfConfig) -> Fields:
    every = get(hf, "no_rope_layer_interval", 4)
    given = per_layer(hf, "no_rope_layers") or [
        int((i + 1) % every != 0) for i in range(get(hf, "num_hidden_layers"))]
    if "sliding_attention" in (per_layer(hf, "layer_types") or ()):
      refuse("layer_types", "sliding_attention", "use_sliding_window is false")
    return {"attention_pattern": shortest(["global" if x else "nope" for x in given])}

  def write(model: Fields) -> HfConfig:
    kinds = each_layer(model["attention_pattern"], model["num_layers"])
    return {"no_rope_layers": [int(kind != "nope") for kind in kinds]}
  return Entry(read, write)


def _phi3() -> Family:
  family = _llama_like(
      "phi3", "Phi3", _OWN_HEAD_DIM, rope(kinds=PHI3_KINDS, own_len=True, partial=True),
      _one_window(), eps=1e-5, bias=False)
  return family._replace(tensors=flat(
      _EMBED, _NORMS, qkv(_L + "self_attn.qkv_proj"), _O,
      fused(_L + "mlp.gate_up_proj.weight", "F D -> D F", "layers/mlp/gate", "layers/mlp/up"),
      dense(_L + "mlp.down_proj", "layers/mlp/down"), _FINAL, _HEAD))


def _olmo2() -> Family:
  family = _llama_like("olmo2", "Olmo2", _OWN_HEAD_DIM, rope(), must("attention_bias", False),
                       eps=1e-5, bias=False, norm_placement="branch", qk_norm="all", per_token="")
  return family._replace(tensors=flat(
      _EMBED, _QKV, _QK_NORM, _O, norm(_L + "post_attention_layernorm", "layers/attn_post_norm"),
      _MLP, norm(_L + "post_feedforward_layernorm", "layers/mlp_post_norm"), _FINAL, _HEAD))


def _starcoder2() -> Family:
  return Family(
      "starcoder2", (
          _decoder("Starcoder2"),
          ours(norm="layernorm", position="rotary", gated=False, bias=True, causal=True), _SIZES,
          _kv_heads(2), _OWN_HEAD_DIM, same("norm_epsilon", "norm_eps", 1e-5),
          activation("hidden_act", "gelu_pytorch_tanh"), must("use_bias", True), rope(),
          same("tie_word_embeddings", "tie_embeddings", True), _one_window()),
      flat(_EMBED, _NORMS, _QKV, _O, dense(_L + "mlp.c_fc", "layers/mlp/up"),
           dense(_L + "mlp.c_proj", "layers/mlp/down"), _FINAL, _HEAD), ignored=(_FREQUENCIES,))


# --- Gemma: norms store scale - 1 (plus=1.0), embeddings are multiplied by sqrt(width).

def _gemma(kind: str, cls: str, norms: Sequence, *config: Entry, per_token: str = "tags",
           bare: str = "", **fields: Any) -> Family:
  fixed = dict(norm="rmsnorm", position="rotary", gated=True, bias=False, causal=True) | fields
  return Family(
      kind, (_decoder(cls, per_token, bare), ours(**fixed), _SIZES,
             same("num_key_value_heads", "num_kv_heads"),
             same("head_dim", "head_dim", 256), same("rms_norm_eps", "norm_eps", 1e-6),
             derived("embed_scale", lambda hf: float(get(hf, "hidden_size")) ** 0.5),
             same("tie_word_embeddings", "tie_embeddings", True), must("attention_bias", False),
             must("use_bidirectional_attention", False), *config),
      flat(_EMBED, norms, _QKV, _O, _MLP, norm("model.norm", "final_norm", plus=1.0), _HEAD),
      ignored=(_FREQUENCIES,))


_GEMMA_NORMS = (norm(_L + "input_layernorm", "layers/attn_norm", plus=1.0),
                norm(_L + "post_attention_layernorm", "layers/mlp_norm", plus=1.0))
_GEMMA2_NORMS = (norm(_L + "input_layernorm", "layers/attn_norm", plus=1.0),
                 norm(_L + "post_attention_layernorm", "layers/attn_post_norm", plus=1.0),
                 norm(_L + "pre_feedforward_layernorm", "layers/mlp_norm", plus=1.0),
                 norm(_L + "post_feedforward_layernorm", "layers/mlp_post_norm", plus=1.0))
_GEMMA3_QK_NORM = tuple(vector(f"{_L}self_attn.{x}_norm.weight", f"layers/attn/{x}_norm/scale",
                               plus=1.0) for x in "qk")
_ATTN_SCALE = Entry(lambda hf: {"attn_scale": float(get(hf, "query_pre_attn_scalar", 256)) ** -0.5},
                    lambda model: {"query_pre_attn_scalar": _whole(model["attn_scale"] ** -2)})


def _whole(x: float) -> float:
  """Rounds 224.00000000000003 to 224: published configs have integers here."""
  return round(x) if abs(x - round(x)) < 1e-6 * x else x


def _optional(theirs: str, ours: str, default: float | None) -> Entry:
  """A number that may be null. `default` is for a missing key."""
  return Entry(lambda hf: {ours: hf.get(theirs, default)}, lambda model: {theirs: model[ours]})


def _final_cap(default: float | None) -> Entry:
  """The cap on the logits over the vocabulary. Scores of classes have none."""
  cap = _optional("final_logit_softcapping", "logit_softcap", default)
  scores = lambda hf: str((hf.get("architectures") or [""])[0]).endswith("Classification")
  return cap._replace(read=lambda hf: {"logit_softcap": None} if scores(hf) else cap.read(hf))


def _every(hf: HfConfig, n: int) -> list[str]:
  """Gemma's pattern: every n-th layer is global."""
  return ["global" if (i + 1) % n == 0 else "local" for i in range(get(hf, "num_hidden_layers"))]


def _gemmas() -> tuple[Family, ...]:
  # Their masks need a window even if no layer has one.
  window = WindowKey(4096, nullable=False)

  def three(hf: HfConfig) -> list[str]:
    each, other = get(hf, "sliding_window_pattern", 6), hf.get("_sliding_window_pattern")
    if other not in (None, each):
      refuse("_sliding_window_pattern", other, f"transformers reads sliding_window_pattern={each}")
    return _every(hf, each)

  return (
      _gemma("gemma", "Gemma", _GEMMA_NORMS,
             old_gemma_activation(), rope()),
      _gemma("gemma2", "Gemma2", _GEMMA2_NORMS,
             activation("hidden_activation", "gelu_pytorch_tanh"), rope(),
             _ATTN_SCALE, _final_cap(30.0),
             _optional("attn_logit_softcapping", "attn_softcap", 50.0),
             layer_types(lambda hf: _every(hf, 2), window),
             norm_placement="both"),
      _gemma("gemma3_text", "Gemma3", (_GEMMA2_NORMS, _GEMMA3_QK_NORM),
             activation("hidden_activation", "gelu_pytorch_tanh"),
             rope(1e6, local=("rope_local_base_freq", 10_000.0)), _ATTN_SCALE, _final_cap(None),
             must("attn_logit_softcapping", None),  # transformers does not apply it
             layer_types(three, window), per_token="", bare="Gemma3TextModel",
             norm_placement="both", qk_norm="head"))


# --- Mixtures of experts.

def _experts(name: str, gate: str = "gate_proj", up: str = "up_proj",
             down: str = "down_proj") -> Templates:
  """The router, and the three matrices of each expert ({e})."""
  return (one(f"{name}.gate.weight", "layers/mlp/router", "E D -> D E", ("moe",)),
          *(one(f"{name}.experts.{{e}}.{theirs}.weight", f"layers/mlp/{x}", "O I -> I O", ("moe",))
            for theirs, x in ((gate, "gate"), (up, "up"), (down, "down"))))


def _mixtral() -> Family:
  family = _llama_like(
      "mixtral", "Mixtral", _HEAD_DIM, rope(1e6), _one_window(),
      moe("num_local_experts", "num_experts_per_tok", "intermediate_size"),
      eps=1e-5, kv_heads=8, bias=False, mlp_pattern=("moe",), moe__router="softmax",
      moe__normalize=True, per_token="answers tags")
  return family._replace(tensors=flat(
      _EMBED, _NORMS, _QKV, _O, _experts(_L + "block_sparse_moe", "w1", "w3", "w2"), _FINAL, _HEAD))


def _sparse_layers() -> Entry:
  """The layers with experts: every `decoder_sparse_step`-th, except `mlp_only_layers`."""
  def read(hf: HfConfig) -> Fields:
    step, only = get(hf, "decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    kinds = ["moe" if (i + 1) % step == 0 and i not in only else "dense"
             for i in range(get(hf, "num_hidden_layers"))]
    return {"mlp_pattern": shortest(kinds)}

  def write(model: Fields) -> HfConfig:
    kinds = each_layer(model["mlp_pattern"], model["num_layers"])
    return {"decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == "dense"]}
  return Entry(read, write)


def _qwen3_moe() -> Family:
  experts = Entry(  # 'num_experts' on the Hub; transformers 5 writes 'num_local_experts'
      lambda hf: {"moe.experts": get(hf, "num_experts", lambda hf: get(hf, "num_local_experts"))},
      lambda model: {"num_experts": model["moe.experts"]})
  family = _llama_like(
      "qwen3_moe", "Qwen3Moe", _HEAD_DIM, rope(), must("attention_bias", False),
      must("use_sliding_window", False), experts, _sparse_layers(),
      sames(num_experts_per_tok="moe.per_token", moe_intermediate_size="moe.width"),
      same("norm_topk_prob", "moe.normalize", False),
      kv_heads=4, bias=False, qk_norm="head", moe__router="softmax",
      **_TRANSFORMER)
  return family._replace(tensors=flat(
      _EMBED, _NORMS, _QKV, _QK_NORM, _O, _MLP, _experts(_L + "mlp"), _FINAL, _HEAD))


# --- DeepSeek: latent attention, shared experts.

def _rotated_dim() -> Entry:
  """`head_dim`, which transformers writes and reads as the size of the rotated part."""
  def read(hf: HfConfig) -> Fields:
    given, rotated = hf.get("head_dim"), get(hf, "qk_rope_head_dim")
    if given not in (None, rotated):
      refuse("head_dim", given, f"qk_rope_head_dim={rotated} differs")
    return {}
  return Entry(read, lambda model: {})


def _deepseek(kind: str, cls: str, *config: Entry, **fields: Any) -> Family:
  a = _L + "self_attn."
  latent = sames(kv_lora_rank="latent.kv_rank", qk_rope_head_dim="latent.rope_dim",
                 v_head_dim="latent.v_dim")
  ranks = Entry(lambda hf: {"latent.q_rank": hf.get("q_lora_rank", 1536) or 0},
                lambda model: {"q_lora_rank": model["latent.q_rank"] or None})
  head = Entry(lambda hf: {"head_dim": get(hf, "qk_nope_head_dim") + get(hf, "qk_rope_head_dim")},
               lambda model: {"qk_nope_head_dim": model["head_dim"] - model["latent.rope_dim"]})
  family = _llama_like(
      kind, cls, latent, ranks, head, repeated("qk_head_dim"), _rotated_dim(), latent_rope(),
      must("attention_bias", False), must("moe_layer_freq", 1),
      moe("n_routed_experts", "num_experts_per_tok", n_shared_experts="shared",
          first_k_dense_replace="first_dense", routed_scaling_factor="scale"),
      *config, bias=False, mlp_pattern=("moe",), latent__norm_eps=1e-6, **fields)
  halves = tuple(PieceTemplate(f"layers/attn/{x}", "N H C -> C N H") for x in "kv")
  rotated = lambda name: one(name, "layers/attn/q", "(N H) C -> C N H", interleaved=True)
  # q_proj exists without a rank of queries, q_a_proj and q_b_proj with one. kv_b_proj holds the
  # keys, then the values of each head, so its pieces lie along axis 1 of a view [N, H, C].
  tensors = flat(
      _EMBED, _NORMS,
      one(a + "q_a_proj.weight", "layers/attn/q_down", "C D -> D C"),
      vector(a + "q_a_layernorm.weight", "layers/attn/q_down_norm/scale"),
      rotated(a + "q_b_proj.weight")._replace(when=("q_rank",)),
      rotated(a + "q_proj.weight")._replace(when=("no q_rank",)),
      one(a + "kv_a_proj_with_mqa.weight", "layers/attn/kv_down", "C D -> D C",
          interleaved=True),
      vector(a + "kv_a_layernorm.weight", "layers/attn/kv_down_norm/scale"),
      TensorTemplate(a + "kv_b_proj.weight", halves, axis=1, merged=True),
      _O, _MLP, _experts(_L + "mlp"),
      vector(_L + "mlp.gate.e_score_correction_bias", "layers/mlp/router_bias", ("moe",)),
      *(dense(f"{_L}mlp.shared_experts.{x}_proj", f"layers/mlp/shared/{x}", ("moe",))
        for x in ("gate", "up", "down")), _FINAL, _HEAD)
  # The layers after the last are heads for multi-token prediction (layer 61 of V3).
  return family._replace(tensors=tensors, ignored=(_FREQUENCIES, r"model\.layers\.{last}\..*"))


def _groups(method_key: str | None = None, groups: int | None = None,
            top: int | None = None) -> Entry:
  """Groups of experts, with the defaults of missing keys. null means one group."""
  def read(hf: HfConfig) -> Fields:
    method = hf.get(method_key, "greedy") if method_key else None
    if method not in (None, "greedy", "group_limited_greedy"):
      refuse(str(method_key), method, "known are greedy, group_limited_greedy")
    number, chosen = hf.get("n_group", groups) or 1, hf.get("topk_group", top)
    number = 1 if method == "greedy" else number
    if number > 1 and not chosen:
      refuse("topk_group", chosen, f"n_group={number} needs it")
    return {"moe.groups": number, "moe.top_groups": 1 if number == 1 else chosen}

  def write(model: Fields) -> HfConfig:
    out = {"n_group": model["moe.groups"], "topk_group": model["moe.top_groups"]}
    if method_key:
      out[method_key] = "greedy" if model["moe.groups"] == 1 else "group_limited_greedy"
    return out
  return Entry(read, write)


# --- Encoders.

_BERT_LM = dict(head="lm", head_bias=True, head_transform="norm")
_BERT_CLASSIFIER = dict(head="classifier", head_bias=True, head_transform="tanh", pooling="first")
_BERT_POOLER = dict(head="pooler", head_bias=False, head_transform="tanh", pooling="first")
_POOLED = ("classifier", "pooler")


def _bert_config(*more: Entry) -> tuple[Entry, ...]:
  """The entries that BERT and RoBERTa share, and `more`."""
  return (ours(norm="layernorm", norm_placement="post", embed_norm=True, position="learned",
               gated=False, bias=True, causal=False),
          sames(vocab_size="vocab_size", hidden_size="width", intermediate_size="mlp_width",
                num_hidden_layers="num_layers", num_attention_heads="num_heads",
                type_vocab_size="token_types"),
          same("layer_norm_eps", "norm_eps", 1e-12),
          same("tie_word_embeddings", "tie_embeddings", True), must("is_decoder", False),
          must("add_cross_attention", False), must("position_embedding_type", "absolute"), *more)


def _bert_tensors(name: str, skip: int = 0) -> Templates:
  """Embeddings and layers of BERT. `name` begins all names, `skip` positions are unused."""
  layer = name + ".encoder.layer.{i}."
  embeddings = name + ".embeddings."
  return flat(
      one(embeddings + "word_embeddings.weight", "embed", "V D -> V D"),
      one(embeddings + "position_embeddings.weight", "pos_embed", "P D -> P D")._replace(skip=skip),
      one(embeddings + "token_type_embeddings.weight", "type_embed", "T D -> T D"),
      norm(embeddings + "LayerNorm", "embed_norm"),
      *(heads(f"{layer}attention.self.{theirs}", x)
        for theirs, x in (("query", "q"), ("key", "k"), ("value", "v"))),
      output(layer + "attention.output.dense"),
      norm(layer + "attention.output.LayerNorm", "layers/attn_norm"),
      dense(layer + "intermediate.dense", "layers/mlp/up"),
      dense(layer + "output.dense", "layers/mlp/down"),
      norm(layer + "output.LayerNorm", "layers/mlp_norm"))


def _bert() -> Family:
  return Family(
      "bert", _bert_config(
          classes(BertForMaskedLM=_BERT_LM, BertForPreTraining=_BERT_LM,
                  BertForSequenceClassification=_BERT_CLASSIFIER, BertModel=_BERT_POOLER,
                  BertForQuestionAnswering=_ANSWERS, BertForTokenClassification=_TAGS),
          same("max_position_embeddings", "max_len"), activation("hidden_act", "gelu")),
      flat(_bert_tensors("bert"),
           dense("cls.predictions.transform.dense", "head_dense", ("lm",)),
           norm("cls.predictions.transform.LayerNorm", "head_norm", ("lm",)),
           one("cls.predictions.decoder.weight", "head", "V D -> D V", ("lm",)),
           _head_bias("cls.predictions.bias", "cls.predictions.decoder.bias"),
           dense("bert.pooler.dense", "head_dense", _POOLED),
           dense("classifier", "head", ("classifier", "tags")),
           dense("qa_outputs", "head", ("answers",))),
      prefix="bert.",
      ignored=(r"(bert\.)?embeddings\.position_ids", r"(bert\.)?pooler\..*",
               r"cls\.seq_relationship\..*"))


def _head_bias(own: str, of_decoder: str) -> Templates:
  """The bias of a masked LM's logits, which has two names.

  transformers adds `of_decoder`. If embeddings are tied and only `own` is in the files, it is
  copied from there.
  """
  return (vector(own, "head_bias", ("tied lm",))._replace(instead=of_decoder),
          vector(of_decoder, "head_bias", ("untied lm",))._replace(copies=own))


def _roberta(kind: str, cls: str) -> Family:
  # Positions count from pad_token_id + 1 = 2, so the first two rows of the table are unused.
  length = Entry(lambda hf: {"max_len": get(hf, "max_position_embeddings") - 2},
                 lambda model: {"max_position_embeddings": model["max_len"] + 2})
  return Family(
      kind, _bert_config(
          classes(**{f"{cls}ForMaskedLM": _BERT_LM,
                     f"{cls}ForSequenceClassification": _BERT_CLASSIFIER,
                     f"{cls}Model": _BERT_POOLER,
                     f"{cls}ForQuestionAnswering": _ANSWERS,
                     f"{cls}ForTokenClassification": _TAGS}),
          length, must("pad_token_id", 1),
          mapped("hidden_act", "activation", {"gelu": "gelu_exact"}, "gelu")),
      flat(_bert_tensors("roberta", skip=2),
           dense("lm_head.dense", "head_dense", ("lm",)),
           norm("lm_head.layer_norm", "head_norm", ("lm",)),
           one("lm_head.decoder.weight", "head", "V D -> D V", ("lm",)),
           _head_bias("lm_head.bias", "lm_head.decoder.bias"),
           dense("roberta.pooler.dense", "head_dense", ("pooler",)),
           dense("classifier.dense", "head_dense", ("classifier",)),
           dense("classifier.out_proj", "head", ("classifier",)),
           dense("classifier", "head", ("tags",)), dense("qa_outputs", "head", ("answers",))),
      prefix="roberta.",
      ignored=(r"(roberta\.)?embeddings\.position_ids", r"(roberta\.)?pooler\..*"))


def _modernbert_activation() -> Entry:
  """The activation of the MLP, which is also that of the head if there is one."""
  mlp, head = activation("hidden_activation", "gelu"), activation("classifier_activation", "gelu")

  def read(hf: HfConfig) -> Fields:
    found, of_head = mlp.read(hf), head.read(hf)
    bare = "ModernBertModel" in (hf.get("architectures") or ())
    if of_head != found and not bare:
      refuse("classifier_activation", get(hf, "classifier_activation", "gelu"),
             f"hidden_activation={get(hf, 'hidden_activation', 'gelu')!r} differs")
    return found
  return Entry(read, lambda model: mlp.write(model) | head.write(model))


def _modernbert() -> Family:
  each = lambda hf: get(hf, "global_attn_every_n_layers", 3)
  kinds = lambda hf: ["local" if i % each(hf) else "global"
                      for i in range(get(hf, "num_hidden_layers"))]
  # Their window is the whole span, n // 2 tokens on each side; ours counts the token itself.
  window = WindowKey(128, "local_attention", lambda n: n // 2 + 1, lambda n: 2 * (n - 1),
                     nullable=False)
  head = dict(head_bias=True, head_transform="norm")
  with_logits = ("lm", "classifier", "answers", "tags")
  m = "model.layers.{i}."
  return Family(
      "modernbert", (
          classes(ModernBertForMaskedLM=head | {"head": "lm"},
                  ModernBertForSequenceClassification=head | {"head": "classifier"},
                  ModernBertModel=_BARE,
                  ModernBertForQuestionAnswering=_ANSWERS | head,
                  ModernBertForTokenClassification=_TAGS | head),
          ours(norm="layernorm", position="rotary", gated=True, bias=False, causal=False,
               embed_norm=True, first_norm=False),
          _SIZES, same("norm_eps", "norm_eps", 1e-5), _modernbert_activation(),
          same("tie_word_embeddings", "tie_embeddings", True), must("norm_bias", False),
          must("attention_bias", False), must("mlp_bias", False), must("classifier_bias", False),
          must("decoder_bias", True),
          mapped("classifier_pooling", "pooling", {"cls": "first", "mean": "mean"}, "cls"),
          rope(160_000.0, "global_rope_theta", local=("local_rope_theta", 10_000.0),
               kinds=DEFAULT_ONLY, scale_local=True),
          layer_types(kinds, window)),
      flat(one("model.embeddings.tok_embeddings.weight", "embed", "V D -> V D"),
           norm("model.embeddings.norm", "embed_norm"),
           norm(m + "attn_norm", "layers/attn_norm", ("normed",)), qkv(m + "attn.Wqkv"),
           output(m + "attn.Wo"), norm(m + "mlp_norm", "layers/mlp_norm"),
           fused(m + "mlp.Wi.weight", "F D -> D F", "layers/mlp/gate", "layers/mlp/up"),
           dense(m + "mlp.Wo", "layers/mlp/down"), norm("model.final_norm", "final_norm"),
           dense("head.dense", "head_dense", with_logits),
           norm("head.norm", "head_norm", with_logits),
           one("decoder.weight", "head", "V D -> D V", ("lm",)),
           vector("decoder.bias", "head_bias", ("lm",)),
           dense("classifier", "head", with_logits[1:])))


# Tensors that are computed from config.json, and are in files for no reason.
BUFFERS = r".*(position_ids|inv_freq|cos_cached|sin_cached|attn\.(masked_)?bias)"

# Other architectures whose names look like misspelt families: no "did you mean" for them.
OTHERS = (
    "albert", "bart", "colmodernvbert", "deepseek_ocr2", "eurobert", "gemma3n_text", "hubert",
    "ibert", "llava", "mbart", "ministral", "mllama", "modernvbert", "molmo2", "pixtral",
    "qwen3_vl_moe", "roc_bert", "xlm-roberta-xl")

# `export` without --family takes the first family in this order that has the model's fields.
FAMILIES = {f.model_type: f for f in (
    _gpt2(),
    _llama_like("llama", "Llama", _HEAD_DIM, rope(), biases(), **_TRANSFORMER),
    _llama_like("mistral", "Mistral", _HEAD_DIM, rope(), _one_window(4096), kv_heads=8,
                per_token="answers tags", bias=False),
    _llama_like("qwen2", "Qwen2", _OWN_HEAD_DIM, rope(), _qwen_window(), kv_heads=32,
                bias=False, qkv_bias=True, **_TRANSFORMER),
    _llama_like("qwen3", "Qwen3", same("head_dim", "head_dim", 128), rope(), _qwen_window(),
                must("attention_bias", False), kv_heads=32, bias=False, qk_norm="head",
                **_TRANSFORMER),
    _llama_like("smollm3", "SmolLM3", _OWN_HEAD_DIM, rope(2e6), _smollm3_positions(),
                must("use_sliding_window", False), biases(), kv_heads=4, tied=True,
                **_TRANSFORMER),
    _starcoder2(), *_gemmas(), _phi3(), _olmo2(), _mixtral(), _qwen3_moe(),
    _deepseek("deepseek_v2", "DeepseekV2", _groups("topk_method"), must("mlp_bias", False),
              must("norm_topk_prob", False), per_token="", moe__router="softmax",
              moe__normalize=False),
    _deepseek("deepseek_v3", "DeepseekV3", _groups(None, 8, 4), must("rope_interleave", True),
              same("norm_topk_prob", "moe.normalize", True), kv_heads=128,
              moe__router="sigmoid"),
    _bert(), _roberta("roberta", "Roberta"), _roberta("xlm-roberta", "XLMRoberta"),
    _roberta("camembert", "Camembert"), _modernbert())}
# fmt: on
