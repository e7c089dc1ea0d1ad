r"""Learning-rate schedules: the learning rate of each step as a fraction of its peak.

Every schedule starts with a linear warmup, which `make` adds. An entry of `SCHEDULES` describes the
rest:

  1.0  |    /-------\__        Step 0 has the fraction 1 / warmup_steps, not 0, so that no step
       |   /           \__     is wasted. Step warmup_steps has 1.0. From there on the entry's
       |  /               \_   function counts its steps from 0.
  0.0  +-/------------------
         warmup | entry
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import ml_collections
import optax

from jaxgpt.config import user_code
from jaxgpt.config.registry import Registry


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A shape of the learning rate after warmup.

  Attributes:
    factor: Makes f(step) -> fraction of the peak rate, from the config's `schedule` section and the
      number of optimizer steps of the whole run. Step 0 of f is the first step after warmup.
    check: Raises a UserError if the `schedule` section does not suit this schedule.
    summary: A few words for docs/config.md.
  """

  factor: Callable[[ml_collections.ConfigDict, int], optax.Schedule]
  check: Callable[[ml_collections.ConfigDict], None] = lambda c_schedule: None
  summary: str = ""


SCHEDULES: Registry[Schedule] = Registry("schedule.name")


def find(c: ml_collections.ConfigDict) -> Schedule:
  """The schedule of a config: an entry of `SCHEDULES`, or an object of a user's file.

  Raises:
    UserError: There is none of that name.
  """
  return user_code.find(SCHEDULES, Schedule, c.schedule.name, c.code_folder)


def make(c: ml_collections.ConfigDict) -> optax.Schedule:
  """The learning-rate schedule of a config, with warmup.

  Args:
    c: A resolved config, of which `schedule` and `train.steps` are read.

  Returns:
    f(step) -> fraction of `optim.lr`, for traced and Python steps.
  """
  warmup = c.schedule.warmup_steps
  named = user_code.reading_options(SCHEDULES.setting, c.schedule)
  after_warmup = named(named(find(c).factor)(c.schedule, c.train.steps))
  if not warmup:
    return after_warmup
  rise = optax.linear_schedule(1 / warmup, 1.0, max(warmup - 1, 1))
  return optax.join_schedules([rise, after_warmup], [warmup])


def steps_after_warmup(c_schedule: ml_collections.ConfigDict, steps: int) -> int:
  """Steps of a run that follow its warmup, at least 1.

  Args:
    c_schedule: The config's `schedule` section.
    steps: Steps of the whole run.
  """
  return max(steps - c_schedule.warmup_steps, 1)


def _cosine(c_schedule: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """Half a cosine from 1 down to `final_ratio` (SGDR without restarts, arXiv:1608.03983, eq. 5)."""
  rest = steps_after_warmup(c_schedule, steps)
  return optax.cosine_decay_schedule(1.0, rest, c_schedule.final_ratio)


def _linear(c_schedule: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """A line from 1 down to `final_ratio`."""
  return optax.linear_schedule(1.0, c_schedule.final_ratio, steps_after_warmup(c_schedule, steps))


def _wsd(c_schedule: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """Warmup-stable-decay (arXiv:2404.06395): 1, then a line in the last `decay_fraction`."""
  rest = steps_after_warmup(c_schedule, steps)
  decay = min(max(round(c_schedule.decay_fraction * steps), 1), rest)
  return optax.linear_schedule(1.0, c_schedule.final_ratio, decay, transition_begin=rest - decay)


def _inverse_sqrt(c_schedule: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """sqrt(warmup_steps / step), as in the Transformer paper (arXiv:1706.03762, section 5.3)."""
  del steps
  warmup = c_schedule.warmup_steps
  return lambda step: (1 + jnp.maximum(step, 0) / max(warmup, 1)) ** -0.5


def _constant(c_schedule: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """The peak rate throughout."""
  del c_schedule, steps
  return optax.constant_schedule(1.0)


SCHEDULES.add("cosine", Schedule(_cosine, summary="half a cosine down to `final_ratio`"))
SCHEDULES.add("linear", Schedule(_linear, summary="a line down to `final_ratio`"))
SCHEDULES.add(
  "wsd",
  Schedule(_wsd, summary="constant, then a line in the last `decay_fraction` of the run"),
)
SCHEDULES.add("inverse_sqrt", Schedule(_inverse_sqrt, summary="proportional to 1/sqrt(step)"))
SCHEDULES.add("constant", Schedule(_constant, summary="the peak rate"))
