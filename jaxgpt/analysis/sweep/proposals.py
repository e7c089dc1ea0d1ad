"""Settings that follow from the results of earlier ones: Optuna's Parzen estimator.

    startup   8 random settings         trained to their end
    round 1   4 settings                proposed from 8 results, and trained
    round 2   4 settings                proposed from 12 results, and so on, up to `samples`

Each round is written into the sweep's folder before it is trained, so that a sweep that is started
again has the same settings. The estimator keeps no state: it reads all results in each round.
"""

import json
import math
import random as random_lib
import statistics
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from jaxgpt.analysis.sweep import members as members_lib
from jaxgpt.analysis.sweep import state
from jaxgpt.analysis.sweep.definition import CHOICE, Setting, Sweep
from jaxgpt.analysis.sweep.members import Plan
from jaxgpt.errors import UserError, optional
from jaxgpt.storage import atomic, strict_json

RECORD = "proposals.json"


class Result(NamedTuple):
  """A setting, and the median of its metric over the seeds, or None if a run failed."""

  setting: Setting
  value: float | None


def plan(sweep: Sweep, file: str, overrides: Sequence[str], workdir: epath.PathLike) -> Plan:
  """The runs of a sweep with a search, as far as its folder knows their settings.

  Raises:
    UserError: As `members.plan`, or the folder's settings are those of another search.
  """
  settings = _read(sweep, workdir) or sweep.settings()
  return members_lib.plan(sweep, file, overrides, settings)


def grown(
  before: Plan, file: str, overrides: Sequence[str], workdir: epath.PathLike
) -> Plan | None:
  """The plan with the settings of the next round, which it records, or None after the last one.

  Args:
    before: The plan so far, all runs of which have ended.
    file: Path of the sweep file.
    overrides: Flags for all runs.
    workdir: Folder of the sweep.

  Raises:
    UserError: As `members.plan`, or Optuna is not installed.
  """
  sweep = before.sweep
  results = _results(before, workdir)
  assert sweep.search is not None
  count = min(sweep.search.batch, sweep.samples - len(results))
  if count <= 0:
    return None
  settings = [result.setting for result in results] + proposed(sweep, results, count)
  new = members_lib.plan(sweep, file, overrides, settings)  # refused before it is recorded
  record = {"space": _space(sweep), "settings": [_encoded(sweep, s) for s in settings]}
  path = epath.Path(workdir) / RECORD
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic.write(path, strict_json.dumps(record, indent=1) + "\n")
  return new


def proposed(sweep: Sweep, results: Sequence[Result], count: int) -> list[Setting]:
  """The next settings of a search. Equal results give equal ones.

  Args:
    sweep: The sweep, whose `random` is the space.
    results: All settings so far. Those without a value count as the worst of the others.
    count: Number of settings.

  Raises:
    UserError: Optuna is not installed, or the space has no further setting.
  """
  optuna: Any = optional("optuna", "optuna", "a sweep with search=TPE(…)")
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  values = [r.value for r in results if r.value is not None and math.isfinite(r.value)]
  worst = (min if sweep.maximize else max)(values, default=0.0)
  space = _distributions(optuna, sweep)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    sampler = optuna.samplers.TPESampler(
      n_startup_trials=0,
      multivariate=True,
      constant_liar=True,  # settings of a round keep away from each other
      seed=sweep.random_seed + len(results),
    )
    direction = "maximize" if sweep.maximize else "minimize"
    study = optuna.create_study(direction=direction, sampler=sampler)
    for setting, value in results:
      is_known = value is not None and math.isfinite(value)
      study.add_trial(
        optuna.trial.create_trial(
          params=_encoded(sweep, setting),
          distributions=space,
          value=value if is_known else worst,
        )
      )
    found = [_decoded(sweep, study.ask(space).params) for _ in range(count)]
  return _all_different(sweep, [result.setting for result in results], found)


def _all_different(sweep: Sweep, before: list[Setting], found: list[Setting]) -> list[Setting]:
  """Settings with random ones in place of those that were there before."""
  seen, out = list(before), list[Setting]()
  source = random_lib.Random(f"{sweep.random_seed} {len(before)}")
  for setting in found:
    tries = 0
    while setting in seen:
      setting = {key: values.draw(source) for key, values in sweep.random.items()}
      tries += 1
      if tries == 1000:
        raise UserError(
          f"sweep: samples={sweep.samples}, but random={{…}} gives no setting beyond {len(seen)}; "
          "lower it"
        )
    seen.append(setting)
    out.append(setting)
  return out


def _distributions(optuna: Any, sweep: Sweep) -> dict[str, Any]:
  """The space in Optuna's words."""
  kinds, out = optuna.distributions, dict[str, Any]()
  for key, own in sweep.random.items():
    if own.kind == CHOICE:
      out[key] = kinds.CategoricalDistribution(range(len(own.values)))
    elif own.kind == "integers":
      out[key] = kinds.IntDistribution(int(own.low), int(own.high))
    else:
      out[key] = kinds.FloatDistribution(own.low, own.high, log=own.kind == "log_uniform")
  return out


def _encoded(sweep: Sweep, setting: Setting) -> dict[str, float]:
  """A setting in numbers: for a choice the number of its value."""
  return {
    key: own.values.index(setting[key]) if own.kind == CHOICE else setting[key]
    for key, own in sweep.random.items()
  }


def _decoded(sweep: Sweep, numbers: dict[str, Any]) -> Setting:
  out = Setting()
  for key, own in sweep.random.items():
    value = numbers[key]
    if own.kind == CHOICE:
      out[key] = own.values[int(value)]
    elif own.kind == "integers":
      out[key] = int(value)
    else:
      out[key] = own.settled(value)
  return out


def _results(plan: Plan, workdir: epath.PathLike) -> list[Result]:
  out = list[Result]()
  for number in dict.fromkeys(member.number for member in plan.members):
    members = [member for member in plan.members if member.number == number]
    states = [state.read(workdir, member, plan.sweep.metric) for member in members]
    found = [
      s.compared_at(m.steps, plan.sweep.maximize) for s, m in zip(states, members, strict=True)
    ]
    known = [value for value in found if value is not None]
    whole = len(known) == len(found)
    out.append(Result(members[0].setting, statistics.median(known) if whole else None))
  return out


def _space(sweep: Sweep) -> str:
  return "; ".join(f"{key}: {tuple(own)}" for key, own in sorted(sweep.random.items()))


def _read(sweep: Sweep, workdir: epath.PathLike) -> list[Setting]:
  path = epath.Path(workdir) / RECORD
  if not path.exists():
    return []
  try:
    found = json.loads(path.read_text())
    space, numbers = str(found["space"]), list(found["settings"])
    if space == _space(sweep):
      return [_decoded(sweep, one) for one in numbers]
  except (ValueError, KeyError, TypeError, IndexError) as e:
    raise UserError(f"{path} is damaged ({e}); delete it to begin the search again") from e
  raise UserError(
    f"sweep: random={{…}} is {_space(sweep)}, but {workdir} has settings of {space}; take another "
    "--workdir, or the values that it had"
  )
