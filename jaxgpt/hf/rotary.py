"""The rotary embedding in config.json: its base, its scaling to longer contexts, old and new keys.

transformers 4 wrote `rope_theta` and `rope_scaling`. transformers 5 writes `rope_parameters`, which
may hold one dict per kind of layer. This module reads all of them and writes the old keys, which
both versions and other programs read.

In the functions below, `given` is the dict with the parameters of one kind of layer, wherever
config.json keeps it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxgpt.hf.config_map import Entry, Fields, HfConfig, get, note, refuse

# {rope_type: model.rope.scaling}
_KINDS = {
  "default": "none",
  "linear": "linear",
  "dynamic": "ntk",
  "llama3": "llama3",
  "yarn": "yarn",
  "longrope": "longrope",
}
# What Phi-3 makes of them: older files call its scaling 'su' or 'yarn'.
PHI3_KINDS = {"default": "none", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
DEFAULT_ONLY = {"default": "none"}


def rope(
  theta: float = 10_000.0,
  theta_key: str = "rope_theta",
  local: tuple[str, float] | None = None,
  kinds: Mapping[str, str] = _KINDS,
  own_len: bool = False,
  partial: bool = False,
  scale_local: bool = False,
) -> Entry:
  """The fields of `model.rope`: base, rotated fraction of a head, scaling.

  Args:
    theta: Default of the base.
    theta_key: Old key of the base.
    local: Old key and default of the base in local layers. None: the same base as in global layers.
    kinds: {`rope_type` that the family's code in transformers supports: `model.rope.scaling`}.
    own_len: Whether the original context is a key of config.json outside of the scaling (Phi-3).
    partial: Whether the family's code in transformers reads `partial_rotary_factor`.
    scale_local: Whether the old `rope_scaling` is for local layers too.
  """

  def read(hf: HfConfig) -> Fields:
    given, sliding = _by_layer(hf, scale_local) if local else (_given(hf), {})
    kind = _kind(given)
    if kind not in kinds:
      refuse("rope_type", kind, f"known are {', '.join(kinds)}")
    scaling = kinds[kind]
    _note_unread(hf, given, scaling)
    out = {
      "rope.theta": float(given.get("rope_theta") or hf.get(theta_key) or theta),
      "rope.fraction": _fraction(hf, given, partial),
      "rope.scaling": scaling,
      **_READ[scaling](given, hf),
    }
    if own_len:
      hf.get("original_max_position_embeddings")  # it has no effect without a scaling
    if local:
      if _kind(sliding) != "default":
        refuse("rope_type", _kind(sliding), "layers within a window have no scaling")
      _fraction(hf, sliding, partial)
      out["rope.local_theta"] = float(sliding.get("rope_theta") or hf.get(local[0]) or local[1])
    return out

  def write(model: Fields) -> HfConfig:
    scaling = None
    if model["rope.scaling"] != "none":
      name = next(k for k, v in _KINDS.items() if v == model["rope.scaling"])
      scaling = {"rope_type": name, "type": name, **_WRITE[model["rope.scaling"]](model, own_len)}
    out = {theta_key: model["rope.theta"], "rope_scaling": scaling}
    if model["rope.fraction"] != 1 and partial:
      out["partial_rotary_factor"] = model["rope.fraction"]
    if own_len:
      out["original_max_position_embeddings"] = model["rope.original_len"]
    if local:
      out[local[0]] = model["rope.local_theta"]
    return out

  return Entry(read, write)


def _kind(given: HfConfig) -> str:
  return str(given.get("rope_type", given.get("type", "default")))


def _given(hf: HfConfig) -> HfConfig:
  """Returns the parameters of a family that has one set for all layers."""
  given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
  nested = [key for key in _LAYERS if key in given]
  if nested:
    refuse("rope_parameters", nested[0], "this family has one set of them for all layers")
  return given


_LAYERS = ("full_attention", "sliding_attention")


def _by_layer(hf: HfConfig, scale_local: bool) -> tuple[HfConfig, HfConfig]:
  """Returns the parameters of global layers and those of layers with a window."""
  new, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
  others = sorted(new.keys() - set(_LAYERS))
  if others:
    refuse("rope_parameters", others[0], f"this family has {' and '.join(_LAYERS)} there")
  full, sliding = (new.get(key) or {} for key in _LAYERS)
  return {**full, **old}, {**sliding, **(old if scale_local else {})}


def _fraction(hf: HfConfig, given: HfConfig, partial: bool) -> float:
  """Returns the rotated fraction of a head."""
  share = given.get("partial_rotary_factor")
  share = hf.get("partial_rotary_factor") if share is None else share
  if share is None or share == 1:
    return 1.0
  if partial:
    return float(share)
  if _kind(given) != "default":
    refuse("partial_rotary_factor", share, f"this family has none with rope_type={_kind(given)!r}")
  note(hf, f"partial_rotary_factor={share} has no effect in this family: whole heads are rotated")
  return 1.0


def _note_unread(hf: HfConfig, given: HfConfig, scaling: str) -> None:
  known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
  known |= {"original_max_position_embeddings", *_KEYS.get(scaling, ()), *_ALSO.get(scaling, ())}
  extra = [f"{key}={value!r}" for key, value in given.items() if key not in known]
  if extra:
    note(hf, f"keys of the rotary scaling without a meaning here: {', '.join(extra)}")


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
  "longrope": _LONG
  | {
    "attention_factor": "rope.attention_factor",
    "short_factor": "rope.short_factors",
    "long_factor": "rope.long_factors",
  },
}
_ALSO = {"yarn": ("mscale", "mscale_all_dim", "truncate")}  # read, but not written as they are


def _writer(keys: dict[str, str]) -> Callable[[Fields, bool], HfConfig]:
  def write(model: Fields, own_len: bool) -> HfConfig:
    values: dict[str, Any] = {theirs: model[ours] for theirs, ours in keys.items()}
    if own_len:  # the length is elsewhere, and the factor follows from it
      values.pop("original_max_position_embeddings", None)
      if math.isclose(model["rope.factor"], model["max_len"] / model["rope.original_len"]):
        values.pop("factor", None)
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
    given = _given(hf)
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
