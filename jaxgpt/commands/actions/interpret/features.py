"""What `jaxgpt features` does."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxgpt.analysis import token_rows
from jaxgpt.analysis.interpret import explain, features, sparse_autoencoder
from jaxgpt.commands.actions import backend
from jaxgpt.data import pipeline
from jaxgpt.errors import UserError, first_line, printable
from jaxgpt.inference import load
from jaxgpt.storage import atomic, strict_json
from jaxgpt.text.tokenizers import base

HELD_OUT = 32  # rows of the validation split
_BEFORE, _AFTER = 12, 4  # tokens of a passage


def run(args: Any) -> None:
  """Runs the command. `args` are its options."""
  out = _folder(args.out)
  backend.start()
  run = load.load(args.workdir, args.step, devices=jax.local_devices()[:1])
  m = explain.of_run(run)
  layer = m.c.model.num_layers // 2 if args.layer is None else args.layer
  place = features.Place(args.tap, layer)
  features.check(m, place)
  _, data = token_rows.open_split(run, "train", data=args.data)
  _, other = token_rows.open_split(run, "validation", data=args.data)
  train, held_out = list(features.rows(data, args.rows)), list(features.rows(other, HELD_OUT))
  with jax.set_mesh(run.mesh):
    found = _fit(args, features.activations(m, train, place))
    scores = features.measure(m, found, held_out, place)
    best = features.examples(m, found, train, place, args.top)
  for line in _scores(scores, found.decoder.shape[0]):
    print(line)
  shown = sorted((f for f in range(len(best)) if best[f]), key=lambda f: -best[f][0].activation)
  for f in shown[: args.show]:
    print(f"feature {f}, active at {scores.density[f]:.2%} of the tokens:")
    for example, (name, text) in zip(best[f], _passages(data, run.tokenizer, best[f])):
      print(printable(f"  {example.activation:8.3f}  {name}, token {example.token}: {text}"))
  if out:
    records = (
      features.record(f, scores.density[f], of, list(_passages(data, run.tokenizer, of)))
      for f, of in enumerate(best)
    )
    atomic.write(out / "features.jsonl", "".join(strict_json.dumps(r) + "\n" for r in records))
    arrays: dict[str, Any] = {key: np.asarray(x) for key, x in found._asdict().items()}
    with (out / "autoencoder.npz").open("wb") as file:
      np.savez(file, **arrays)
    print(f"wrote {out}/autoencoder.npz and {out}/features.jsonl ({len(best):,} features)")


def _folder(out: str | None) -> epath.Path | None:
  """The folder to write, made if it does not exist."""
  if out is None:
    return None
  folder = epath.Path(out)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"--out={out}: can't be made ({first_line(e)}); name another folder") from e
  return folder


def _fit(args: Any, x_MD: np.ndarray) -> sparse_autoencoder.Autoencoder:
  """Trains the autoencoder, with a line now and then."""
  size = x_MD.shape[1]
  count = args.features or 8 * size
  print(f"{len(x_MD):,} activations of {size} dimensions; {count:,} features, {args.k} at a token")
  every = max(args.steps // 5, 1)

  def tell(step: int, loss: float) -> None:
    if step == 1 or step % every == 0:
      print(f"step {step}/{args.steps}: {loss:.2%} of the variance not explained", flush=True)

  how = sparse_autoencoder.Training(count, args.k, args.steps, args.batch, args.lr, args.seed)
  return sparse_autoencoder.fit(x_MD, how, tell)


def _scores(s: features.Scores, count: int) -> Iterator[str]:
  yield f"on {s.tokens:,} tokens of the validation split:"
  yield f"  variance explained  {s.explained:.2%}"
  yield (
    f"  loss recovered      {s.recovered:.2%} (the model {s.loss:.4f}, with the reconstruction "
    f"{s.replaced:.4f}, with zeros {s.zero:.4f} nats per prediction)"
  )
  yield f"  dead features       {s.dead:,} of {count:,}"


def _passages(
  data: pipeline.Batches, tokenizer: base.Tokenizer, found: Sequence[features.Example]
) -> Iterator[tuple[str, str]]:
  """(name of the document, passage with the token in ⟦ ⟧) of each example."""
  text = lambda ids: tokenizer.decode(ids, specials=True)
  for example in found:
    split = data.sources[example.source].split
    before, at, after = features.passage(split, example, _BEFORE, _AFTER)
    yield split.source_name(example.doc), f"{text(before)}⟦{text(at)}⟧{text(after)}"
