"""What `jaxgpt probe` does."""

from typing import Any

import jax
from etils import epath

from jaxgpt.analysis.interpret import explain, probe_layers
from jaxgpt.commands.actions import backend
from jaxgpt.data import source
from jaxgpt.errors import printable
from jaxgpt.inference import load
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib


def run(args: Any) -> None:
  """Runs the command. `args` are its options."""
  split = source.open_split(args.data, args.split)
  backend.start()
  run = load.load(args.workdir, args.step, devices=jax.local_devices()[:1])
  tokenizer = tokenizer_lib.load(epath.Path(args.data) / "tokenizer")
  probe_layers.check(split, tokenizer, run.tokenizer)
  classes = probe_layers.classes_of(split, args.tags)
  split.rows = run.c.model.vocab_size
  with jax.set_mesh(run.mesh):
    words = probe_layers.read(explain.of_run(run), split, args.words, classes)
    found = probe_layers.probe(words, args.seed)
  first, used = found[0], sorted(set(words.labels.tolist()))
  names = ", ".join(split.label_names[i] for i in used)
  print(
    printable(
      f"{len(words.labels):,} words of {words.documents:,} documents, {first.held_out:,} of them "
      f"held out; {len(used)} classes ({names}), the most frequent one has {first.majority:.1%}"
    )
  )
  if words.cut:
    print(f"{words.cut:,} words are beyond the context of the model, and left out")
  print("| after | accuracy | control task | selectivity |\n|---|---|---|---|")
  for i, p in enumerate(found):
    where = f"layer {i - 1}" if i else "embeddings"
    print(f"| {where} | {p.accuracy:.1%} | {p.control:.1%} | {p.selectivity:.1%} |")
