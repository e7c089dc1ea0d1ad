"""RUN/compression.json: how a run was made from another one by pruning or quantization.

Such a run has weights, but no optimizer state and no training steps of its own.
"""

import json
from typing import Any

from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.storage import atomic, strict_json

FILE = "compression.json"


def read(folder: epath.PathLike) -> dict[str, Any] | None:
  """The record of a run folder, or None if the run was trained or imported.

  Raises:
    UserError: The file is broken.
  """
  path = epath.Path(folder) / FILE
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_text())
    found["made_by"], found["source"]
    return found
  except (OSError, ValueError, TypeError, KeyError) as e:
    raise UserError(f"{path} is broken ({type(e).__name__}: {e}); make the run again") from e


def write(folder: epath.PathLike, record: dict[str, Any]) -> None:
  """Writes the record of a new run folder.

  Args:
    folder: The run folder.
    record: With the keys `made_by`, the command, and `source`, the other run's folder.
  """
  atomic.write(epath.Path(folder) / FILE, strict_json.dumps(record, indent=2) + "\n")


def has_no_steps(folder: epath.PathLike) -> str:
  """For a compressed run, a sentence that says so, to begin an error. '' for other runs.

  Args:
    folder: The run folder.
  """
  found = read(folder)
  if found is None:
    return ""
  return f"{folder} was made by {found['made_by']} from {found['source']}"
