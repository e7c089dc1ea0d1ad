"""`jaxgpt import`: makes a run from a model in Hugging Face's format."""

import dataclasses

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


def run(args: ImportOptions) -> None:
  """Imports and says how to use the run."""
  from jaxgpt.commands.actions import backend, import_export

  backend.start()
  done = import_export.import_model(
    args.source, args.workdir, dtype=args.dtype, seq_len=args.seq_len, tokenizer=args.tokenizer
  )
  print(
    f"imported {args.source}: {done.family}, {done.parameters:,} parameters, "
    f"{done.bytes / 1e9:.2f} GB of files\n{args.workdir} is a run at step 0: generate and "
    f"evaluate take it as it is; train from it with --config.init_from={args.workdir}"
  )


COMMAND = Command("import", "make a run from a model in Hugging Face's format", ImportOptions, run)
