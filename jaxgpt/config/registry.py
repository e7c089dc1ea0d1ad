"""Registries: the named choices of a config key or option, each one object in one place."""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from jaxgpt.errors import UserError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
  """An ordered mapping from names to objects of one kind, with errors that list the names.

  Example:
    >>> SCHEDULES: Registry[Schedule] = Registry("schedule.name")
    >>> SCHEDULES.add("constant", Schedule(...))
    >>> SCHEDULES.find("constatn")
    UserError: schedule.name='constatn': did you mean 'constant'? choose one of constant
  """

  def __init__(self, setting: str):
    """Makes an empty registry.

    Args:
      setting: The config key or option whose values are the names. Errors start with it.
    """
    self.setting = setting
    self._entries: dict[str, T] = {}

  def add(self, name: str, entry: T) -> T:
    """Adds an entry and returns it.

    Raises:
      ValueError: The name is taken.
    """
    if name in self._entries:
      raise ValueError(f"{self.setting}: {name!r} is registered twice")
    self._entries[name] = entry
    return entry

  def find(self, name: str) -> T:
    """The entry of a name that a user gave.

    Raises:
      UserError: There is no such entry. The message lists the names.
    """
    if name not in self._entries:
      raise UserError(
        f"{self.setting}={name!r}: {nearest(name, self._entries)}"
        f"choose one of {', '.join(self._entries)}"
      )
    return self._entries[name]

  def __getitem__(self, name: str) -> T:
    return self._entries[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)
