"""The checks of `jaxgpt doctor` in their order."""

from collections.abc import Callable, Iterator

import ml_collections
from etils import epath

from jaxgpt.commands.checks import environment, training, workdir
from jaxgpt.commands.checks.finding import OK, Finding, Known, tried
from jaxgpt.run import run_folder


def examine(
  load: Callable[[], ml_collections.ConfigDict] | None = None,
  folder: epath.PathLike | None = None,
  step: bool = True,
) -> Iterator[Finding]:
  """Checks the machine and, if they are given, a config with its data and a run folder.

  A check that needs the result of a failed one is skipped.

  Args:
    load: Returns the config, see `config.load`.
    folder: The run folder.
    step: Whether to compile a training step and run it once.

  Yields:
    Each finding as soon as it is known.
  """
  yield from environment.versions()
  yield from environment.cluster()
  started = False
  for finding in environment.devices():
    started = started or (finding.topic == "devices" and finding.status == OK)
    yield finding
  known = Known(resumed=folder is not None and run_folder.is_run(folder))
  if load is not None:
    c, failure = tried("config", load)
    yield failure or Finding(OK, "config", "every key and value is known")
    if c is not None:
      yield from training.data(c, known)
      if started and known.c is not None:
        yield from training.model(known, step)
  if folder is not None:
    yield from workdir.run_folder(folder, known)
