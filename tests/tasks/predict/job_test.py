"""The output of a job: in input order, the same after kills and for any number of processes."""

import json
import random

import jax
import pytest
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.storage import atomic
from jaxgpt.tasks.predict import job
from jaxgpt.tasks.predict.rows import Row

ROWS = [
  Row(
    f"in.jsonl:{n}", {"text": f"row {n}\u2028"} if n % 7 else {}, f"id{n}", "" if n % 7 else "bad"
  )
  for n in range(53)
]
JOB = {"step": 3}


def predict(chunk, number):
  return [
    {"error": row.problem} if row.problem else {"label": row.fields["text"], "chunk": number}
    for row in chunk
  ]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(job.chunks, "__defaults__", (5,))


@pytest.fixture
def whole(tmp_path):
  job.run(predict, ROWS, tmp_path / "whole.jsonl", JOB)
  return (tmp_path / "whole.jsonl").read_bytes()


def test_lines_are_in_order_and_failures_are_counted(whole, tmp_path):
  lines = whole.decode().splitlines()  # none of them holds a line separator
  found = [json.loads(line) for line in lines]
  assert [line["row"] for line in found] == [row.where for row in ROWS]
  assert found[1] == {"row": "in.jsonl:1", "id": "id1", "label": "row 1\u2028", "chunk": 0}
  assert found[52]["chunk"] == 10 and found[7]["error"] == "bad"
  account = job.run(predict, ROWS, tmp_path / "again.jsonl", JOB)
  assert (account.rows, account.failed) == (53, 8) and account.examples[0] == "in.jsonl:0: bad"
  assert "45 predictions; 8 rows without one" in account.lines()[0]
  assert [p.name for p in tmp_path.iterdir() if "parts" in p.name] == []


class Killed(BaseException):
  pass


def test_an_output_is_the_same_after_kills_at_any_moment(whole, tmp_path, monkeypatch):
  """A kill may come while a chunk is computed, while its part is written, and at the end."""
  rng = random.Random(0)
  moments = rng.sample(range(60), 10)
  calls, computed = 0, []
  real = atomic.write

  def tick():
    nonlocal calls
    calls += 1
    if calls in moments:
      raise Killed

  def slow(chunk, number):
    tick()
    computed.append(number)
    return predict(chunk, number)

  def write(path, content):
    tick()
    real(path, content)
    tick()

  monkeypatch.setattr(atomic, "write", write)
  monkeypatch.setattr(job.os, "replace", lambda *args: (tick(), os_replace(*args)))
  for _ in range(30):
    try:
      job.run(slow, ROWS, tmp_path / "out.jsonl", JOB)
      break
    except Killed:
      pass
  assert calls > max(moments) - 30 and (tmp_path / "out.jsonl").read_bytes() == whole
  assert len(computed) < 22  # what was done was not done again


def test_parts_that_a_kill_left_without_their_job_are_not_used(tmp_path, monkeypatch):
  output, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"

  def killed(self, *args):
    (self / "job.json").unlink()
    raise Killed

  with monkeypatch.context() as patched:
    patched.setattr(type(epath.Path(tmp_path)), "rmtree", killed)
    with pytest.raises(Killed):
      job.run(predict, ROWS[:3], output, JOB)
  assert list(folder.iterdir())
  (folder / "notes.txt").write_text("of the user")
  job.run(lambda chunk, n: [{"label": "other"} for _ in chunk], ROWS[:3], output, {"step": 4})
  assert [json.loads(line)["label"] for line in output.read_text().splitlines()] == ["other"] * 3


os_replace = job.os.replace


def test_two_processes_write_the_file_of_one(whole, tmp_path, monkeypatch):
  output = epath.Path(tmp_path) / "two.jsonl"
  folder = epath.Path(tmp_path) / "two.jsonl.parts"
  job._enter(folder, output, JOB, lambda text: None)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  done = {0: [], 1: []}
  for me in (1, 0):
    monkeypatch.setattr(jax, "process_index", lambda me=me: me)
    names = job._fill(
      lambda chunk, n, me=me: done[me].append(n) or predict(chunk, n),
      ROWS,
      folder,
      lambda text: None,
    )
  assert done == {0: [0, 2, 4, 6, 8, 10], 1: [1, 3, 5, 7, 9]}
  job._assemble(folder, names, output)
  assert output.read_bytes() == whole


def test_parts_of_another_job_are_refused_and_those_of_other_rows_are_not_used(whole, tmp_path):
  output = tmp_path / "out.jsonl"
  done = []

  def stops(chunk, number):
    if number == 2:
      raise Killed
    done.append(number)
    return predict(chunk, number)

  with pytest.raises(Killed):
    job.run(stops, ROWS, output, JOB)
  with pytest.raises(UserError, match="step was 3, is 4"):
    job.run(predict, ROWS, output, {"step": 4})
  changed = [ROWS[0]._replace(problem="other"), *ROWS[1:]]
  numbers = []
  job.run(lambda chunk, n: numbers.append(n) or predict(chunk, n), changed, output, JOB)
  assert done == [0, 1] and 0 in numbers and 1 not in numbers
  assert json.loads(output.read_text().split("\n")[0])["error"] == "other"


def test_a_stream_has_the_same_lines(whole, capsys):
  import sys

  account = job.stream(predict, ROWS, sys.stdout)
  assert capsys.readouterr().out.encode() == whole and account.failed == 8
