"""Freed memory goes back to the system."""

import subprocess
import sys

import pytest

_HEAP = """
import pathlib, re, sys
from jaxgpt.storage import malloc

def size():
  rollup = pathlib.Path("/proc/self/smaps_rollup").read_text()
  return int(re.search(r"Pss_Anon: +([0-9]+)", rollup)[1])

if sys.argv[1] == "yes":
  malloc.give_back()
first = size()
bytearray(24 << 20)  # freed at once: from now on glibc keeps what is smaller
blocks = [bytearray(b"x") * (1 << 20) for _ in range(64)]
last = blocks[-1]
del blocks
print((size() - first) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_blocks_below_one_that_is_in_use_are_given_back():
  left = {
    given: int(
      subprocess.run(
        [sys.executable, "-c", _HEAP, given], capture_output=True, text=True, check=True
      ).stdout
    )
    for given in ("yes", "no")
  }
  assert left["yes"] < 8 < 50 < left["no"], left
