"""Learning-rate schedules: the share of the peak rate at each step."""

import jax.numpy as jnp
import optax


def make(c_schedule, steps):
  """A function step -> factor in [0, 1]; step 0 of a warmup is 1 / warmup_steps, not 0.

  Args:
    c_schedule: the config's `schedule` section.
    steps: optimizer steps of the run.

  Returns:
    An optax schedule. 'wsd' is warmup-stable-decay (arXiv:2404.06395), 'inverse_sqrt' that of
    the Transformer paper (arXiv:1706.03762, section 5.3).
  """
  warmup, final = c_schedule.warmup_steps, c_schedule.final_ratio
  rest = max(steps - warmup, 1)
  decay = min(max(round(c_schedule.decay_fraction * steps), 1), rest)
  body = {
      "cosine": lambda: optax.cosine_decay_schedule(1.0, rest, alpha=final),
      "linear": lambda: optax.linear_schedule(1.0, final, rest),
      "wsd": lambda: optax.linear_schedule(1.0, final, decay, transition_begin=rest - decay),
      "inverse_sqrt": lambda: lambda step: (1 + jnp.maximum(step, 0) / max(warmup, 1)) ** -0.5,
      "constant": lambda: optax.constant_schedule(1.0),
  }[c_schedule.name]()
  if not warmup:
    return body
  rise = optax.linear_schedule(1 / warmup, 1.0, max(warmup - 1, 1))
  return optax.join_schedules([rise, body], [warmup])
