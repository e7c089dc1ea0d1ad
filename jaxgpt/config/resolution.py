"""Resolved configs: derived values filled in, everything checked that needs no devices or data."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import ml_collections

from jaxgpt.config import checks, combinations, mesh_rules
from jaxgpt.config.keys import DECLARATIONS, KEYS, base, lock, lora_targets
from jaxgpt.config.schema import Key, Section
from jaxgpt.errors import UserError, nearest

# A nested config: the object itself or, as in a run folder's config.json, plain dicts.
Nested: TypeAlias = "Mapping[str, Any] | ml_collections.ConfigDict"


def flatten(c: Nested) -> dict[str, Any]:
  """{'model.width': 384, ...} of a nested ConfigDict or dict. Lists become tuples."""
  out = {}
  for key, value in c.items():
    if isinstance(value, (dict, ml_collections.ConfigDict)):
      out.update({f"{key}.{k}": v for k, v in flatten(value).items()})
    else:
      out[key] = _as_tuples(value)
  return out


def from_dict(tree: Nested) -> ml_collections.ConfigDict:
  """A locked config from a plain nested dict, such as a run folder's `config.json` holds.

  Args:
    tree: Any of the keys. Others keep their default.

  Raises:
    UserError: A key that `base` does not have.
  """
  c = base()
  for key, value in flatten(tree).items():
    if not is_key(key):
      raise UserError(f"unknown config key {key!r}; {nearest(key, KEYS)}".rstrip("; "))
    if value is not None:  # placeholders take no None
      c.update_from_flattened_dict({key: value})
  return c


def is_key(flat: str) -> bool:
  """Whether a flat key is declared, or is an option in a section that takes users' keys."""
  return flat in KEYS or is_user_option(flat)


def is_user_option(flat: str) -> bool:
  """Whether a flat key lies in a section that takes users' own keys."""
  nodes = list(DECLARATIONS.on_path(flat))
  within = bool(nodes) and isinstance(nodes[-1], Section) and nodes[-1].user_keys
  return within and flat.count(".") == len(nodes)


def resolve(
  c: ml_collections.ConfigDict, vocab_size: int | None = None
) -> ml_collections.ConfigDict:
  """Fills in derived values and checks the config.

  Args:
    c: A config from `load`. It is not changed.
    vocab_size: The tokenizer's, for a config that leaves `model.vocab_size` open.

  Returns:
    A locked copy in which every key that the model reads has a value.

  Raises:
    UserError: A value out of range, or values that exclude each other. The message names them.
  """
  c = c.copy_and_resolve_references()
  check_values(c)
  if c.model.vocab_size is None:
    c.model.vocab_size = vocab_size
  # In the order of the declarations: some values derive from others that are derived themselves,
  # such as attn_scale from head_dim from width and num_heads.
  for flat, key in KEYS.items():
    if key.derive is not None:
      *sections, name = flat.split(".")
      section = c
      for s in sections:
        section = section[s]
      if section[name] is None:
        section[name] = key.derive(c)
  # A run folder has the names of the model's own weights, in whatever spelling the user gave them.
  c.model.lora.targets = lora_targets.canonical(c.model.lora.targets)
  combinations.check(c)
  return lock(c)


def check_values(c: ml_collections.ConfigDict) -> None:
  """Checks every value by itself, and the logical axis rules.

  Raises:
    UserError: A value out of range, not among its choices, or of the wrong form.
  """
  for flat, value in flatten(c).items():
    if flat in KEYS:
      KEYS[flat].validate(flat, value)
    else:
      checks.user_option(flat, value)
  mesh_rules.check(c.mesh.rules)


def difference(old: Nested, new: Nested) -> list[tuple[str, Any, Any]]:
  """Compares two configs, except for keys that are free on resume.

  Returns:
    [(flat key, old value, new value)] of the keys whose values differ.
  """
  a, b = flatten(old), flatten(new)
  return [
    (key, a.get(key), b.get(key))
    for key in sorted(a.keys() | b.keys())
    if not is_free_on_resume(key) and a.get(key) != b.get(key)
  ]


def is_free_on_resume(flat: str) -> bool:
  """Whether a flat key may differ between a run and its continuation.

  A key that is no longer declared is free if its section is.
  """
  return any(node.free_on_resume for node in DECLARATIONS.on_path(flat))


def effect_of_change(flat: str) -> str | None:
  """The effect of a change that a run may go on with if its user asks for it, or None."""
  found = _on_change(flat)
  return found.if_changed or None if found else None


def why_fixed(flat: str) -> str:
  """The reason why a run cannot go on with another value of a key, or '' if it can."""
  found = _on_change(flat)
  return found.fixed if found else ""


def _on_change(flat: str) -> Key | Section | None:
  """The innermost declaration that says what a change of a key means."""
  says = lambda node: node.free_on_resume or node.if_changed or node.fixed
  nodes = [node for node in DECLARATIONS.on_path(flat) if says(node)]
  return nodes[-1] if nodes else None


def _as_tuples(value: Any) -> Any:
  return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value
