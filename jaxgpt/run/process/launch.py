"""When this process was launched, for the account of a run's wall time."""

import os
import pathlib
import time

_STARTED_AT = 21  # number of the field `starttime` after those of /proc/PID/stat in parentheses
_IMPORTED = time.time()


def launched() -> float:
  """The launch of this process in seconds since the epoch.

  Where the system does not tell (other than Linux), it is the time at which this module was
  imported.
  """
  try:
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[_STARTED_AT - 2])  # of the clock since boot; the first two are cut off
    since_boot = ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
  except (OSError, ValueError, IndexError, AttributeError):
    return _IMPORTED
