"""Learning-rate schedules: the share of the peak rate at each step."""

import jax.numpy as jnp
import optax

# After the warmup: f(section, steps that are left, steps of a final decay, warmup steps).
SHAPES = {
  "cosine": lambda c, rest, decay, warmup: optax.cosine_decay_schedule(1.0, rest, c.final_ratio),
  "linear": lambda c, rest, decay, warmup: optax.linear_schedule(1.0, c.final_ratio, rest),
  "wsd": lambda c, rest, decay, warmup: optax.linear_schedule(
    1.0, c.final_ratio, decay, transition_begin=rest - decay
  ),
  "inverse_sqrt": lambda c, rest, decay, warmup: (
    lambda step: (1 + jnp.maximum(step, 0) / max(warmup, 1)) ** -0.5
  ),
  "constant": lambda c, rest, decay, warmup: optax.constant_schedule(1.0),
}


def make(c_schedule, steps):
  """A function step -> factor in [0, 1]; step 0 of a warmup is 1 / warmup_steps, not 0.

  Args:
    c_schedule: the config's `schedule` section.
    steps: optimizer steps of the run.

  Returns:
    An optax schedule. 'wsd' is warmup-stable-decay (arXiv:2404.06395), 'inverse_sqrt' that of
    the Transformer paper (arXiv:1706.03762, section 5.3).
  """
  warmup = c_schedule.warmup_steps
  rest = max(steps - warmup, 1)
  decay = min(max(round(c_schedule.decay_fraction * steps), 1), rest)
  body = SHAPES[c_schedule.name](c_schedule, rest, decay, warmup)
  if not warmup:
    return body
  rise = optax.linear_schedule(1 / warmup, 1.0, max(warmup - 1, 1))
  return optax.join_schedules([rise, body], [warmup])
