"""Communication budgets: the collectives of a step, stored in a file (`jaxgpt plan --golden`).

If a sharding rule is lost, a program still computes the right numbers, but it moves more bytes. A
budget notices that. For the compiler that wrote the budget, a program's collectives are exactly
reproducible, so their kinds and calls are compared. Another version of the compiler may split a
gather into permutations or merge two reductions, so only the sum of all bytes is compared. A lost
rule changes that sum by more than the tolerance.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from etils import epath

from jaxgpt.config import installed
from jaxgpt.errors import UserError
from jaxgpt.storage import strict_json

Budget: TypeAlias = dict[str, dict[str, Any]]  # {'opcode dtype': {'calls', 'bytes'}}

_TOLERANCE = 0.02  # for the bytes of a kind; small collectives that do not move weights vary
_OTHER_COMPILER = 0.1  # for the sum of all bytes
_SMALL = 1e5  # bytes; smaller entries are left out
_NOTHING = {"calls": 0, "bytes": 0.0}


def compilers(gpu: bool = False) -> dict[str, str | None]:
  """{package: version} of the compiler for TPUs, or for GPUs."""
  names = ("jax-cuda12-plugin", "jax-cuda13-plugin") if gpu else ("libtpu",)
  return {name: installed.version(name) for name in ("jaxlib", *names)}


def budget(f: Mapping[str, Any]) -> Budget:
  """The collectives of a step by kind, exposed and overlapped ones together.

  Args:
    f: From `report.figures`.
  """
  out: Budget = {}
  for row in f["collectives"]:
    entry = out.setdefault(f"{row['opcode']} {row['dtype']}", dict(_NOTHING))
    entry["calls"] += row["calls"]
    entry["bytes"] += row["bytes"]
  return {key: entry for key, entry in sorted(out.items()) if entry["bytes"] >= _SMALL}


def differences(want: Budget, got: Budget, same_compiler: bool = True) -> Iterator[str]:
  """Lines that name the differences from a budget.

  Args:
    want: The stored budget.
    got: The budget of the program at hand.
    same_compiler: Compares kinds and calls. False: compares only the sum of all bytes.
  """
  total = [sum(entry["bytes"] for entry in side.values()) for side in (want, got)]
  if not same_compiler:
    if abs(total[1] - total[0]) > _OTHER_COMPILER * total[0]:
      yield f"all collectives: {total[0] / 1e9:.3f} GB in the budget; now {total[1] / 1e9:.3f} GB"
    return
  for key in sorted(want.keys() | got.keys()):
    a, b = (side.get(key, _NOTHING) for side in (want, got))
    if a["calls"] != b["calls"] or abs(a["bytes"] - b["bytes"]) > _TOLERANCE * a["bytes"]:
      yield (
        f"{key}: {a['calls']} calls, {a['bytes'] / 1e9:.3f} GB in the budget; now "
        f"{b['calls']} calls, {b['bytes'] / 1e9:.3f} GB"
      )


def write(path: epath.PathLike, f: Mapping[str, Any]) -> None:
  """Writes the communication budget of a plan to a JSON file.

  Args:
    path: The file. An existing one is replaced.
    f: From `report.figures`.

  Raises:
    UserError: The file cannot be written.
  """
  stored = {"compilers": compilers(f["estimate"] == "roofline"), "collectives": budget(f)}
  try:
    pathlib.Path(path).write_text(strict_json.dumps(stored, indent=2) + "\n", encoding="utf-8")
  except OSError as e:
    raise UserError(f"--write-golden={path} cannot be written: {e.strerror}") from e
  print(f"\nwrote the communication budget {path}")


def check_exists(path: epath.PathLike) -> None:
  """Raises UserError if there is no such file, before minutes are spent on compiling."""
  if not pathlib.Path(path).is_file():
    raise UserError(f"--golden={path}: no such file; write it with --write-golden={path}")


def check(path: epath.PathLike, f: Mapping[str, Any]) -> int:
  """Compares a plan with a stored budget and prints the outcome.

  Args:
    path: A file from `write`.
    f: From `report.figures`.

  Returns:
    Exit code: 1 if they differ.

  Raises:
    UserError: The file is missing, cannot be read, or does not hold a budget.
  """
  check_exists(path)
  path, got, now = pathlib.Path(path), budget(f), compilers(f["estimate"] == "roofline")
  try:
    text = path.read_text(encoding="utf-8")
  except OSError as e:
    raise UserError(f"--golden={path} cannot be read: {e.strerror}") from e
  try:
    stored = json.loads(text)
    then = dict(stored["compilers"])
    lines = list(differences(stored["collectives"], got, then == now))
  except (ValueError, AttributeError, TypeError, KeyError) as e:
    raise UserError(
      f"--golden={path} is not a communication budget; write one with --write-golden={path}"
    ) from e
  print(f"\ncommunication {'differs from' if lines else 'is within'} the budget {path}")
  print("\n".join(f"  {line}" for line in lines), end="\n" if lines else "")
  if then != now:
    print(
      f"  the budget is from {_named(then)}, this program from {_named(now)}: only the sum of all "
      f"bytes is compared, to {_OTHER_COMPILER:.0%}; --write-golden={path} writes a new one"
    )
  return 1 if lines else 0


def _named(versions: Mapping[str, str | None]) -> str:
  return ", ".join(f"{name} {version}" for name, version in versions.items() if version)
