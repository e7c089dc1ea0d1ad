"""`python -m jaxgpt` is `jaxgpt`."""

import sys

from jaxgpt.commands.main import main

sys.exit(main())
