"""`python -m jaxgpt` is `jaxgpt`."""

import _signal  # `signal` without the enums, whose import takes milliseconds
import sys

# Until a command runs, Ctrl-C ends the program at once. A traceback of a half-imported module, or a
# library that swallows the interrupt, helps nobody.
if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
  _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from jaxgpt.commands import main as main_lib


def main() -> int:
  """The program `jaxgpt`, see `jaxgpt.commands.main`."""
  return main_lib.main()


if __name__ == "__main__":
  sys.exit(main())
