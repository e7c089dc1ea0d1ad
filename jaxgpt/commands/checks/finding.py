"""Findings of the doctor, and helpers of the checks that make them."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import ml_collections

from jaxgpt.errors import UserError

OK, WARNING, PROBLEM = "ok", "warning", "problem"

T = TypeVar("T")


class Finding(NamedTuple):
  """The result of one check.

  Attributes:
    status: OK, WARNING or PROBLEM.
    topic: One word.
    text: The result in words and, unless it is OK, the way out.
  """

  status: str
  topic: str
  text: str


@dataclasses.dataclass
class Known:
  """Results of earlier checks that later ones need. None: not known.

  Attributes:
    c: The resolved config.
    batch: The first batch of the training split.
    mesh: The device mesh.
    parts: The model and its state's shapes, from `build.build`.
    resumed: Whether the run folder holds a run that the config would continue.
  """

  c: ml_collections.ConfigDict | None = None
  batch: Any = None
  mesh: Any = None
  parts: Any = None
  resumed: bool = False


def tried(topic: str, function: Callable[[], T]) -> tuple[T, None] | tuple[None, Finding]:
  """(the function's result, None), or (None, a problem) if it raises a UserError."""
  try:
    return function(), None
  except UserError as e:
    return None, Finding(PROBLEM, topic, str(e))


def within(seconds: float, function: Callable[[], T]) -> tuple[T, None] | tuple[None, Exception]:
  """(the function's result, None), or (None, the error that it raised or a TimeoutError)."""
  result: list[tuple[T, None] | tuple[None, Exception]] = []

  def call() -> None:
    try:
      result.append((function(), None))
    except Exception as e:  # the caller reports it, whatever it is
      result.append((None, e))

  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(seconds)
  return result[0] if result else (None, TimeoutError(f"no answer within {seconds} s"))
