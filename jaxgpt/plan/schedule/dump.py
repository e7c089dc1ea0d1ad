"""The folder into which libtpu writes the final schedule of each kernel that it compiles.

libtpu reads its flags once, while it is loaded. A process that loaded it before, another compiler
and a program from JAX's compilation cache leave no schedules, and then `of_kernels` finds none.
"""

import atexit
import contextlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator

_VARIABLE = "LIBTPU_INIT_ARGS"
_TO = "--xla_jf_dump_to="
_WHAT = ("--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=final_bundles")
_ENDING = "final_bundles.txt"
# libtpu cuts a long name, and writes a number of at least 15 digits after it.
_FILE = re.compile(rf"\d+-((.+)-\d{{15,}}|.+)-\d+-{re.escape(_ENDING)}")
_folder: pathlib.Path | None = None


def flags(folder: pathlib.Path) -> tuple[str, ...]:
  """The flags with which libtpu writes schedules to a folder."""
  return f"{_TO}{folder}", *_WHAT


@contextlib.contextmanager
def requested() -> Iterator[None]:
  """Asks libtpu for schedules if it is loaded inside the context.

  The variable is restored afterwards: compiled steps and JAX's cache compare it. A user's own
  `--xla_jf_dump_to` is kept, and its files are read.
  """
  global _folder
  before = os.environ.get(_VARIABLE)
  given = re.search(rf"{_TO}(\S+)", before or "")
  if given:
    _folder = pathlib.Path(given[1])
  elif _folder is None:
    _folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxgpt_schedules_"))
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)
  added = _WHAT if given else flags(_folder)
  os.environ[_VARIABLE] = " ".join((*([before] if before else []), *added))
  try:
    yield
  finally:
    if before is None:
      del os.environ[_VARIABLE]
    else:
      os.environ[_VARIABLE] = before


def clear() -> None:
  """Deletes the schedules of earlier programs, unless the user asked for them."""
  if _folder and _folder.name.startswith("jaxgpt_schedules_"):
    for path in _folder.glob("*"):
      path.unlink(missing_ok=True)


def of_kernels(names: Iterable[str], folder: pathlib.Path | None = None) -> dict[str, str]:
  """Texts of the latest schedules by the name of their instruction.

  Args:
    names: Names of instructions in the compiled program, such as 'splash_mha_fwd.3'.
    folder: Where another process wrote its schedules. None: the folder of this one.
  """
  wanted, folder = set(names), folder or _folder
  out: dict[str, str] = {}
  for path in sorted(folder.glob(f"*{_ENDING}")) if folder and wanted else ():
    # TIME-INSTRUCTION-PASS-final_bundles.txt; the analysis of a schedule has another pass name.
    found = _FILE.fullmatch(path.name)
    if not found:
      continue
    fits = [n for n in wanted if n == found[1] or (found[2] and n.startswith(found[2]))]
    # A cut name may fit several kernels. Only copies of one, such as f.1 and f.2, share a schedule.
    if len({name.rsplit(".", 1)[0] for name in fits}) == 1:
      out |= dict.fromkeys(fits, path.read_text(errors="replace"))
  return out
