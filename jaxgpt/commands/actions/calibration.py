"""Options of commands that read calibration text."""

from typing import Any

from jaxgpt.analysis.compression import methods
from jaxgpt.config.options import integer, option


def data(modes: tuple[str, ...]) -> Any:
  """The option --data, of some methods."""
  return option(
    None,
    metavar="DIR",
    unset="the run's data",
    modes=modes,
    help="prepared folder with calibration text",
  )


def split(modes: tuple[str, ...]) -> Any:
  """The option --split, of some methods."""
  return option(None, unset="train", modes=modes, help="split of the calibration text")


def rows(modes: tuple[str, ...]) -> Any:
  """The option --rows, of some methods."""
  return integer(
    None, least=1, unset=str(methods.ROWS), modes=modes, help="rows of calibration text"
  )
