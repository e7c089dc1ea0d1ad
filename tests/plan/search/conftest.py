"""Searches that take seconds."""

import pytest

from jaxgpt.plan.search import candidates


@pytest.fixture
def few_axes(monkeypatch):
  """A search over fewer meshes: thousands of plans take seconds."""
  monkeypatch.setattr(candidates, "_SEQS", (1,))
  monkeypatch.setattr(candidates, "_STAGES", (1,))
