"""The grammar of `model.lora.targets`: names of weights, patterns, and PEFT's names for them."""

import fnmatch
from typing import Any

from ml_collections import ConfigDict

from jaxgpt.config.keys.layer_kinds import mlp_kinds
from jaxgpt.errors import UserError, nearest

ALL = "*"
# Names in PEFT's `target_modules` that stand for exactly these weights.
ALIASES = {
  "q_proj": ("q",),
  "k_proj": ("k",),
  "v_proj": ("v",),
  "o_proj": ("o",),
  "gate_proj": ("gate",),
  "up_proj": ("up",),
  "down_proj": ("down",),
  "q_a_proj": ("q_down",),
  "kv_a_proj_with_mqa": ("kv_down",),
  "c_fc": ("up",),
  "c_proj": ("o", "down"),
  "all-linear": (ALL,),
}
# Modules of published models that hold several weights, which PEFT gives one adapter together.
_FUSED = {
  "c_attn": "q, k, v",
  "qkv_proj": "q, k, v",
  "Wqkv": "q, k, v",
  "gate_up_proj": "gate, up",
  "Wi": "gate, up",
}


def check(key: str, value: Any) -> None:
  """Raises a UserError unless a value is a tuple of names or patterns."""
  if not all(isinstance(target, str) for target in value):
    raise UserError(f"{key}={value!r}: give a tuple of names or patterns, such as ('q', 'v')")


def weights(m: ConfigDict) -> tuple[str, ...]:
  """Names of the weights of a model that can have an adapter.

  Args:
    m: The `model` section.
  """
  names = ["q", "k", "v", "o"]
  if m.latent.kv_rank:
    names += ["q_down", "kv_down"] if m.latent.q_rank else ["kv_down"]
  if "dense" in mlp_kinds(m) or m.moe.shared:  # routed experts have no adapters
    names += ["gate", "up", "down"] if m.gated else ["up", "down"]
  return tuple(names)


def canonical(targets: tuple[str, ...]) -> tuple[str, ...]:
  """Targets with PEFT's names replaced by ours, each once: ('q', 'o') of ('q_proj', 'o_proj')."""
  return tuple(dict.fromkeys(name for t in targets for name in ALIASES.get(t, (t,))))


def matching(m: ConfigDict) -> tuple[str, ...]:
  """The targets of a `model` section that match a weight as they are spelled."""
  return tuple(
    t for t in m.lora.targets if any(fnmatch.fnmatchcase(name, t) for name in weights(m))
  )


def check_match(m: ConfigDict) -> None:
  """Checks that each target of a model with adapters matches a weight.

  Args:
    m: The `model` section, with canonical targets.

  Raises:
    UserError: A target matches none. The message lists the weights.
  """
  if not m.lora.rank:
    return
  names, matched = weights(m), matching(m)
  if not m.lora.targets:
    raise UserError(
      f"model.lora.rank={m.lora.rank} needs weights that get an adapter: set model.lora.targets to "
      f"some of {', '.join(names)}"
    )
  for target in m.lora.targets:
    if target in matched:
      continue
    hint = nearest(target, names)
    if target in _FUSED:
      hint = f"its weights are {_FUSED[target]} here, each with an adapter of its own; "
    elif "moe" in mlp_kinds(m) and _is_of_experts(target):
      hint = "routed experts have no adapters; "
    raise UserError(
      f"model.lora.targets: {target!r} matches no weight of this model; {hint}there are: "
      f"{', '.join(names)}, or '*' for all of them"
    )


def _is_of_experts(target: str) -> bool:
  return "expert" in target or any(
    fnmatch.fnmatchcase(name, target) for name in ("gate", "up", "down", "w1", "w2", "w3")
  )
