"""Writes a sample data set, see the package."""

import argparse
import random
import sys
from collections.abc import Callable, Sequence

from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.storage import atomic, strict_json
from jaxgpt.tasks.sample_data import (
  docstrings,
  numbers,
  questions,
  retrieval,
  sentiment,
  tagging,
)
from jaxgpt.tasks.sample_data.grammar import Row

SPLITS = ("train", "validation", "test")
# task -> (rows of a split, rows of each split at most)
DATA: dict[str, tuple[Callable[[random.Random, str, int], list[Row]], tuple[int, int, int]]] = {
  "sentiment": (sentiment.make, (6000, 400, 1000)),
  "tagging": (tagging.make, (6000, 400, 1000)),
  "questions": (questions.make, (9000, 400, 1000)),
  "generated_answers": (
    lambda rng, split, count: questions.generated(questions.make(rng, split, count)),
    (9000, 400, 1000),
  ),
  "retrieval": (retrieval.make, (6500, 500, 1000)),
  "translation": (numbers.make, (20000, 400, 1000)),
  "summarization": (docstrings.make, (40000, 400, 1000)),
  "chat": (numbers.chats, (8000, 400, 1000)),
}


def rows(task: str, split: str) -> list[Row]:
  """The rows of a split, the same on every machine with the same Python.

  Args:
    task: A key of `DATA`.
    split: One of `SPLITS`.
  """
  make, counts = DATA[task]
  return make(random.Random(f"{task} {split}"), split, counts[SPLITS.index(split)])


def main(argv: Sequence[str] | None = None) -> int:
  """Writes the three files. Returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m jaxgpt.tasks.sample_data")
  parser.add_argument("--task", required=True, choices=DATA, help="data set")
  parser.add_argument("--out", required=True, help="folder to write")
  args = parser.parse_args(argv)
  folder = epath.Path(args.out)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
      found = rows(args.task, split)
      if not found:
        raise UserError(f"--task={args.task}: this Python has no {split} rows for it")
      path = folder / f"{split}.jsonl"
      atomic.write(path, "".join(strict_json.dumps(row) + "\n" for row in found))
      print(f"{path}: {len(found):,} rows")
  except OSError as e:
    print(f"error: --out={args.out} can't be written ({e.strerror or e})", file=sys.stderr)
    return 2
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return e.exit_code
  return 0


if __name__ == "__main__":
  sys.exit(main())
