"""Conditions under which config keys have an effect, for `Key.needs` and `Key.values_need`."""

from typing import Any

from jaxgpt.config.keys.layer_kinds import attention_kinds, mlp_kinds
from jaxgpt.config.schema import Needs

_OF_A_USER = ".py:"  # in the name of an object that a user's file defines


def value_of(c: Any, key: str) -> Any:
  """The value of a flat key of a config."""
  for name in key.split("."):
    c = getattr(c, name)
  return c


def one_of(key: str, *values: Any) -> Needs:
  """The key has one of these values, or names an object of a user's file."""
  holds = lambda c: value_of(c, key) in values or _OF_A_USER in str(value_of(c, key))
  return Needs(f"{key}={_either(values)}", holds, (key,))


def other_than(key: str, value: Any) -> Needs:
  """The key has another value."""
  return Needs(f"{key} other than {value!r}", lambda c: value_of(c, key) != value, (key,))


def above_0(key: str) -> Needs:
  """The key has a number above 0."""
  return Needs(f"{key} above 0", lambda c: value_of(c, key) > 0, (key,))


def set_to_something(key: str) -> Needs:
  """The key is neither empty nor unset."""
  return Needs(f"a value of {key}", lambda c: bool(value_of(c, key)), (key,))


def _either(values: tuple[Any, ...]) -> str:
  *others, last = map(repr, values)
  return f"{', '.join(others)} or {last}" if others else last


def _on(words: str, holds: Any, *keys: str) -> Needs:
  return Needs(words, holds, keys)


HAS_CLASSES = one_of("model.head", "classifier", "token_classifier")
HAS_LOGITS = one_of("model.head", "lm", "classifier", "token_classifier")
ROUTED_LOSS = one_of(
  "objective.name",
  "causal_lm",
  "masked_lm",
  "classification",
  "multi_label",
  "token_classification",
  "question_answering",
  "contrastive",
  "preference",
  "distillation",
)


STARTS_FROM_WEIGHTS = _on(
  "init_from, and model.lora.rank=0 (adapters fill the zeros in)",
  lambda c: bool(c.init_from) and not c.model.lora.rank,
  "init_from",
  "model.lora.rank",
)


WHOLE_WEIGHTS = _on(
  "optim.ema=0 (an average of pruned weights is not zero) and model.lora.rank=0",
  lambda c: not c.optim.ema and not c.model.lora.rank,
  "optim.ema",
  "model.lora.rank",
)


def _is_pooled(c: Any) -> bool:
  # A model that is compared by itself has no objective, see `architecture`.
  is_contrastive = hasattr(c, "objective") and c.objective.name == "contrastive"
  return c.model.head in ("classifier", "pooler") or is_contrastive


POOLED = _on(
  "model.head='classifier' or 'pooler', or objective.name='contrastive'",
  _is_pooled,
  "model.head",
  "objective.name",
)


def _exchanges_tokens(c: Any) -> bool:
  # A model that is compared by itself has no mesh either.
  return c.model.moe.capacity == 0 and (not hasattr(c, "mesh") or c.mesh.expert != 1)


EXCHANGED_TOKENS = _on(
  "mesh.expert other than 1 and model.moe.capacity=0",
  _exchanges_tokens,
  "mesh.expert",
  "model.moe.capacity",
)
LOCAL_LAYERS = _on(
  "a 'local' layer in model.attention_pattern, within model.num_layers",
  lambda c: "local" in attention_kinds(c.model),
  "model.attention_pattern",
  "model.num_layers",
)
ROTATED_LAYERS = _on(
  "model.position='rotary' and a layer other than 'nope' in model.attention_pattern",
  lambda c: c.model.position == "rotary" and set(attention_kinds(c.model)) != {"nope"},
  "model.position",
  "model.attention_pattern",
)
# Local layers with a base of their own read neither the other base nor its scaling.
ROTATED_BY_THETA = _on(
  "a 'global' layer in model.attention_pattern, or model.rope.local_theta unset",
  lambda c: "global" in attention_kinds(c.model) or c.model.rope.local_theta is None,
  "model.attention_pattern",
  "model.rope.local_theta",
)
EXPERTS = _on(
  "a 'moe' layer in model.mlp_pattern, within model.num_layers",
  lambda c: "moe" in mlp_kinds(c.model),
  "model.mlp_pattern",
  "model.num_layers",
  "model.moe.first_dense",
)
MLP_WIDTH = _on(
  "a 'dense' layer in model.mlp_pattern, or a 'moe' layer and model.moe.width unset",
  lambda c: (
    "dense" in mlp_kinds(c.model)
    or ("moe" in mlp_kinds(c.model) and c.model.moe.width in (None, c.model.mlp_width))
  ),
  "model.mlp_pattern",
  "model.moe.width",
)
HAS_MLP = _on(
  "a 'dense' or 'moe' layer in model.mlp_pattern",
  lambda c: {"dense", "moe"} & set(mlp_kinds(c.model)),
  "model.mlp_pattern",
)
ACTIVATION = _on(
  "a 'dense' or 'moe' layer in model.mlp_pattern, or model.head_transform='norm'",
  lambda c: HAS_MLP.holds(c) or c.model.head_transform == "norm",
  "model.mlp_pattern",
  "model.head_transform",
)
RANKS = _on(
  "model.lora.rank or model.latent.kv_rank above 0",
  lambda c: c.model.lora.rank > 0 or c.model.latent.kv_rank > 0,
  "model.lora.rank",
  "model.latent.kv_rank",
)
POSITIONS = _on(
  "model.position='learned' or model.token_types above 0",
  lambda c: c.model.position == "learned" or c.model.token_types > 0,
  "model.position",
  "model.token_types",
)
# The attention factor, if it is given, replaces the formula that longrope reads `factor` for.
ROPE_FACTOR = _on(
  "model.rope.scaling='linear', 'ntk', 'llama3', 'yarn', or 'longrope' without attention_factor",
  lambda c: (
    c.model.rope.scaling != "none"
    and (c.model.rope.scaling != "longrope" or c.model.rope.attention_factor is None)
  ),
  "model.rope.scaling",
  "model.rope.attention_factor",
)
STRETCHED = other_than("model.rope.factor", 1.0)
YARN = _on(
  "model.rope.factor other than 1.0, or model.rope.attention_factor",
  lambda c: c.model.rope.factor != 1 or c.model.rope.attention_factor is not None,
  "model.rope.factor",
)
BEYOND_THE_ORIGINAL = _on(
  "model.rope.original_len below model.max_len",
  lambda c: c.model.rope.original_len < c.model.max_len,
  "model.rope.original_len",
  "model.max_len",
)
SMOOTHED = _on(
  "objective.name='causal_lm' or 'masked_lm', or 'classification' with model.num_labels above 1",
  lambda c: (
    c.objective.name in ("causal_lm", "masked_lm")
    or (c.objective.name == "classification" and c.model.num_labels > 1)
    or _OF_A_USER in c.objective.name
  ),
  "objective.name",
  "model.num_labels",
)
FIXED_MODEL = _on(
  "objective.name='distillation', or 'preference' with objective.loss='dpo', 'dpo_norm' or 'ipo'",
  lambda c: (
    c.objective.name == "distillation"
    or (c.objective.name == "preference" and c.objective.loss not in ("orpo", "simpo"))
    or _OF_A_USER in c.objective.name
  ),
  "objective.name",
  "objective.loss",
)
SEVERAL_FOLDERS = _on("several folders in data.path", lambda c: "," in c.data.path, "data.path")
USER_FILES = _on(
  "a value FILE.py:NAME of optim.name, objective.name, schedule.name or task.name",
  lambda c: any(_OF_A_USER in x.name for x in (c.optim, c.objective, c.schedule, c.task)),
  "optim.name",
  "objective.name",
  "schedule.name",
  "task.name",
)
SEES_ITS_TEXT = _on(
  "model.causal=False, since the first token of a causal model sees no other (the last sees all)",
  lambda c: not c.model.causal,
  "model.causal",
)._replace(inheritable=False)
