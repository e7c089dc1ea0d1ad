"""The rotary embedding in config.json: its base, its scaling to longer contexts, old and new keys.

transformers 4 wrote `rope_theta` and `rope_scaling`. transformers 5 writes `rope_parameters`, which
may hold one dict per kind of layer. This module reads all of them and writes the old keys, which
both versions and other programs read.

In the functions below, `given` is the dict with the parameters of one kind of layer, wherever
config.json keeps it.
"""

import math
from collections.abc import Callable
from typing import Any

from jaxgpt.hf.config_map import Entry, Fields, HfConfig, get, refuse

# {rope_type: model.rope.scaling}. Of several spellings, the first is written.
_KINDS = {
  "default": "none",
  "linear": "linear",
  "dynamic": "ntk",
  "llama3": "llama3",
  "yarn": "yarn",
  "longrope": "longrope",
  "su": "longrope",
}


def rope(
  theta: float = 10_000.0,
  theta_key: str = "rope_theta",
  local: tuple[str, float] | None = None,
  kinds: tuple[str, ...] = tuple(_KINDS),
  own_len: bool = False,
) -> Entry:
  """The fields of `model.rope`: base, rotated fraction of a head, scaling.

  Args:
    theta: Default of the base.
    theta_key: Old key of the base.
    local: Old key and default of the base in local layers. None: the same base as in global layers.
    kinds: Values of `rope_type` that the family's code in transformers supports.
    own_len: Whether the original context is a key of config.json outside of the scaling (Phi-3).
  """

  def read(hf: HfConfig) -> Fields:
    given, sliding = _given(hf)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in kinds:
      refuse("rope_type", kind, f"known are {', '.join(kinds)}")
    share = given.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    out = {
      "rope.theta": float(given.get("rope_theta") or hf.get(theta_key) or theta),
      "rope.fraction": 1.0 if share is None else float(share),
      "rope.scaling": _KINDS[kind],
      **_READ[_KINDS[kind]](given, hf),
    }
    if local:
      if sliding.get("rope_type", "default") != "default":
        refuse("rope_type", sliding["rope_type"], "layers within a window have no scaling")
      out["rope.local_theta"] = float(sliding.get("rope_theta") or hf.get(local[0]) or local[1])
    return out

  def write(model: Fields) -> HfConfig:
    kind = model["rope.scaling"]
    scaling = None
    if kind != "none":
      name = next(k for k, v in _KINDS.items() if v == kind)
      scaling = {"rope_type": name, "type": name, **_WRITE[kind](model)}
    out = {theta_key: model["rope.theta"], "rope_scaling": scaling}
    if model["rope.fraction"] != 1:
      out["partial_rotary_factor"] = model["rope.fraction"]
    if own_len:
      out["original_max_position_embeddings"] = model["rope.original_len"]
    if local:
      out[local[0]] = model["rope.local_theta"]
    return out

  return Entry(read, write)


def _given(hf: HfConfig) -> tuple[HfConfig, HfConfig]:
  """Returns the parameters of global layers and those of layers with a window."""
  new = hf.get("rope_parameters") or {}
  if "full_attention" in new or "sliding_attention" in new:
    return new.get("full_attention") or {}, new.get("sliding_attention") or {}
  return {**(hf.get("rope_scaling") or {}), **new}, {}


def _length(given: HfConfig, hf: HfConfig) -> int:
  """Returns the context before scaling, in tokens."""
  return (
    hf.get("original_max_position_embeddings")
    or given.get("original_max_position_embeddings")
    or get(hf, "max_position_embeddings")
  )


def _factor(given: HfConfig, hf: HfConfig) -> float:
  """Returns the ratio of the context after scaling to the one before."""
  return float(given.get("factor") or get(hf, "max_position_embeddings") / _length(given, hf))


def _read_yarn(given: HfConfig, hf: HfConfig) -> Fields:
  if not given.get("truncate", True):
    refuse("truncate", given["truncate"], "only True is")
  factor, attention = _factor(given, hf), given.get("attention_factor")
  a, b = given.get("mscale"), given.get("mscale_all_dim")
  if attention is None and a and b:
    attention = mscale(factor, a) / mscale(factor, b)
  return {
    "rope.factor": factor,
    "rope.original_len": _length(given, hf),
    "rope.attention_factor": attention and float(attention),
    "rope.beta_fast": float(given.get("beta_fast") or 32),
    "rope.beta_slow": float(given.get("beta_slow") or 1),
  }


def _read_longrope(given: HfConfig, hf: HfConfig) -> Fields:
  attention = given.get("attention_factor")
  return {
    "rope.factor": _factor(given, hf),
    "rope.original_len": _length(given, hf),
    "rope.attention_factor": attention and float(attention),
    "rope.short_factors": tuple(map(float, get(given, "short_factor"))),
    "rope.long_factors": tuple(map(float, get(given, "long_factor"))),
  }


# {model.rope.scaling: function (given, config.json) -> fields}.
_READ: dict[str, Callable[[HfConfig, HfConfig], Fields]] = {
  "none": lambda given, hf: {},
  "linear": lambda given, hf: {"rope.factor": float(get(given, "factor"))},
  "ntk": lambda given, hf: {"rope.factor": float(get(given, "factor"))},
  "llama3": lambda given, hf: {
    "rope.factor": float(get(given, "factor")),
    "rope.original_len": _length(given, hf),
    "rope.low_freq": float(get(given, "low_freq_factor")),
    "rope.high_freq": float(get(given, "high_freq_factor")),
  },
  "yarn": _read_yarn,
  "longrope": _read_longrope,
}
_PLAIN = {"factor": "rope.factor"}
_LONG = _PLAIN | {"original_max_position_embeddings": "rope.original_len"}
_KEYS = {  # {model.rope.scaling: {key of config.json: field}}
  "linear": _PLAIN,
  "ntk": _PLAIN,
  "llama3": _LONG | {"low_freq_factor": "rope.low_freq", "high_freq_factor": "rope.high_freq"},
  "yarn": _LONG
  | {
    "attention_factor": "rope.attention_factor",
    "beta_fast": "rope.beta_fast",
    "beta_slow": "rope.beta_slow",
  },
  "longrope": {
    "attention_factor": "rope.attention_factor",
    "short_factor": "rope.short_factors",
    "long_factor": "rope.long_factors",
  },
}


def _writer(keys: dict[str, str]) -> Callable[[Fields], HfConfig]:
  def write(model: Fields) -> HfConfig:
    values: dict[str, Any] = {theirs: model[ours] for theirs, ours in keys.items()}
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {k: v for k, v in values.items() if v is not None}

  return write


_WRITE = {kind: _writer(keys) for kind, keys in _KEYS.items()}


def mscale(factor: float, weight: float) -> float:
  """YaRN's attention factor, 0.1 * weight * log(factor) + 1 (arXiv:2309.00071, section 3.4)."""
  return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def latent_rope() -> Entry:
  """As `rope`, for DeepSeek, which puts part of YaRN's attention factor into the logits' scale.

  With `mscale_all_dim`, attn_scale = mscale(factor, mscale_all_dim)^2 / sqrt(head_dim), as
  DeepseekV3Attention of transformers computes it.
  """
  plain = rope()

  def read(hf: HfConfig) -> Fields:
    given, _ = _given(hf)
    scale = (get(hf, "qk_nope_head_dim") + get(hf, "qk_rope_head_dim")) ** -0.5
    found = plain.read(hf)
    if found["rope.scaling"] != "none" and given.get("mscale_all_dim"):
      scale *= mscale(get(given, "factor"), given["mscale_all_dim"]) ** 2
    return found | {"attn_scale": scale}

  def write(model: Fields) -> HfConfig:
    out = plain.write(model)
    sharper = (model["attn_scale"] * model["head_dim"] ** 0.5) ** 0.5
    if out["rope_scaling"] and abs(sharper - 1) > 1e-6:
      out["rope_scaling"]["mscale_all_dim"] = (sharper - 1) / (0.1 * math.log(model["rope.factor"]))
    return out

  return Entry(read, write)
