"""Sweeps: many runs of one config, from a file that says which keys take which values.

`definition` has the parts of a sweep file, `members` the runs that follow from it, `state` their
progress by their folders, `queue` the processes that train them, `schedule` the choice of runs that
train on, `proposals` settings that follow from results, `table` and `plot` the result.
"""

from jaxgpt.analysis.sweep.definition import (
  TPE,
  Halving,
  Sweep,
  choice,
  integers,
  log_uniform,
  uniform,
)

__all__ = ["TPE", "Halving", "Sweep", "choice", "integers", "log_uniform", "uniform"]
