"""Sweeps: many runs of one config, from a file that says which keys take which values.

`definition` has what a sweep file is made of, `members` the runs that follow from it, `state` what
their folders say, `queue` the processes that train them, `schedule` who trains on, `table` and
`plot` the result.
"""

from jaxgpt.analysis.sweep.definition import (
  Halving,
  Sweep,
  choice,
  integers,
  log_uniform,
  uniform,
)

__all__ = ["Halving", "Sweep", "choice", "integers", "log_uniform", "uniform"]
