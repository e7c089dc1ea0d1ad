"""Every error that a command prints in these tests names only flags that the command takes."""

import pytest

from jaxgpt.commands import main
from tests.commands import flags_in_messages


@pytest.fixture(autouse=True)
def _flags_in_messages(monkeypatch):
  plain = main.report

  def report(command, error):
    flags_in_messages.check(command, error)
    return plain(command, error)

  monkeypatch.setattr(main, "report", report)
