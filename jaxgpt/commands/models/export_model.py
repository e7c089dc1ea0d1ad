"""`jaxgpt export`: writes a run's model in Hugging Face's format."""

import dataclasses
from typing import Any

from jaxgpt.commands import Command
from jaxgpt.config import options
from jaxgpt.config.options import checkpoint_step, option
from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  to: str = option(metavar="DIR", help="folder to make")
  dtype: str = option(
    "float32", choices=("float32", "bfloat16", "float16"), help="dtype of the weights in the files"
  )
  shard_gb: float = option(5.0, above=0, help="largest size of a file in GB")
  family: str | None = option(
    None, unset="the first that fits", help="model_type to export the model as"
  )
  format: str = option(
    "dense",
    choices=("dense", "compressed-tensors"),
    help="form of the weights: numbers, or the codes of a quantized run, as transformers and vLLM "
    "read them",
  )
  no_check: bool = option(False, help="do not compare the files with transformers")
  adapter: bool = option(
    False, help="write only the LoRA adapters, as peft loads them, instead of merging them"
  )
  base: str | None = option(
    None,
    metavar="ADDRESS",
    unset="the run's init_from",
    help="with --adapter: address of the base model",
  )

  def __post_init__(self) -> None:
    options.check(self)
    if self.adapter and self.format != "dense":
      raise UserError(f"--format={self.format} has no effect with --adapter; leave one of them out")


def run(args: ExportOptions) -> None:
  """Exports and prints the files and how well transformers agrees with them."""
  from jaxgpt.commands.actions import backend, import_export
  from jaxgpt.hf import parity

  backend.start()
  if args.adapter:
    files = import_export.export_adapter(
      args.workdir, args.to, step=args.step, base=args.base, family=args.family
    )
    print(f"wrote {args.to}: {', '.join(files)}")
    return
  family, files, certificate, notes = import_export.export_run(
    args.workdir,
    args.to,
    step=args.step,
    dtype=args.dtype,
    shard_bytes=int(args.shard_gb * 1e9),
    family=args.family,
    certify=not args.no_check,
    packed=args.format == "compressed-tensors",
  )
  print(f"wrote {args.to} ({family}, {args.dtype}): {', '.join(files)}")
  for line in [*notes, *_agreement(certificate)]:
    print(line)
  if problems := parity.problems(certificate):
    raise UserError(
      f"--to={args.to}: {'; '.join(problems)}. The folder is kept, {parity.TEXT} in it has the "
      "figures; do not publish it"
    )


def _agreement(certificate: dict[str, Any]) -> list[str]:
  """Lines on the certificate of parity."""
  lines = []
  if certificate["tokenizer"]["why_not"]:
    lines.append(f"no tokenizer files: {certificate['tokenizer']['why_not']}")
  if not certificate["checked"]:
    return [*lines, f"not checked against transformers: {certificate['why_not']}"]
  line = (
    f"against transformers {certificate['versions']['transformers']}: logits differ by at most "
    f"{certificate['logits']['max_abs']:.1e} of {certificate['logits']['scale']:.3g}"
  )
  if greedy := certificate.get("greedy"):
    line += f", greedy continuations are {'equal' if greedy['equal'] else 'NOT equal'}"
  return [*lines, line]


COMMAND = Command("export", "write a run's model in Hugging Face's format", ExportOptions, run)
