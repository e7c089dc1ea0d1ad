"""`python -m jaxgpt` is `jaxgpt`."""

import sys

from jaxgpt.cli import main

sys.exit(main())
