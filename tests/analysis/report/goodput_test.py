"""The account of wall time: all of it is in a part, and nothing is in two."""

import json

import pytest

from jaxgpt.analysis.report import goodput
from jaxgpt.run import run_lock
from jaxgpt.run.compression import record


def start(time, began=None, **seconds):
  account = {"account": {"began": f"2026-11-26T{began}Z", "seconds": seconds}} if began else {}
  return {"time": f"2026-11-26T{time}Z", **account}


def test_the_parts_of_two_starts():
  first = start("10:00:00", "10:00:20", steps=1000.0, input=10.0, compile=30.0, saving=60.0)
  second = start("10:30:00", "10:30:10", steps=200.0, input=0.0, compile=30.0, evaluation=5.0)
  found = goodput.of([first, second], {}, None)
  assert {part.name: part.seconds for part in found.parts} == {
    "training steps": 1200.0,
    "waiting for data": 10.0,
    "compiling": 60.0,
    "evaluation": 5.0,
    "saving": 60.0,
    "start-up": 30.0,
    "between starts": 1800.0 - 20.0 - 1100.0,
  }
  assert (
    found.seconds == 1800.0 + 10.0 + 235.0
  )  # from the first entry to the end of the last account
  assert found.goodput == pytest.approx(1200 / 2045)


def test_a_start_without_a_checkpoint_is_named():
  found = goodput.of([start("10:00:00"), start("10:01:00", "10:01:00", steps=60.0)], {}, None)
  assert {part.name: part.seconds for part in found.parts} == {
    "training steps": 60.0,
    "between starts": 60.0,
  }
  assert any("start 1 ended before its first checkpoint" in note for note in found.notes)


def test_kills_lose_what_came_after_the_last_checkpoint_until_the_last_sign_of_life():
  def launched(time, began=None, beat=None, **seconds):
    beats = {"last_beat": f"2026-11-26T{beat}Z"} if beat else {}
    return start(time, began, **seconds) | {"launched": f"2026-11-26T{time}Z", **beats}

  starts = [
    launched("10:00:00.000", "10:00:00", startup=10.0, steps=50.0),
    launched("10:02:00.000", beat="10:01:30.500") | {"repeats": 7},
    launched("10:03:00.000", "10:03:00", "10:02:40.000", startup=5.0, steps=25.0) | {"ended": True},
  ]
  found = goodput.of(starts, {}, None, last_beat=goodput.seconds_of("2026-11-26T10:03:31Z"))
  assert {part.name: part.seconds for part in found.parts} == {
    "training steps": 75.0,
    "start-up": 15.0,
    "lost": 30.5 + 40.0,
    "between starts": 29.5 + 20.0,
  }
  assert found.seconds == 210.0 and found.repeated == 7 and not found.notes
  killed = [starts[0], {**starts[2], "ended": False}]
  found = goodput.of(killed, {}, None, last_beat=goodput.seconds_of("2026-11-26T10:04:00Z"))
  assert {p.name: p.seconds for p in found.parts}["lost"] == 100.0 + 30.0


def launched(time, **seconds):
  return start(time, time, **seconds) | {"launched": f"2026-11-26T{time}Z"}


def test_a_start_that_a_rewind_ends_is_over_when_the_next_one_begins():
  """The process lives on, and its signs of life with it."""
  first = launched("10:00:00", startup=10.0, steps=50.0)
  second = launched("10:01:30", startup=20.0, steps=40.0)
  second |= {"last_beat": "2026-11-26T10:01:50Z", "ended": True}
  found = goodput.of([first, second], {}, None)
  assert {part.name: part.seconds for part in found.parts} == {
    "training steps": 90.0,
    "start-up": 30.0,
    "lost": 30.0,
  }


def test_work_of_a_run_that_goes_on_is_not_lost(tmp_path, monkeypatch):
  began = launched("10:00:00", startup=10.0, steps=50.0)
  monkeypatch.setattr(goodput.run_folder, "require_run", lambda folder: folder)
  monkeypatch.setattr(goodput.run_folder, "read_starts", lambda folder: [began])
  beat = goodput.seconds_of("2026-11-26T10:02:00Z")
  monkeypatch.setattr(goodput.run_lock, "last_beat", lambda folder: beat)
  of_parts = lambda: {part.name: part.seconds for part in goodput.of_run(tmp_path).parts}
  known = {"training steps": 50.0, "start-up": 10.0}
  with run_lock.RunLock(tmp_path) as lock:
    lock.take()
    assert of_parts() == known | {"not saved yet": 60.0}
  assert of_parts() == known | {"lost": 60.0}


def test_a_run_of_an_earlier_version_has_the_times_of_its_steps():
  record = {"kind": "train", "step_time": 2.0, "input_wait": 0.25}
  records = {("train", step): {**record, "step": step} for step in (10, 20)}
  until = goodput.seconds_of("2026-11-26T10:01:40+00:00")
  found = goodput.of([start("10:00:00")], records, until)
  assert {part.name: part.seconds for part in found.parts} == {
    "training steps": 30.0,
    "waiting for data": 10.0,
    "all else": 60.0,
  }
  assert "only the times of its steps were logged" in found.notes[0]
  nothing = goodput.of([start("?")], {}, None)
  assert nothing.goodput is None and nothing.notes == [
    "nothing is known of its time: it has no metrics"
  ]


def test_a_run_that_was_made_or_imported_says_that_nothing_trained_it(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  starts = tmp_path / "starts.jsonl"
  starts.write_text(json.dumps(start("10:00:00") | {"data_digest": ""}) + "\n")
  found = goodput.of_run(tmp_path, {}, goodput.seconds_of("2026-11-26T10:00:20Z"))
  assert found == ([], 1, 0, ["a published model was imported: nothing trained it"])
  starts.write_text(json.dumps(start("10:00:00") | {"data_digest": "1234"}) + "\n")
  record.write(tmp_path, {"made_by": "jaxgpt prune", "source": "runs/large"})
  found = goodput.of_run(tmp_path, {}, goodput.seconds_of("2026-11-26T10:00:20Z"))
  why = f"{tmp_path} was made by jaxgpt prune from runs/large: nothing trained it"
  assert found == ([], 1, 0, [why]) and found.goodput is None
