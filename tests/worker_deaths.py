"""When a process of the suite dies, the test that it ran runs once more, and the summary says so.

pytest catches exceptions, but not the end of a process by jaxlib, which has come from a deadlock of
collectives. The stacks that Python prints as it dies go to a file, and from there to the summary.
"""

import faulthandler
import pathlib
import tempfile

import pytest

_MOST_DEATHS = 2
_FRAMES_LEFT_OUT = ("/_pytest/", "/pluggy/", "/xdist/", "/execnet/", "Extension modules:")
_rerun: list[str] = []
_stacks: list[str] = []


def _stack_file(workerinput):
  name = f"jaxgpt-stacks-{workerinput['testrunuid']}-{workerinput['workerid']}.txt"
  return pathlib.Path(tempfile.gettempdir(), name)


@pytest.hookimpl(trylast=True)  # after pytest's own plugin, which writes stacks to standard error
def pytest_configure(config):
  if hasattr(config, "workerinput"):
    # Open until the process ends.
    config.stack_file = open(_stack_file(config.workerinput), "w")  # noqa: SIM115
    faulthandler.enable(config.stack_file)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
  """Keeps the stacks of a worker that died, without the frames of pytest."""
  path = _stack_file(node.workerinput)
  if error and path.exists():
    lines = path.read_text().splitlines()
    lines = [line for line in lines if not any(part in line for part in _FRAMES_LEFT_OUT)]
    _stacks.append(f"{node.gateway.id}: {error}\n" + "\n".join(lines[:100]))
  path.unlink(missing_ok=True)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched):
  """Runs `crashitem` once more. A test that kills twice fails, and many deaths end the suite."""
  if crashitem in _rerun:
    return
  if len(_rerun) == _MOST_DEATHS:
    pytest.exit(f"more than {_MOST_DEATHS} workers died, the last one in {crashitem}", returncode=1)
  _rerun.append(crashitem)
  report.outcome = "rerun"
  sched.mark_test_pending(crashitem)


def pytest_terminal_summary(terminalreporter):
  for test in _rerun:
    terminalreporter.write_line(f"WORKER DIED in {test}, or just before. It ran once more.")
  for stack in _stacks:
    terminalreporter.write_line(stack)
