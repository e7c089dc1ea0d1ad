"""The page of `jaxgpt explain`: one HTML file that needs no network."""

import importlib.resources
from typing import Any

from jaxgpt.storage import strict_json

_PLACE = "/*DATA*/"


def render(page: dict[str, Any]) -> str:
  """The HTML of a page.

  Args:
    page: From `explain.explain`.
  """
  template = importlib.resources.files("jaxgpt.analysis.interpret").joinpath("page.html")
  # A prompt with "</script>" must not end the element that holds it.
  data = strict_json.dumps(page).replace("<", "\\u003c")
  return template.read_text(encoding="utf-8").replace(_PLACE, data)
