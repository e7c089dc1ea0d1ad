"""The watchdog prints the stacks of a process that hangs, and is silent otherwise."""

import time

from jaxgpt.run.process import watchdog


def wait_for_a_step_that_never_comes(seconds):
  time.sleep(seconds)


def test_stacks_are_printed_while_nothing_moves_and_only_then(capfd):
  dog = watchdog.Watchdog(minutes=0.2 / 60)
  for _ in range(10):
    wait_for_a_step_that_never_comes(0.05)
    dog.alive()
  assert capfd.readouterr().err == ""
  wait_for_a_step_that_never_comes(0.5)
  dog.close()
  err = capfd.readouterr().err
  assert "Timeout" in err and "in wait_for_a_step_that_never_comes" in err
  wait_for_a_step_that_never_comes(0.3)
  assert capfd.readouterr().err == ""


def test_zero_minutes_are_never(capfd):
  dog = watchdog.Watchdog(minutes=0)
  dog.alive()
  dog.close()
  assert capfd.readouterr().err == ""
