"""The rotary embedding in config.json: old keys and new, plain and stretched.

transformers 4 wrote `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`, which
may hold a dict for each kind of layer. All are read; the old ones are written, since both versions
and other programs read them.
"""

import math

from jaxgpt.hf.config_map import Entry, get, refuse

_KINDS = {
  "default": "none",
  "linear": "linear",
  "dynamic": "ntk",
  "llama3": "llama3",
  "yarn": "yarn",
  "longrope": "longrope",
  "su": "longrope",
}


def rope(theta=10_000.0, theta_key="rope_theta", local=None, kinds=tuple(_KINDS), own_len=False):
  """Base, scaling and share of a head.

  Args:
    theta: default of the base.
    theta_key: its old key.
    local: old key and default of the base in local layers, or None where it is the same one.
    kinds: scalings that the family's own code knows.
    own_len: whether config.json keeps the original context beside the scaling (Phi-3).
  """

  def read(hf):
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

  def write(model):
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


def _given(hf):
  """(the parameters of global layers, of layers within a window) in whatever form they are."""
  new = hf.get("rope_parameters") or {}
  if "full_attention" in new or "sliding_attention" in new:
    return new.get("full_attention") or {}, new.get("sliding_attention") or {}
  return {**(hf.get("rope_scaling") or {}), **new}, {}


def _length(given, hf):
  """The context before it was stretched."""
  return (
    hf.get("original_max_position_embeddings")
    or given.get("original_max_position_embeddings")
    or get(hf, "max_position_embeddings")
  )


def _factor(given, hf):
  return float(given.get("factor") or get(hf, "max_position_embeddings") / _length(given, hf))


def _read_yarn(given, hf):
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


def _read_longrope(given, hf):
  attention = given.get("attention_factor")
  return {
    "rope.factor": _factor(given, hf),
    "rope.original_len": _length(given, hf),
    "rope.attention_factor": attention and float(attention),
    "rope.short_factors": tuple(map(float, get(given, "short_factor"))),
    "rope.long_factors": tuple(map(float, get(given, "long_factor"))),
  }


_READ = {
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
_KEYS = {  # theirs: ours
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


def _writer(keys):
  def write(model):
    values = {theirs: model[ours] for theirs, ours in keys.items()}
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {k: v for k, v in values.items() if v is not None}

  return write


_WRITE = {kind: _writer(keys) for kind, keys in _KEYS.items()}


def mscale(factor, weight):
  """How much sharper YaRN makes attention (arXiv:2309.00071, section 3.4)."""
  return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def latent_rope():
  """DeepSeek's: as `rope`, but part of YaRN's sharpness is in the scale of the attention logits."""
  plain = rope()

  def read(hf):
    given, _ = _given(hf)
    scale = (get(hf, "qk_nope_head_dim") + get(hf, "qk_rope_head_dim")) ** -0.5
    found = plain.read(hf)
    if found["rope.scaling"] != "none" and given.get("mscale_all_dim"):
      scale *= mscale(get(given, "factor"), given["mscale_all_dim"]) ** 2
    return found | {"attn_scale": scale}

  def write(model):
    out = plain.write(model)
    sharper = (model["attn_scale"] * model["head_dim"] ** 0.5) ** 0.5
    if out["rope_scaling"] and abs(sharper - 1) > 1e-6:
      out["rope_scaling"]["mscale_all_dim"] = (sharper - 1) / (0.1 * math.log(model["rope.factor"]))
    return out

  return Entry(read, write)
