"""The work at hand on a terminal: its figures, and that nothing is shown without one."""

import io
import re
import sys

import pytest
from rich import console as rich_console

from jaxgpt.commands import main
from jaxgpt.commands.actions import progress
from jaxgpt.text.prepare.monitor import Status
from tests import terminal as terminal_lib


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


def counted(pace, clock, *counts):
  for seconds, done, total in counts:
    clock.now += seconds
    pace.count(done, total)


def test_rate_and_time_left_follow_from_the_first_count(clock):
  pace = progress.Pace("rows", clock=clock)
  counted(pace, clock, (0, 1000, 5000))
  assert pace.describe() == "1,000/5,000 rows"
  counted(pace, clock, (10, 2000, 5000))
  assert pace.describe() == "2,000/5,000 rows  100 rows/s  ETA 0:30"
  clock.now += 12
  assert pace.left == pytest.approx(18)
  clock.now += 60
  assert pace.describe(detail="more") == "2,000/5,000 rows  100 rows/s  ETA 0:00  more"


def test_a_compilation_says_nothing_about_the_rest(clock):
  pace = progress.Pace("batches", compiles=True, clock=clock)
  counted(pace, clock, (0, 0, 10))
  assert pace.describe() == "0/10 batches  compiling …"
  counted(pace, clock, (60, 1, 10), (2, 5, 10))
  assert pace.rate == 2 and pace.describe() == "5/10 batches  2.0 batches/s  ETA 0:02"


def test_an_unknown_total_and_slow_work(clock):
  pace = progress.Pace("rows", clock=clock)
  counted(pace, clock, (0, 0, None), (4, 2.5, None))
  assert pace.left is None and pace.describe() == "2 rows  0.6 rows/s"
  pace = progress.Pace("programs", clock=clock)
  counted(pace, clock, (0, 0, 8), (95, 1, 8))
  assert pace.describe() == "1/8 programs  95 s each  ETA 11:05"
  assert progress.clock(3723) == "1:02:03"


def terminal(is_terminal=True):
  out = io.StringIO()
  return out, rich_console.Console(file=out, force_terminal=is_terminal, width=100)


def plain(out):
  return terminal_lib.plain(out.getvalue())


def test_a_terminal_shows_names_that_are_no_markup():
  out, screen = terminal()
  with progress.Live("rows", ticks=False, console=screen) as live:
    live.count(3, 10, "[bold]first", detail="[red]x")
    live.count(1, 2, "second")
  assert "[bold]first" in plain(out) and "3/10 rows" in plain(out) and "[red]x" in plain(out)
  assert re.search(r"second ━+.* 1/2 rows", plain(out))


@pytest.mark.parametrize("is_terminal, shown", [(False, True), (True, False)])
def test_nothing_is_shown_without_a_terminal_or_if_not_wanted(is_terminal, shown):
  out, screen = terminal(is_terminal)
  with progress.Live("rows", shown=shown, console=screen) as live:
    live.count(3, 10, "work")
    live.clear()
  assert not live.shown and "work" not in out.getvalue()


def test_a_preparation_shows_its_job(capsys):
  out, screen = terminal()
  with progress.OfPreparation(console=screen) as report:
    report("a line")
    report.show(Status("tokenize", 2, 8, 12_345, 3.25e6))
    report.show(None)
  assert "2/8 tasks  12,345 documents  3.2 MB/s" in plain(out)
  assert capsys.readouterr().out == "a line\n"
  assert progress.OfPreparation(console=terminal(False)[1]).show is None


def test_rows_of_chunks_count_those_before():
  out, screen = terminal()
  with progress.Live("rows", ticks=False, console=screen) as live:
    rows = progress.OfChunks(live)
    rows.total = 2500
    rows.begin(1024, 1000)
    rows.share(0.5)
  assert "1,024/2,500 rows" in plain(out) and "1,524/2,500 rows" in plain(out)


def test_an_evaluation_shows_its_batches_and_prints_the_same(trained, monkeypatch, capsys):
  words = ["evaluate", f"--workdir={trained}"]
  assert main.main(words) == 0
  before = capsys.readouterr()
  screen = terminal_lib.Terminal()
  monkeypatch.setattr(sys, "stderr", screen)
  monkeypatch.setenv("TERM", "xterm")
  assert main.main(words) == 0
  assert capsys.readouterr().out == before.out and "batches" not in before.err
  assert "evaluate" in screen.text and re.search(r"1/\d+ batches", screen.text)
