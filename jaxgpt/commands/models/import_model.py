"""`jaxgpt import`: makes a run from a model in Hugging Face's format."""

import dataclasses
from typing import Any

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
  source: str = option(
    flag="from",
    metavar="DIR",
    help="folder with config.json, safetensors files and the tokenizer's files",
  )
  workdir: str = option(help="run folder to make")
  dtype: str = option(
    "float32",
    choices=("float32", "bfloat16"),
    help="dtype of the run's computations; parameters are float32",
  )
  seq_len: int | None = integer(
    None,
    least=1,
    metavar="N",
    unset="the model's context, at most 2048",
    help="longest rows of evaluate and generate",
  )
  tokenizer: str | None = option(
    None, metavar="PATH", help="tokenizer file or folder, if the model's folder has none"
  )
  labels: str = option(
    "",
    metavar="A,B,C",
    unset="id2label of its config.json",
    help="names of a classifier's classes in the order of its outputs",
  )
  check: bool = option(
    False,
    help="compare outputs with transformers first (extra bench), and make no run if they differ",
  )


def run(args: ImportOptions) -> None:
  """Imports and says how to use the run."""
  from jaxgpt.commands.actions import backend, import_export
  from jaxgpt.run import run_folder
  from jaxgpt.text.tokenizers import labels

  backend.start()
  done = import_export.import_model(
    args.source,
    args.workdir,
    dtype=args.dtype,
    seq_len=args.seq_len,
    tokenizer=args.tokenizer,
    labels=labels.parse(args.labels),
    certify=args.check,
  )
  for note in done.notes:
    print(f"note: {note}")
  print(
    f"imported {args.source}: {done.family}, {done.parameters:,} parameters, "
    f"{done.bytes / 1e9:.2f} GB of files\n{args.workdir} is a run at step 0; use it with"
  )
  for line in next_commands(run_folder.read_config(args.workdir), args.workdir):
    print(f"  {line}")
  if done.certificate:
    figure = done.certificate["logits"]
    print(
      f"checked against transformers {done.certificate['versions']['transformers']}: outputs "
      f"differ by at most {figure['max_abs']:.1e} of {figure['scale']:.3g}"
    )


def next_commands(c: Any, workdir: str) -> list[str]:
  """The commands that use an imported run, without those that its model has no head for.

  Args:
    c: The run's config.
    workdir: The run folder.
  """
  from jaxgpt.data import layouts
  from jaxgpt.training import objectives, uses

  able = uses.of(c)
  train = (
    f"jaxgpt train --config=configs/finetune.py:{workdir} --config.data.path=DATA --workdir=NEW"
  )
  lines = []
  if "generate" in able:
    lines.append(f"jaxgpt generate --workdir={workdir} --prompt=TEXT")
  if c.model.head in ("classifier", "token_classifier"):
    lines.append(f"jaxgpt predict --workdir={workdir} --input=FILE --output=FILE")
  if "evaluate" in able:
    lines.append(f"jaxgpt evaluate --workdir={workdir} --data=DATA")
  if "train" in able:
    lines.append(train)
  elif c.model.causal:
    lines.append(f"{train} --config.model.head=lm  (it has no head: this one is new)")
  else:
    lines.append(
      f"{train} --config.model.head=classifier --config.objective.name=classification  "
      "(it has no head: this one is new)"
    )
  new_head = "objective.name=classification" in lines[-1]
  kind = "classification" if new_head else layouts.LAYOUTS[objectives.find(c).layout].kinds[0]
  option = "" if kind == "text" else f" --kind={kind}"
  lines.append(
    f"where DATA is made by jaxgpt data --out=DATA --tokenizer={workdir}/tokenizer{option} FILES"
  )
  return lines


COMMAND = Command("import", "make a run from a model in Hugging Face's format", ImportOptions, run)
