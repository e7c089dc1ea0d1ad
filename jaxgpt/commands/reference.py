"""Writes the generated reference pages: docs/config.md.

python -m jaxgpt.commands.reference
"""

import pathlib

from jaxgpt.config import reference


def config_page() -> str:
  """The text of docs/config.md."""
  return reference.text({})


if __name__ == "__main__":
  pathlib.Path("docs/config.md").write_text(config_page(), encoding="utf-8")
