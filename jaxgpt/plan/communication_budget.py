"""A stored budget of communication, so that a sharding rule that is lost is noticed.

By the compiler that wrote the budget a program moves exactly the same again: each kind of collective is
compared, its calls too. Another version of the compiler may split a gather into permutations or
merge two reductions, so of its programs all bytes together are compared; a lost rule
moves more, or less, than that tolerance.
"""

import json
import pathlib

from jaxgpt.config import installed
from jaxgpt.errors import UserError

_TOLERANCE = 0.02  # of the bytes of a kind; the small ones beside the weights vary
_OTHER_COMPILER = 0.1  # of all bytes
_NOTHING = {"calls": 0, "bytes": 0.0}


def compilers(gpu=False):
  """{package: version} of what compiles for TPUs, or for GPUs."""
  names = ("jax-cuda12-plugin", "jax-cuda13-plugin") if gpu else ("libtpu",)
  return {name: installed.version(name) for name in ("jaxlib", *names)}


def budget(f):
  """{'opcode dtype': {'calls', 'bytes'}} of `report.figures`, hidden or not; small ones left out."""
  out = {}
  for row in f["collectives"]:
    entry = out.setdefault(f"{row['opcode']} {row['dtype']}", dict(_NOTHING))
    entry["calls"] += row["calls"]
    entry["bytes"] += row["bytes"]
  return {key: entry for key, entry in sorted(out.items()) if entry["bytes"] >= 1e5}


def differences(want, got, same_compiler=True):
  """Lines that name what differs from the budget.

  Args:
    want, got: from `budget`.
    same_compiler: whether calls and kinds are to agree, or the bytes of all alone.
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


def check(path, f):
  """Compares a plan with a budget, or writes the budget where there is none.

  Args:
    path: a JSON file.
    f: from `report.figures`.

  Returns:
    An exit code: 1 where they differ.

  Raises:
    UserError: the file holds no budget, or cannot be read or written.
  """
  path, got, now = pathlib.Path(path), budget(f), compilers(f["estimate"] == "roofline")
  try:
    text = path.read_text(encoding="utf-8") if path.exists() else None
    if text is None:
      path.write_text(
        json.dumps({"compilers": now, "collectives": got}, indent=2) + "\n", encoding="utf-8"
      )
      print(f"\nwrote the communication budget {path}")
      return 0
  except OSError as e:
    raise UserError(f"--golden={path} cannot be read or written: {e.strerror}") from e
  try:
    stored = json.loads(text)
    then = dict(stored["compilers"])
    lines = list(differences(stored["collectives"], got, then == now))
  except (ValueError, AttributeError, TypeError, KeyError) as e:
    raise UserError(
      f"--golden={path} holds no communication budget; delete it to write it anew"
    ) from e
  print(f"\ncommunication {'differs from' if lines else 'is within'} the budget {path}")
  print("\n".join(f"  {line}" for line in lines), end="\n" if lines else "")
  if then != now:
    print(
      f"  the budget is of {_named(then)}, this program of {_named(now)}: all bytes are compared, "
      f"to {_OTHER_COMPILER:.0%}, but neither kinds nor calls; delete the file to write it anew"
    )
  return 1 if lines else 0


def _named(versions):
  return ", ".join(f"{name} {version}" for name, version in versions.items() if version)
