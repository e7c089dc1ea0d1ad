"""The runs of a sweep: their names, configs and folders."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from jaxgpt import config
from jaxgpt.analysis.sweep.definition import SEED, Setting, Sweep
from jaxgpt.errors import UserError
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib

RUNS, LOGS = "runs", "logs"  # folders in that of the sweep
_LONGEST = 120  # characters of a name


class Member(NamedTuple):
  """A run of a sweep.

  Attributes:
    name: Name of its folder, which follows from the setting and the seed alone.
    setting: Its values, without those that all runs share.
    number: Number of the setting, from 0.
    seed: Its seed.
    overrides: Flags that turn the base config into its config.
    steps: Its `train.steps`.
    config: Its config, resolved.
  """

  name: str
  setting: Setting
  number: int
  seed: int
  overrides: tuple[str, ...]
  steps: int = 0
  config: ml_collections.ConfigDict | None = None


class Plan(NamedTuple):
  """A sweep and its runs.

  Attributes:
    sweep: The definition.
    base: Path of the base config, as for `config.load`.
    members: All runs: settings in the order of the file, with all seeds of each.
    notes: Lines to print, such as on settings without effect.
  """

  sweep: Sweep
  base: str
  members: list[Member]
  notes: list[str]

  @property
  def missing(self) -> int:
    """Settings that a search has not proposed yet."""
    settings = len({member.number for member in self.members})
    return max(0, self.sweep.samples - settings) if self.sweep.search else 0

  @property
  def rungs(self) -> list[int]:
    """Steps at which settings are compared before the end."""
    return list(self.sweep.halving.steps) if self.sweep.halving else []

  @property
  def varied(self) -> dict[str, str]:
    """{key in which settings differ: its name in tables}."""
    keys = dict.fromkeys(key for member in self.members for key in member.setting)
    return _short_names(list(keys))


def plan(
  sweep: Sweep,
  file: str,
  overrides: Sequence[str] = (),
  settings: Sequence[Setting] | None = None,
) -> Plan:
  """The runs of a sweep. Each config is checked as `jaxgpt train` does, before anything runs.

  Args:
    sweep: The definition.
    file: Path of the sweep file.
    overrides: Flags for all runs, such as '--config.data.path=DIR'.
    settings: All settings. None: those of the definition.

  Raises:
    UserError: A key does not exist, or the config of a run is refused. The message names the run.
  """
  if settings is None:
    settings = sweep.settings()
  base = _base(sweep.base, file)
  varied = list(dict.fromkeys(key for setting in settings for key in setting))
  both = [o for o in overrides if _key(o) in (*varied, SEED, *sweep.fixed)]
  if both:
    raise UserError(f"{both[0]}: the sweep gives {_key(both[0])!r} itself; leave one of them out")
  shared = (*overrides, *(override(key, value) for key, value in sweep.fixed.items()))
  short = _short_names(varied)
  members = [
    Member(
      _name({short[key]: value for key, value in setting.items()} | {SEED: seed}),
      setting,
      number,
      seed,
      (*shared, *(override(k, v) for k, v in setting.items()), override(SEED, seed)),
    )
    for number, setting in enumerate(settings)
    for seed in sweep.seeds
  ]
  configs, notes = _checked(base, members, sweep)
  members = [
    member._replace(steps=c.train.steps, config=c)
    for member, c in zip(members, configs, strict=True)
  ]
  return Plan(sweep, base, members, notes)


def _base(base: str, file: str) -> str:
  """Path of the base config, and its argument."""
  own = file.partition(":")[0]
  name, colon, arg = base.partition(":")
  path = own if not name else os.path.join(os.path.dirname(own), name)
  return path + colon + arg


def override(key: str, value: Any) -> str:
  """The flag that sets a key, such as '--config.optim.lr=0.001'."""
  return f"--config.{key}={value if isinstance(value, str) else repr(value)}"


def _key(flag: str) -> str:
  return flag.split("=", 1)[0].lstrip("-").removeprefix("no").removeprefix("config.")


def _short_names(keys: Sequence[str]) -> dict[str, str]:
  """{key: its last part, or all of it where two keys share that}."""
  lasts = [key.split(".")[-1] for key in keys]
  return {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts)}


def _name(values: Mapping[str, Any]) -> str:
  """The name of a run, such as 'lr=0.001,width=64,seed=0'."""
  text = ",".join(f"{key}={value}" for key, value in values.items())
  name = re.sub(r"[^\w.,=+-]", "_", text)
  if name != text or len(name) > _LONGEST:  # a digest keeps it different from all others
    name = f"{name[: _LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
  return name


def _checked(
  base: str, members: Sequence[Member], sweep: Sweep
) -> tuple[list[ml_collections.ConfigDict], list[str]]:
  """(config of each run, notes). Checks all configs, without building a model."""
  configs, notes = list[ml_collections.ConfigDict](), dict[str, None]()
  vocabularies: dict[str, int | None] = {}
  for member in members:
    try:
      c, origin = config.load(base, member.overrides)
      build_lib.check(c)
      notes |= dict.fromkeys(build_lib.check_settings(c, origin))
      if c.data.path not in vocabularies:
        tokenizer, _ = batches_lib.load_tokenizer_and_config(c)
        vocabularies[c.data.path] = tokenizer.vocab_size
      c = config.resolve(c, vocab_size=vocabularies[c.data.path])
      _check_compared(c, sweep)
    except UserError as e:
      raise UserError(f"run {member.name}: {e}") from e
    configs.append(c)
  steps = sorted({c.train.steps for c in configs})
  if sweep.halving and len(steps) > 1:
    raise UserError(
      f"sweep: halving compares settings at equal steps, but train.steps takes {steps}; "
      "use one value"
    )
  if sweep.halving and sweep.halving.steps[-1] >= steps[0]:
    raise UserError(
      f"sweep: halving: steps={tuple(sweep.halving.steps)} must be below train.steps={steps[0]}"
    )
  return configs, list(notes)


def _check_compared(c: ml_collections.ConfigDict, sweep: Sweep) -> None:
  if batches_lib.validation(c) is None:
    raise UserError(
      f"data.path={c.data.path!r} has no validation split to compare runs on; prepare it with one"
    )
  if c.eval.patience:
    raise UserError(
      f"eval.patience={c.eval.patience} ends runs at steps of their own, where they can't be "
      "compared; leave it at 0, and end the worst ones with halving"
    )
  for step in sweep.halving.steps if sweep.halving else ():
    if not c.eval.every or step % c.eval.every:
      raise UserError(
        f"sweep: halving compares at step {step}, which is no multiple of eval.every="
        f"{c.eval.every}; set eval.every so that it is"
      )


def folder_of(workdir: epath.PathLike, member: Member) -> epath.Path:
  """The run folder of a member."""
  return epath.Path(workdir) / RUNS / member.name
