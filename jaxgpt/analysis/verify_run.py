"""Whether a run folder is as the run wrote it: its files, its metrics and its checkpoints."""

from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from jaxgpt.analysis import checkpoint_files
from jaxgpt.errors import UserError
from jaxgpt.run import run_folder
from jaxgpt.run.provenance import seal


class Report(NamedTuple):
  """The result for one part of a run folder.

  Attributes:
    part: Such as 'checkpoints/8', or 'files' for all that is no checkpoint.
    problems: What is wrong with it, by file or array. [] if nothing is.
    note: What could not be verified, or ''.
  """

  part: str
  problems: list[str]
  note: str = ""

  def lines(self) -> list[str]:
    """Lines for the user."""
    head = "damaged" if self.problems else "ok"
    note = f" ({self.note})" if self.note else ""
    return [f"{head:<8} {self.part}{note}", *(f"         {problem}" for problem in self.problems)]


def verify(folder: epath.PathLike, step: int | None = None) -> Iterator[Report]:
  """Verifies a run folder. Reads all of it, and writes nothing.

  Args:
    folder: The run folder.
    step: Step of the only checkpoint to verify. None: all of the folder.

  Yields:
    The files of the run, then each checkpoint.

  Raises:
    UserError: There is no run, or no checkpoint of this step.
  """
  folder = epath.Path(folder)
  if step is None:
    yield _files(folder)
  for saved, problems in checkpoint_files.verified(folder, step):
    yield Report(f"{saved.folder}/{saved.step}", problems, "" if problems else _unknown(saved))


def _files(folder: epath.Path) -> Report:
  run_folder.require_run(folder)
  problems = [f"{damage.file} {damage.problem}" for damage in seal.check(folder)]
  if not problems:
    try:
      run_folder.read_config(folder)
      run_folder.read_starts(folder)
    except UserError as e:
      problems = [str(e)]
  unsealed = not (folder / seal.FILE).exists()
  note = f"{seal.FILE} is not there: an earlier version wrote this folder" if unsealed else ""
  return Report("files", problems, "" if problems else note)


def _unknown(saved: checkpoint_files.Saved) -> str:
  try:
    known = bool(saved.meta().get("digests"))
  except ValueError:
    known = True
  return "" if known else "it can be read, but has no digests: an earlier version saved it"
