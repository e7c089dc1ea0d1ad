"""`python -m jaxgpt` is `jaxgpt`."""

import signal
import sys

# Until a command runs, Ctrl-C ends the program at once. A traceback of a half-imported module, or a
# library that swallows the interrupt, helps nobody.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, signal.SIG_DFL)

from jaxgpt.commands import main as main_lib


def main() -> int:
  """The program `jaxgpt`, see `jaxgpt.commands.main`."""
  return main_lib.main()


if __name__ == "__main__":
  sys.exit(main())
