"""Predictions for a file: in input order, by several processes, resumable to the byte.

    INPUT ──rows──> chunk 0, chunk 1, chunk 2, …          1,024 rows each
                    process 0  process 1  process 0        each on its own devices
    OUTPUT.parts/   0-DIGEST   1-DIGEST   …               one file per chunk, written atomically
    OUTPUT          all parts in order, once all are there

A part is named after its chunk and the digest of the chunk's rows. A start computes the parts that
are not there, so that neither a kill nor a change of the number of processes changes the output. A
process holds the whole model on its own devices: the batches, and with them the last bits of a
number, do not depend on how many processes there are.
"""

import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import jax
from etils import epath

from jaxgpt.errors import UserError, printable
from jaxgpt.parallel import distributed
from jaxgpt.storage import atomic, strict_json
from jaxgpt.tasks.predict.protocol import Prediction, Predictor
from jaxgpt.tasks.predict.rows import Row
from jaxgpt.text.readers.documents import EXAMPLES
from jaxgpt.tree import PyTree

CHUNK = 1024  # rows
PARTS = ".parts"  # suffix of the folder of finished chunks
_JOB = "job.json"
_OUTPUT = "output"  # the whole output, before it gets its name
_PART = re.compile(r"[0-9]{6,}-[0-9a-f]{16}\.jsonl")


class Account(NamedTuple):
  """The rows of a job.

  Attributes:
    rows: Rows of the input.
    failed: Rows without a prediction.
    examples: The first of them: 'reviews.jsonl:7: why'.
  """

  rows: int
  failed: int
  examples: list[str]

  def lines(self) -> list[str]:
    """A report for the user."""
    out = [f"{self.rows:,} rows, {self.rows - self.failed:,} predictions"]
    if self.failed:
      out[0] += f"; {self.failed:,} rows without one, such as"
      out += [f"  {printable(example)}" for example in self.examples]
    return out


def predict_rows(
  predictor: Predictor, params: PyTree, rows: Sequence[Row], chunk: int = 0
) -> list[Prediction]:
  """The predictions for a chunk of rows, in their order.

  Args:
    predictor: From `predictor.make`.
    params: All weights.
    rows: The rows. One with a problem gets {'error': …}.
    chunk: The chunk's number.
  """
  there = [i for i, row in enumerate(rows) if not row.problem]
  found: list[Prediction] = [{"error": row.problem} for row in rows]
  for i, result in zip(there, predictor(params, [rows[i] for i in there], chunk), strict=True):
    found[i] = {"error": str(result)} if isinstance(result, UserError) else result
  return found


def line(row: Row, prediction: Prediction) -> str:
  """A line of the output: the row's place and id, then the prediction."""
  own = {"row": row.where} | ({"id": row.id} if row.id else {})
  text = strict_json.dumps(own | prediction, ensure_ascii=False)
  # Some readers take these for the end of a line. They can only be in strings, where JSON has
  # escapes for them.
  for mark in ("\x85", "\u2028", "\u2029"):
    text = text.replace(mark, f"\\u{ord(mark):04x}")
  return text + "\n"


def chunks(rows: Iterable[Row], size: int = CHUNK) -> Iterator[list[Row]]:
  """Yields the rows in chunks."""
  left = iter(rows)
  while chunk := list(itertools.islice(left, size)):
    yield chunk


def stream(
  predict: Callable[[Sequence[Row], int], list[Prediction]], rows: Iterable[Row], out: TextIO
) -> Account:
  """Writes predictions to a stream, chunk by chunk. Arguments as in `run`."""
  failures = _Failures()
  for number, chunk in enumerate(chunks(rows)):
    for row, prediction in zip(chunk, predict(chunk, number), strict=True):
      failures.add(row.where, prediction)
      out.write(line(row, prediction))
    out.flush()
  return failures.account()


def run(
  predict: Callable[[Sequence[Row], int], list[Prediction]],
  rows: Iterable[Row],
  output: epath.PathLike,
  job: Mapping[str, Any],
  report: Callable[[str], None] = lambda text: None,
  count: Callable[[int], None] | None = None,
) -> Account:
  """Writes the predictions for all rows. All processes must call it.

  Args:
    predict: (rows of a chunk, its number) -> their predictions, on this process's devices.
    rows: The rows, the same in all processes.
    output: The file to write.
    job: Everything besides the rows that the predictions depend on, as plain JSON.
    report: Called with a line on the progress.
    count: Called with the rows done so far. None: `report` gets a line on them.

  Returns:
    The account, in the first process. Others get one of no rows.

  Raises:
    UserError: The folder of parts is of another job, or a file can't be written.
  """
  output = epath.Path(output)
  folder = output.with_name(output.name + PARTS)
  try:
    _enter(folder, output, job, report)
    count = count or (lambda rows: report(f"{rows:,} rows"))
    names = _fill(predict, rows, folder, count)
    distributed.check_same("the digest of the input", digest(names), "give all the same input")
    distributed.barrier("predictions")
    account = Account(0, 0, [])
    if distributed.is_first():
      account = _assemble(folder, names, output)
    distributed.barrier("output")
    return account
  except OSError as e:
    raise UserError(
      f"--output={output} can't be written ({e.strerror or e}); make room or choose another file, "
      "then run the same command again to continue"
    ) from e


def _enter(
  folder: epath.Path, output: epath.Path, job: Mapping[str, Any], report: Callable[[str], None]
) -> None:
  """Makes the folder of parts, or checks that it is of this job."""
  if distributed.is_first():
    text = strict_json.dumps(job, indent=1, sort_keys=True)
    path = folder / _JOB
    if path.exists():
      _check_same_job(folder, json.loads(path.read_text()), json.loads(text))
      report(f"goes on with {folder}")
    else:
      if output.is_dir():
        raise UserError(f"--output={output} is a folder; name a file in it")
      if output.exists():
        report(f"{output} will be replaced")
      folder.mkdir(parents=True, exist_ok=True)
      _clear(folder)
      atomic.write(path, text)
  distributed.barrier("parts")


def _clear(folder: epath.Path) -> None:
  """Deletes parts without a job, which a kill left between the two: they may be of any job."""
  for path in list(folder.iterdir()):
    if path.name == _OUTPUT or _PART.fullmatch(path.name):
      path.unlink()


def _check_same_job(folder: epath.Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
  for key in [*new, *old]:
    if old.get(key) != new.get(key):
      raise UserError(
        f"{folder} has parts of another prediction: {key} was {old.get(key)!r}, is "
        f"{new.get(key)!r}; give the old value to go on, or delete that folder"
      )


def _fill(
  predict: Callable[[Sequence[Row], int], list[Prediction]],
  rows: Iterable[Row],
  folder: epath.Path,
  count: Callable[[int], None],
) -> list[str]:
  """Computes this process's parts that are not there yet: the names of all parts."""
  me, processes = jax.process_index(), jax.process_count()
  names, done = list[str](), 0
  there = {path.name for path in folder.iterdir()}
  for number, chunk in enumerate(chunks(rows)):
    names.append(f"{number:06}-{digest(map(identity, chunk))[:16]}.jsonl")
    done += len(chunk)
    if number % processes == me and names[-1] not in there:
      found = predict(chunk, number)
      atomic.write(
        folder / names[-1], "".join(line(r, p) for r, p in zip(chunk, found, strict=True))
      )
      count(done)
  return names


def identity(row: Row) -> str:
  """A text that differs for rows that differ."""
  return strict_json.dumps([row.where, dict(row.fields), row.id, row.problem])


def digest(texts: Iterable[str]) -> str:
  """SHA-256 of some texts in a row, in hexadecimal."""
  found = hashlib.sha256()
  for text in texts:
    found.update(text.encode() + b"\n")
  return found.hexdigest()


def _assemble(folder: epath.Path, names: Sequence[str], output: epath.Path) -> Account:
  """Joins the parts to the output and deletes them."""
  failures = _Failures()
  whole = folder / _OUTPUT
  with whole.open("wb") as f:
    for name in names:
      data = (folder / name).read_bytes()
      f.write(data)
      for text in data.decode().split("\n")[:-1]:
        failures.add_line(text)
  if os.path.exists(whole):  # a local file; an object in a bucket is copied
    os.replace(whole, output)
  else:
    whole.copy(output, overwrite=True)
  folder.rmtree()
  return failures.account()


class _Failures:
  """Counts rows, and those without a prediction."""

  def __init__(self) -> None:
    self._rows, self._failed, self._examples = 0, 0, list[str]()

  def add(self, where: str, prediction: Mapping[str, Any]) -> None:
    self._rows += 1
    if "error" in prediction:
      self._failed += 1
      if len(self._examples) < EXAMPLES:
        self._examples.append(f"{where}: {prediction['error']}")

  def add_line(self, text: str) -> None:
    # Few lines are failures, so that the others need not be parsed.
    found = json.loads(text) if '"error": ' in text else {}
    self.add(found.get("row", ""), found)

  def account(self) -> Account:
    return Account(self._rows, self._failed, self._examples)


def say(text: str) -> None:
  """A line on standard error, from the first process."""
  if distributed.is_first():
    print(text, file=sys.stderr, flush=True)
