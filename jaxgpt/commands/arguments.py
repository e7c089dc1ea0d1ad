"""The arguments of the commands, each function for an argparse parser `p`."""

import argparse


def count(least):
  """An argument type: an integer in [least, 2^31)."""

  def parse(text):
    value = int(text)
    if not least <= value < 2**31:
      raise argparse.ArgumentTypeError(f"{text} must be at least {least}, and below 2^31")
    return value

  parse.__name__ = "integer"
  return parse


def add_data(p):
  """The arguments of `jaxgpt data`."""
  p.add_argument(
    "paths",
    nargs="+",
    metavar="PATH",
    help="files, folders, glob patterns or URLs (s3://, gs://, hf://, https://)",
  )
  p.add_argument("--out", required=True, metavar="DIR", help="folder to write")
  p.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote")
  _add_reading(p.add_argument_group("what is read"))
  _add_cleaning(p.add_argument_group("what is left out"))
  _add_tokens(p.add_argument_group("splits and tokens"))
  g = p.add_argument_group("who does the work")
  g.add_argument(
    "--executor",
    default="local",
    metavar="KIND",
    help="process (this one) | local (all cores) | slurm | ray",
  )
  g.add_argument(
    "--workers",
    type=count(0),
    default=0,
    help="tasks at the same time; 0: one a core, or as many as a cluster takes",
  )
  g.add_argument(
    "--executor-option",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="for datatrove's executor of this kind, such as partition=cpu and "
    "time=20:00:00 of slurm; may be repeated",
  )
  g.add_argument(
    "--task-bytes",
    type=count(1),
    default=16_000_000,
    help="inputs are divided into tasks of about so many bytes, 512 at most",
  )


def add_inspect(p):
  """The arguments of `jaxgpt data inspect`."""
  p.add_argument("workdir", metavar="RUN", help="run folder")
  p.add_argument("--step", type=count(0), required=True, help="which step; the first is 0")
  p.add_argument("--row", type=count(0), help="which row of it; default: all")
  p.add_argument("--data", metavar="DIR", help="where the run's data is now, if it was moved")
  _add_chars(p)


def add_show(p):
  """The arguments of `jaxgpt data show`."""
  p.add_argument(
    "path", metavar="DIR", help="prepared folder; several, separated by commas, are mixed"
  )
  p.add_argument(
    "--split", default="train", choices=("train", "validation", "test"), help="which documents"
  )
  p.add_argument("--rows", type=count(1), default=3, help="rows to show")
  p.add_argument("--seed", type=count(0), default=0, help="of the draw")
  p.add_argument("--seq-len", type=count(1), default=256, help="places in a row")
  _add_chars(p)


def _add_chars(p):
  p.add_argument("--chars", type=count(0), default=300, help="of each text to show; 0: all")


def _add_reading(g):
  g.add_argument(
    "--kind",
    default="text",
    metavar="KIND",
    help="text | classification | seq2seq | chat | preference",
  )
  g.add_argument(
    "--field",
    action="append",
    default=[],
    metavar="NAME=COLUMN",
    help="column of text, id, text_pair, label, input, target, messages, prompt, "
    "chosen or rejected, where it isn't called so; may be repeated",
  )
  g.add_argument(
    "--format", help="of all files: text, jsonl, csv, parquet, …; default: by the suffix of each"
  )
  g.add_argument(
    "--exclude",
    action="append",
    default=[],
    metavar="PATTERN",
    help="shell pattern of files or folders to leave out; may be repeated",
  )
  g.add_argument(
    "--max-record-bytes",
    type=count(1),
    default=64 << 20,
    help="longer records are dropped, longer text files cut",
  )
  g.add_argument(
    "--max-errors", type=count(0), help="broken records after which to give up; default: never"
  )
  g.add_argument(
    "--examples",
    type=count(0),
    default=5,
    metavar="N",
    help="how many dropped documents are named, of each rule",
  )


def _add_cleaning(g):
  g.add_argument(
    "--clean",
    action="append",
    default=[],
    metavar="STEP[:KEY=VALUE,…]",
    help="a cleaning step, such as ftfy, html, length:min_chars=200, gopher_quality; "
    "may be repeated, and is carried out in order",
  )
  g.add_argument(
    "--dedup",
    action="append",
    default=[],
    metavar="exact|near[:KEY=VALUE,…]",
    help="remove duplicates, near ones such as near:threshold=0.65; may be repeated",
  )
  g.add_argument(
    "--decontaminate",
    action="append",
    default=[],
    metavar="PATH|held-out",
    help="remove training documents that share runs of words with these files, or "
    "with the held-out splits; may be repeated",
  )
  g.add_argument(
    "--decontaminate-options",
    default="",
    metavar="KEY=VALUE,…",
    help="such as words=13,runs=1,share=0,common=10,remove=true",
  )
  g.add_argument(
    "--decontaminate-field",
    default="text",
    metavar="COLUMN",
    help="column of the text in these files",
  )


def _add_tokens(g):
  g.add_argument("--validation", type=float, default=0.05, help="share of held-out documents")
  g.add_argument("--test", type=float, default=0.05, help="share of documents for a last test")
  g.add_argument("--salt", default="", help="another salt draws other held-out documents")
  g.add_argument(
    "--cut-chars",
    type=int,
    metavar="N",
    help="cut longer documents after a line; 0: never; default: only where there are "
    "too few documents to hold some out",
  )
  g.add_argument(
    "--tokenizer",
    default="sentencepiece:4096",
    metavar="SPEC",
    help="bytes | sentencepiece:SIZE[:bpe|unigram|char] | a .model, .tiktoken or "
    "tokenizer.json file | a folder with one, or that this command wrote",
  )
  g.add_argument(
    "--template",
    default="",
    help="kinds chat and preference: simple, chatml, llama3, gemma, …, or tokenizer "
    "for the one that came with it; default: the first that fits the tokenizer",
  )
  g.add_argument(
    "--sample-bytes",
    type=int,
    default=4_000_000,
    help="bytes of text that the tokenizer is trained on",
  )
  g.add_argument(
    "--symbol",
    action="append",
    default=[],
    metavar="TEXT",
    help="a text that is one token wherever it occurs, of a tokenizer that is "
    "trained; may be repeated",
  )
  g.add_argument(
    "--shard-tokens",
    type=count(1),
    default=1 << 27,
    help="tokens after which a task begins another file",
  )


def add_processes(p):
  """Who the other processes are, where no cluster says it."""
  group = p.add_argument_group(
    "several processes",
    "SLURM, Open MPI and Cloud TPU (also GKE) need none of these; elsewhere "
    "start the same command once a process. The run folder and the data must be visible to all.",
  )
  group.add_argument(
    "--coordinator", metavar="HOST:PORT", help="where process 0 is (or JAX_COORDINATOR_ADDRESS)"
  )
  group.add_argument("--num-processes", metavar="N", help="how many (or JAX_NUM_PROCESSES)")
  group.add_argument("--process-id", metavar="I", help="this one, from 0 (or JAX_PROCESS_ID)")
  group.add_argument(
    "--join-timeout",
    type=count(1),
    default=300,
    metavar="SECONDS",
    help="how long to wait for the others",
  )


def add_plan(p):
  """The arguments of `jaxgpt plan`."""
  p.add_argument(
    "--config",
    required=True,
    metavar="FILE.py[:ARG]",
    help="the experiment; overrides follow as --config.KEY=VALUE",
  )
  p.add_argument(
    "--topology",
    required=True,
    metavar="NAME",
    help="v5e-256, v5p-128 (cores), v6e-64x2 (two slices), v5p:4x4x8, h100x8 (a host "
    "of GPUs), h100x8x2 (two hosts), …, or here (this machine: memory alone)",
  )
  p.add_argument(
    "--save",
    metavar="FILE",
    help="write the compiled step there, for --config.mesh.compiled_step=FILE",
  )
  p.add_argument("--price", type=float, help="of a chip-hour, in any currency")
  p.add_argument("--json", metavar="FILE", help="write all figures there")
  p.add_argument(
    "--golden",
    metavar="FILE",
    help="compare the collectives with this budget; written where there is none",
  )
  p.add_argument(
    "--top", type=count(0), default=0, help="print so many of the heaviest instructions"
  )
  p.add_argument(
    "--shardings",
    action="store_true",
    help="draw how parameters and activations are cut over the mesh; compile nothing",
  )
  p.add_argument(
    "--search",
    action="store_true",
    help="look for the mesh, the rows a device and what is saved that are fastest",
  )
  p.add_argument("--finalists", type=count(1), help="of a search: plans to compile; default: 6")
  p.add_argument(
    "--keep-batch", action="store_true", help="of a search: keep data.batch_size, by accumulation"
  )
  p.add_argument("--hlo", metavar="FILE", help="write the compiled program's text there")


def add_run(p):
  """A run folder and one of its checkpoints."""
  p.add_argument("--workdir", required=True, help="run folder")
  p.add_argument("--step", type=count(0), help="which checkpoint; default: the newest")


def add_generate(p):
  """The arguments of `jaxgpt generate`."""
  add_run(p)
  p.add_argument("--prompt", default="", help="text to continue; @FILE reads a file")
  p.add_argument("--samples", type=count(1), default=1, help="texts to draw")
  p.add_argument("--max-new", type=count(1), default=200, help="new tokens at most")
  p.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
  p.add_argument("--top-k", type=count(0), default=0, help="draw from the k likeliest; 0: all")
  p.add_argument(
    "--top-p",
    type=float,
    default=1.0,
    help="draw from the likeliest that reach this probability together",
  )
  p.add_argument(
    "--min-p",
    type=float,
    default=0.0,
    help="draw from tokens at least this times as likely as the likeliest",
  )
  p.add_argument("--seed", type=count(0), default=0, help="of the draws")


def add_import(p):
  """The arguments of `jaxgpt import`."""
  p.add_argument(
    "--from",
    required=True,
    metavar="DIR",
    dest="source",
    help="folder with config.json, safetensors files and the tokenizer's files",
  )
  p.add_argument("--workdir", required=True, help="run folder to make")
  p.add_argument(
    "--dtype",
    default="float32",
    choices=("float32", "bfloat16"),
    help="what the run computes in; parameters are float32",
  )
  p.add_argument(
    "--seq-len",
    type=count(1),
    metavar="N",
    help="longest rows of evaluate and generate; default: the model's context, at most 2048",
  )
  p.add_argument("--tokenizer", metavar="PATH", help="file or folder, where DIR holds none")


def add_export(p):
  """The arguments of `jaxgpt export`."""
  add_run(p)
  p.add_argument("--to", required=True, metavar="DIR", help="folder to make")
  p.add_argument(
    "--dtype",
    default="float32",
    choices=("float32", "bfloat16", "float16"),
    help="of the weights in the files",
  )
  p.add_argument("--shard-gb", type=float, default=5.0, help="GB of a file at most")
  p.add_argument("--family", help="model_type to export as; default: the first that fits")
  p.add_argument("--no-check", action="store_true", help="don't compare with transformers")
  p.add_argument(
    "--adapter",
    action="store_true",
    help="write the LoRA adapters alone, as peft loads them; else they are merged",
  )
  p.add_argument(
    "--base",
    metavar="ADDRESS",
    help="with --adapter: the model it refers to; default: the run's init_from",
  )
