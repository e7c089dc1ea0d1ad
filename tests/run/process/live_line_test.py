"""The line of a run on a terminal."""

import io

import pytest
from rich import console

from jaxgpt.run.process import live_line


def shown(width, terminal=True):
  """What a terminal of a width shows after some log lines."""
  out = io.StringIO()
  screen = console.Console(file=out, force_terminal=terminal, width=width, soft_wrap=True)
  line = live_line.LiveLine(screen, 600, 0, {"evaluation": 200, "save": 0})
  for step, loss in ((10, 4.0), (20, float("nan")), (30, 3.0), (40, 2.0)):
    line.update(step, f"loss {loss:.4f}", loss)
  assert line.shown == terminal
  line.close()
  return out.getvalue()


def test_the_curve_has_the_finite_losses():
  assert live_line.sparkline([4.0, 3.0, 2.0, 2.0]) == "█▄▁▁"
  assert live_line.sparkline([1.0, 1.0]) == "▁▁"
  assert "█▄▁ loss 2.0000" in shown(160)


def test_a_narrow_terminal_shows_less():
  wide, middle, narrow = (shown(width) for width in (160, 130, 80))
  assert "evaluation at 200" in wide and "save" not in wide
  assert "evaluation" not in middle and "█▄▁" in middle
  assert "█" not in narrow and "loss 2.0000" in narrow and "step 40/600" in narrow


def test_nothing_is_shown_where_there_is_no_terminal():
  assert not shown(160, terminal=False).strip()


@pytest.mark.parametrize("step, words", [(0, "a at 4, b at 10"), (8, "a at 10, b at 10"), (10, "")])
def test_what_comes_next(step, words):
  assert live_line.next_of(step, 10, {"a": 4, "b": 50, "c": 0}) == words
