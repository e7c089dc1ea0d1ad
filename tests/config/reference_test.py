"""The generated reference of config keys."""

import pathlib

from jaxgpt.commands import reference
from jaxgpt.config.keys import KEYS

DOC = pathlib.Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_is_up_to_date():
  assert DOC.read_text() == reference.config_page(), "run `make docs`"


def test_the_page_has_every_key_and_every_choice():
  lines = {line.split("`")[1]: line for line in DOC.read_text().splitlines() if "| `" in line}
  assert list(lines) == sorted(KEYS, key=list(lines).index) and len(lines) == len(KEYS)
  for name, key in KEYS.items():
    assert all(f"`{choice}`" in lines[name] for choice in (*key.choices, *key.items)), name
