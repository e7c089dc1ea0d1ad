import pathlib

from jaxgpt import config
from jaxgpt.config import reference

DOC = pathlib.Path(__file__).parents[2] / "docs" / "config.md"


def test_every_key_has_a_comment():
  named = [f"{section}.{key}" if section else key for section, key, _, _ in reference.entries()]
  assert sorted(named) == sorted(config.flatten(config.base()))


def test_the_page_is_up_to_date():
  assert DOC.read_text() == reference.text(), "run `make docs`"
