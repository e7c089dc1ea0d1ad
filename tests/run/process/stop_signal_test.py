"""Stop signals: which are noted, and which end the program."""

import os
import signal

import pytest

from jaxgpt.run.process import stop_signal


def send(number):
  os.kill(os.getpid(), number)
  signal.sigtimedwait([], 0.2)  # another thread may have caught it, and this one hears of it soon


@pytest.fixture
def ending(monkeypatch):
  """Signals that would have ended the program, as a list. SIGHUP is handled like the others."""
  ended, before = [], {}
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    before[number] = signal.signal(number, lambda n, frame: ended.append(n))
  yield ended
  for number, handler in before.items():
    signal.signal(number, handler)


def test_a_closed_terminal_stops_a_run_and_never_counts_as_the_second_signal(ending):
  with stop_signal.StopSignal(hangup=True) as stop:
    send(signal.SIGHUP)
    assert stop.received == signal.SIGHUP
    send(signal.SIGHUP)
    send(signal.SIGTERM)
    assert stop.received == signal.SIGHUP and not ending
    send(signal.SIGHUP)
    assert not ending
    send(signal.SIGTERM)
    assert ending == [signal.SIGTERM]
  send(signal.SIGHUP)
  assert ending == [signal.SIGTERM, signal.SIGHUP]


def test_nohup_stays_in_force(ending):
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with stop_signal.StopSignal(hangup=True) as stop:
    send(signal.SIGHUP)
    assert stop.received is None


def test_before_training_an_interrupt_ends_the_program_without_a_traceback():
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  with stop_signal.ended_at_once():
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with stop_signal.ended_at_once():
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
  signal.signal(signal.SIGINT, before)
