"""What `jaxgpt explain` does."""

import pathlib
from typing import Any

import jax

from jaxgpt.analysis.interpret import explain, lens_file, page
from jaxgpt.commands.actions import backend
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.storage import atomic


def run(args: Any) -> None:
  """Runs the command. `args` are its options."""
  out = pathlib.Path(args.out)
  if not out.parent.is_dir() or out.is_dir():
    raise UserError(f"--out={out}: give the name of a file in a folder that exists")
  backend.start()
  loaded = load.load(args.workdir, args.step, devices=jax.local_devices()[:1])
  tuned, note = (
    (lens_file.read(args.lens, loaded, args.workdir), "")
    if args.lens
    else lens_file.find(args.workdir, loaded)
  )
  with jax.set_mesh(loaded.mesh):
    found = explain.explain(loaded, args.prompt, args.corrupted, args.top, tuned)
  text = page.render(found)
  atomic.write(out, text)
  for line in [*lines(found), *([note] if note else [])]:
    print(line)
  print(f"wrote {out} ({len(text.encode()) / 1e3:,.0f} kB)")


def lines(found: dict[str, Any]) -> list[str]:
  """What a page says, in short.

  Args:
    found: From `explain.explain`.
  """
  out = []
  if found["predictions"]:
    where, at = _place(found)
    top = ", ".join(f"{name!r} {p:.1%}" for name, p in found["predictions"][at]["top"][:3])
    out.append(f"{where}: {top}")
    out.append(f"lens, from embeddings to the last layer: {_through(found['lens'], at)}")
    if found["tuned_lens"]:
      out.append(f"tuned lens ({found['tuned_lens']['file']}): {_through(found['tuned_lens'], at)}")
  if found["components"]:
    out.append(f"components sum to the logits within {found['components']['gap']}")
  if g := found["gradients"]:
    trust = "" if g["complete"] else ": too much to trust them"
    out.append(
      f"integrated gradients of {g['right']!r} less {g['wrong']!r}: sum within {g['error']} of the "
      f"difference of the logits{trust}"
    )
  if t := found["trace"]:
    row = t["positions"][0]
    best = max(range(len(row)), key=row.__getitem__)
    out.append(
      f"causal tracing: {found['tokens'][best]!r} (token {best}) restores {row[best]:.0%} of the "
      f"difference between {t['right']!r} and {t['wrong']!r}"
    )
  return [*out, *(f"left out: {words}" for words in found["left_out"])]


def _through(found: dict[str, Any], at: int) -> str:
  """The likeliest token of each layer of a lens at a position."""
  return ", ".join(f"{of[at][0][0]!r} {of[at][0][1]:.0%}" for of in found["top"])


def _place(found: dict[str, Any]) -> tuple[str, int]:
  """(where the prediction is that the lines are about, its index)."""
  if found["kind"] == "rows":
    return "of the whole text", 0
  at = found["gradients"]["position"]
  word = "after" if found["kind"] == "causal" else "at"
  return f"{word} {found['tokens'][at]!r} (token {at})", at
