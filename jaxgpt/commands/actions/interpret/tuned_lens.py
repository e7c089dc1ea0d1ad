"""What `jaxgpt lens` does."""

import pathlib
from typing import Any

import jax

from jaxgpt.analysis.compression import calibration
from jaxgpt.analysis.interpret import explain, lens_file, tuned_lens
from jaxgpt.commands.actions import backend
from jaxgpt.errors import UserError
from jaxgpt.inference import load

HELD_OUT = 32  # rows of the validation split


def run(args: Any) -> None:
  """Runs the command. `args` are its options."""
  out = pathlib.Path(args.out) if args.out else None
  if out and (not out.parent.is_dir() or out.is_dir()):
    raise UserError(f"--out={out}: give the name of a file in a folder that exists")
  backend.start()
  run = load.load(args.workdir, args.step, devices=jax.local_devices()[:1])
  tuned_lens.check(run.c.model)
  m = explain.of_run(run)
  train, _ = calibration.rows(run, args.data, "train", args.rows)
  held_out, _ = calibration.rows(run, args.data, "validation", HELD_OUT)
  every = max(args.steps // 5, 1)

  def tell(step: int, loss: float) -> None:
    if step == 1 or step % every == 0:
      print(f"step {step}/{args.steps}: KL {loss:.4f} nats per token", flush=True)

  with jax.set_mesh(run.mesh):
    found = tuned_lens.fit(m.model, m.params, train, args.steps, args.lr, tell)
    scores = tuned_lens.compare(m.model, m.params, found, held_out)
  print("| before layer | KL of the logit lens | KL of the tuned lens |\n|---|---|---|")
  for layer, (plain, tuned) in enumerate(zip(scores.logit, scores.tuned, strict=True)):
    print(f"| {layer} | {plain:.4f} | {tuned:.4f} |")
  where = out or lens_file.path_of(args.workdir, run.step)
  lens_file.write(where, found, run)
  print(f"wrote {where}")
