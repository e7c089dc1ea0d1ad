"""A sweep file: a Python file with `get_sweep()`, which returns a `Sweep`.

from jaxgpt.analysis.sweep import Halving, Sweep

def get_sweep():
  return Sweep(
    base="small.py",
    grid={"optim.lr": (1e-3, 3e-3, 1e-2), "model.width": (64, 128)},
    seeds=(0, 1, 2),
  )
"""

import dataclasses
import math
import os
import pathlib
import random as random_lib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.config import loading
from jaxgpt.config.keys import KEYS
from jaxgpt.config.resolution import is_key
from jaxgpt.errors import UserError, nearest

SEED = "seed"  # the config key that the seeds of a sweep set
CHOICE = "choice"  # the kind of a distribution over some values
_DIGITS = 4  # of random values, which names of folders and commands repeat

Setting = dict[str, Any]  # {flat config key: value}


class Distribution(NamedTuple):
  """A distribution of a key's values. `uniform` and its neighbours make one.

  Attributes:
    kind: 'uniform', 'log_uniform', 'integers' or 'choice'.
    low, high: Its range, which a choice does not have.
    values: The values of a choice.
  """

  kind: str
  low: float = 0.0
  high: float = 0.0
  values: tuple[Any, ...] = ()

  def draw(self, source: random_lib.Random) -> Any:
    """A random value, see `settled`."""
    if self.kind == CHOICE:
      return source.choice(self.values)
    if self.kind == "integers":
      return source.randint(int(self.low), int(self.high))
    if self.kind == "uniform":
      return self.settled(source.uniform(self.low, self.high))
    return self.settled(math.exp(source.uniform(math.log(self.low), math.log(self.high))))

  def settled(self, value: float) -> float:
    """A number with few digits, as names of folders and commands show it, within the range.

    It has four significant digits. If numbers are equally likely in a narrow range, such as 0.999
    to 0.9999, its distance from the ends has about as many.
    """
    digits = _decimals(value)
    if self.kind == "uniform":
      digits = max(digits, _decimals(self.high - self.low))
    return min(max(round(value, digits), self.low), self.high)


def _decimals(value: float) -> int:
  """The decimal places of a number with `_DIGITS` significant digits."""
  return _DIGITS - 1 - math.floor(math.log10(abs(value))) if value else _DIGITS


def uniform(low: float, high: float) -> Distribution:
  """Numbers from low to high, all equally likely."""
  return _range("uniform", low, high)


def log_uniform(low: float, high: float) -> Distribution:
  """Numbers above 0 whose logarithms are equally likely, such as learning rates."""
  if low <= 0:
    raise UserError(f"log_uniform({low}, {high}): numbers must be above 0")
  return _range("log_uniform", low, high)


def integers(low: int, high: int) -> Distribution:
  """Whole numbers from low to high, both included."""
  return _range("integers", low, high)


def choice(*values: Any) -> Distribution:
  """One of some values."""
  if not values:
    raise UserError("choice(): name the values to choose from")
  return Distribution(CHOICE, values=values)


def _range(kind: str, low: float, high: float) -> Distribution:
  if not low < high:
    raise UserError(f"{kind}({low}, {high}): the first number must be below the second")
  return Distribution(kind, low, high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halving:
  """Successive halving (arXiv:1502.07943): the worst settings end early.

  All settings are trained to the first of `steps`. The best ones go on to the next, and so on; the
  last ones to the end of the run.

  Attributes:
    steps: Steps after which settings are compared, each a multiple of `eval.every`.
    keep: Share of the settings that go on, at least one.
  """

  steps: Sequence[int]
  keep: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TPE:
  """Search: later settings follow from the results of earlier ones.

  A tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for Hyper-Parameter
  Optimization", section 4) models where good settings lie and where bad ones do. It is Optuna's:
  the extra `optuna`.

  Attributes:
    startup: Random settings that it begins with.
    batch: Settings of a round, which all train before the next ones are proposed.
  """

  startup: int = 8
  batch: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """What a sweep file returns.

  The settings are the product of `points`, `grid` and random samples. Each is trained with each
  seed.

  Attributes:
    base: Config file as for `jaxgpt train --config`, relative to the sweep file. '': the sweep file
      itself, which then has a `get_config()` too.
    fixed: {key: value} for all runs.
    points: Settings as {key: value}, one after another.
    grid: {key: values}: all combinations. A tuple of keys takes tuples of values, which change
      together.
    random: {key: distribution}: `samples` settings, drawn with `random_seed`.
    samples: Number of random settings.
    random_seed: Seed of the random settings.
    seeds: Values of the config's `seed`. Tables show the median over them.
    metric: Metric of the validation split that settings are compared by.
    maximize: The largest value is the best one. False: the smallest.
    halving: When to end the worst settings. None: all are trained to the end.
    search: How settings of `random` follow from the results of earlier ones. None: all `samples`
      are random.
  """

  base: str = ""
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  points: Sequence[Mapping[str, Any]] = ()
  grid: Mapping[str | tuple[str, ...], Sequence[Any]] = dataclasses.field(default_factory=dict)
  random: Mapping[str, Distribution] = dataclasses.field(default_factory=dict)
  samples: int = 0
  random_seed: int = 0
  seeds: Sequence[int] = (0,)
  metric: str = "loss"
  maximize: bool = False
  halving: Halving | None = None
  search: TPE | None = None

  def settings(self) -> list[Setting]:
    """All settings, without those of `fixed`, in the order of the file. With a search the first.

    Raises:
      UserError: A part of the definition does not fit another, or two settings are equal.
    """
    self._check()
    draws = self._draws()
    out: list[Setting] = [dict(point) for point in self.points] or [{}]
    for keys, values in self.grid.items():
      names = (keys,) if isinstance(keys, str) else keys
      choices = [dict(zip(names, (v,) if isinstance(keys, str) else v)) for v in values]
      out = [setting | chosen for setting in out for chosen in choices]
    out = [setting | draw for setting in out for draw in draws or [{}]]
    seen = set()
    for setting in out:
      if repr(sorted(setting.items())) in seen:
        raise UserError(f"sweep: the setting {setting} occurs twice; leave one of them out")
      seen.add(repr(sorted(setting.items())))
    return out

  def _draws(self) -> list[Setting]:
    """The random settings, all different."""
    source, found = random_lib.Random(self.random_seed), dict[str, Setting]()
    count = self.search.startup if self.search else self.samples
    for _ in range(100 * count):
      draw = {key: values.draw(source) for key, values in self.random.items()}
      found.setdefault(repr(draw), draw)
      if len(found) == count:
        return list(found.values())
    if count:
      name = "search: startup" if self.search else "samples"
      raise UserError(
        f"sweep: {name}={count}, but random={{…}} gives only {len(found)} different settings; "
        "lower it, or list them in a grid"
      )
    return []

  def _check(self) -> None:
    groups = [*self.grid, *self.random, *self.fixed]
    groups += {key for point in self.points for key in point}
    keys = [key for group in groups for key in ((group,) if isinstance(group, str) else group)]
    for key in keys:
      if not is_key(key):
        raise UserError(f"sweep: unknown config key {key!r}; {nearest(key, KEYS)}".rstrip("; "))
      if key == SEED:
        raise UserError("sweep: name the values of 'seed' in seeds=(0, 1, 2), not as a key")
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
      raise UserError(f"sweep: {twice[0]!r} has values in two places; leave one of them out")
    for names, values in self.grid.items():
      if not len(values):
        raise UserError(f"sweep: grid has no value for {names!r}")
      fits = lambda v, count: isinstance(v, list | tuple) and len(v) == count
      wrong = [] if isinstance(names, str) else [v for v in values if not fits(v, len(names))]
      if wrong:
        raise UserError(f"sweep: grid: {wrong[0]!r} must have a value for each of {names!r}")
    if bool(self.random) != bool(self.samples):
      raise UserError("sweep: random={…} and samples=N go together; give both, or neither")
    if self.search is not None:
      self._check_search(self.search)
    if not self.seeds or len(set(self.seeds)) < len(self.seeds):
      raise UserError(f"sweep: seeds={self.seeds!r} must be one or more different numbers")
    if self.halving is not None:
      steps, keep = list(self.halving.steps), self.halving.keep
      if not steps or steps != sorted(set(steps)) or steps[0] < 1:
        raise UserError(f"sweep: halving: steps={self.halving.steps!r} must be rising, from 1 on")
      if not 0 < keep < 1:
        raise UserError(f"sweep: halving: keep={keep} must be above 0 and below 1")

  def _check_search(self, search: TPE) -> None:
    for name, values in (("points", self.points), ("grid", self.grid), ("halving", self.halving)):
      if values:
        raise UserError(f"sweep: search goes with random={{…}} alone; leave {name} out")
    if search.batch < 1 or not 1 <= search.startup < self.samples:
      raise UserError(
        f"sweep: search: startup={search.startup} must be from 1 to below samples={self.samples}, "
        f"and batch={search.batch} at least 1"
      )


def load(path: str | os.PathLike[str]) -> Sweep:
  """The sweep of a file.

  Args:
    path: A Python file with `get_sweep()`. For FILE.py:ARG, `get_sweep(ARG)` is called.

  Raises:
    UserError: There is no such file, or it returns no `Sweep`.
  """
  file, _, arg = str(path).partition(":")
  if not pathlib.Path(file).is_file():
    raise UserError(f"--config={file}: no such file")
  found = loading.call(file, "get_sweep", arg)
  if not isinstance(found, Sweep):
    raise UserError(f"{file}: get_sweep() returned a {type(found).__name__}; return a Sweep")
  return found
