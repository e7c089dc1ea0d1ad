"""Settings that cannot do what they say: refused in a new run, named in one that exists already.

Most follow from the declarations of the keys (`Key.needs`, `Key.values_need`). The functions at the
end are the others.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections

from jaxgpt.config import remat
from jaxgpt.config.keys import DECLARATIONS, KEYS
from jaxgpt.config.keys.layer_kinds import mlp_kinds
from jaxgpt.config.presets import PRESETS
from jaxgpt.config.resolution import flatten, is_free_on_resume, resolve
from jaxgpt.config.schema import Needs
from jaxgpt.errors import UserError

_SHOWN = 3  # settings in one message
_COMMAND_LINE = "command line"


class Idle(NamedTuple):
  """A setting that has no effect, or not the one it promises.

  Attributes:
    message: The setting, the reason and the way out.
    refused: Whether a new run is refused. False if nobody asked for the setting in this config (it
      came with a copied `model` section, or an override took away the condition it needs), and for
      settings that never change a result, such as those of evaluation.
  """

  message: str
  refused: bool


def check(
  c: ml_collections.ConfigDict, origin: Mapping[str, str], *, resumed: bool = False
) -> list[str]:
  """Checks that each setting of a config has an effect.

  Args:
    c: A config from `load`, not resolved: a derived value is then not taken for the user's.
    origin: {flat key: where its value came from}, from `load`. {}: not known.
    resumed: The run exists already. Its settings are named, but never refused.

  Returns:
    Lines to print: the settings without effect that are not refused.

  Raises:
    UserError: A new run has a setting without effect. The message names up to three.
  """
  found = list(idle(c, origin))
  refused = [one.message for one in found if one.refused]
  if refused and not resumed:
    rest = len(refused) - _SHOWN
    more = f"; and {rest} more setting{'s' if rest > 1 else ''}" if rest > 0 else ""
    raise UserError("; ".join(refused[:_SHOWN]) + more)
  return [f"note: {one.message}" for one in found]


def idle(c: ml_collections.ConfigDict, origin: Mapping[str, str]) -> Iterator[Idle]:
  """Yields the settings of a config that cannot do what they say. Arguments as in `check`."""
  given, resolved = flatten(c), resolve(c)
  preset = flatten({"model": PRESETS.get(c.model.preset, {})})
  copied = _is_copied(given)
  for flat, key in KEYS.items():
    value, typed = given[flat], origin.get(flat) == _COMMAND_LINE
    inherited = copied and flat.startswith("model.") and not typed
    if unmet := _unmet(flat, resolved):
      if value in (None, key.default) or (flat in preset and preset[flat] == value and not typed):
        continue
      if key.derive is not None and (inherited or value == key.derive(resolved)):
        continue
      overridden = not typed and any(origin.get(k) == _COMMAND_LINE for k in unmet.keys)
      yield Idle(
        f"{flat}={value!r} has no effect: it needs {unmet.words}; set that, or leave {flat} out",
        not (inherited or overridden or is_free_on_resume(flat)),
      )
      continue
    for one in value if isinstance(value, tuple) else (value,):
      need = key.values_need.get(one) if key.values_need else None
      if need is not None and not need.holds(resolved):
        yield Idle(
          f"{flat}={one!r} needs {need.words}; set that, or choose another {flat}",
          not (inherited and need.inheritable),
        )
  yield from _others(c, resolved)


def _is_copied(given: Mapping[str, Any]) -> bool:
  """Whether the `model` section was copied from a run, whose derived values are all set."""
  derived = (flat for flat, key in KEYS.items() if key.derive and flat.startswith("model."))
  return all(given[flat] is not None for flat in derived)


def _unmet(flat: str, resolved: ml_collections.ConfigDict) -> Needs | None:
  """The first condition of a key or its sections that does not hold, or None."""
  needs = (node.needs for node in DECLARATIONS.on_path(flat) if node.needs is not None)
  return next((need for need in needs if not need.holds(resolved)), None)


def _others(c: ml_collections.ConfigDict, resolved: ml_collections.ConfigDict) -> Iterator[Idle]:
  """Yields what the declarations of single keys cannot say."""
  for problem in (_empty_preset(c), *_unknown_to_remat(resolved), _never_kept(c)):
    if problem:
      yield Idle(problem, True)


def _empty_preset(c: ml_collections.ConfigDict) -> str | None:
  """A preset's name in a section that the preset did not fill."""
  name, given = c.model.preset, flatten(c)
  if not name:
    return None
  if (
    name not in PRESETS
  ):  # an imported model, and runs of earlier versions, have names of their own
    return None if _is_copied(given) else f"model.preset={name!r}: there is no such preset"
  wanted = {
    flat: value
    for flat, value in flatten({"model": PRESETS[name]}).items()
    if value != KEYS[flat].default
  }
  untouched = [flat for flat in wanted if given[flat] in (None, KEYS[flat].default)]
  if 2 * len(untouched) <= len(wanted):
    return None
  return (
    f"model.preset={name!r}: the name alone fills in nothing; write "
    f"c.model.update(config.preset({name!r}))"
  )


def lacking_activations(m: ml_collections.ConfigDict) -> dict[str, str]:
  """Activations of `remat.ACTIVATIONS` that no layer has: {name: what it needs}.

  Args:
    m: The `model` section.
  """
  kinds = mlp_kinds(m)
  lacking: dict[str, str] = {}
  if not m.gated:
    lacking[remat.GATE] = "model.gated=True"
  if "dense" not in kinds and not m.moe.shared:
    lacking[remat.DOWN] = "a 'dense' layer in model.mlp_pattern"
  if set(kinds) == {"none"}:
    lacking |= dict.fromkeys((remat.GATE, remat.UP), "an MLP in model.mlp_pattern")
  return lacking


def _unknown_to_remat(c: ml_collections.ConfigDict) -> Iterator[str]:
  """Activations in the lists of `model.remat` that the model's layers do not have."""
  m = c.model
  lacking = lacking_activations(m)
  for name in sum(remat.activations(m.remat), ()):
    if name in lacking:
      yield (
        f"model.remat={m.remat!r}: no layer has the activation {name!r}, which needs "
        f"{lacking[name]}; leave {name} out"
      )


def _never_kept(c: ml_collections.ConfigDict) -> str | None:
  """Checkpoints to keep whose steps are never saved."""
  k, steps = c.checkpoint, c.train.steps
  if not 0 < k.keep_every <= steps:
    return None
  saved = [*range(k.every, steps, k.every), steps]
  if any(step % k.keep_every == 0 for step in saved):
    return None
  return (
    f"checkpoint.keep_every={k.keep_every} keeps no checkpoint of checkpoint.every={k.every} and "
    f"train.steps={steps}; make it a multiple of checkpoint.every"
  )
