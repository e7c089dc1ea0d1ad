"""Registries of named choices."""

import pytest

from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError


def test_entries_are_found_by_name_in_order():
  numbers = Registry("numbers.name")
  assert numbers.add("one", 1) == 1
  numbers.add("two", 2)
  assert numbers.find("two") == 2 and list(numbers) == ["one", "two"] and len(numbers) == 2


def test_a_wrong_name_lists_the_names():
  numbers = Registry("numbers.name")
  numbers.add("one", 1)
  with pytest.raises(UserError, match="numbers.name='on': did you mean 'one'. choose one of one"):
    numbers.find("on")


def test_a_name_is_registered_once():
  numbers = Registry("numbers.name")
  numbers.add("one", 1)
  with pytest.raises(ValueError, match="'one' is registered twice"):
    numbers.add("one", 2)
