"""A stored budget of communication, so that a sharding rule that is lost is noticed."""

import json
import pathlib

from jaxgpt.errors import UserError

_TOLERANCE = 0.02  # compilers' versions shift a little between collectives


def budget(f):
  """{'opcode dtype': {'calls', 'bytes'}} of `report.figures`, hidden or not; small ones left out."""
  out = {}
  for row in f["collectives"]:
    entry = out.setdefault(f"{row['opcode']} {row['dtype']}", {"calls": 0, "bytes": 0.0})
    entry["calls"] += row["calls"]
    entry["bytes"] += row["bytes"]
  return {key: entry for key, entry in sorted(out.items()) if entry["bytes"] >= 1e5}


def differences(want, got):
  """Lines that name each collective whose calls or bytes differ from the budget."""
  for key in sorted(want.keys() | got.keys()):
    a, b = (side.get(key, {"calls": 0, "bytes": 0.0}) for side in (want, got))
    if a["calls"] != b["calls"] or abs(a["bytes"] - b["bytes"]) > _TOLERANCE * a["bytes"]:
      yield (f"{key}: {a['calls']} calls, {a['bytes'] / 1e9:.3f} GB in the budget; now "
             f"{b['calls']} calls, {b['bytes'] / 1e9:.3f} GB")


def check(path, f):
  """Compares a plan with a budget, or writes the budget where there is none.

  Args:
    path: a JSON file.
    f: from `report.figures`.

  Returns:
    An exit code: 1 where they differ.

  Raises:
    UserError: the file holds no budget.
  """
  path, got = pathlib.Path(path), budget(f)
  if not path.exists():
    path.write_text(json.dumps(got, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote the communication budget {path}")
    return 0
  try:
    want = json.loads(path.read_text(encoding="utf-8"))
    lines = list(differences(want, got))
  except (ValueError, AttributeError, TypeError, KeyError) as e:
    raise UserError(f"--golden={path} holds no communication budget; delete it to write it "
                    "anew") from e
  print(f"\ncommunication {'differs from' if lines else 'is within'} the budget {path}")
  print("\n".join(f"  {line}" for line in lines), end="\n" if lines else "")
  return 1 if lines else 0
