"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

import argparse
import json
import os
import sys

from jaxgpt import __version__
from jaxgpt.errors import UserError

_EPILOG = """config overrides: any key of the config as --config.SECTION.KEY=VALUE, for example
  jaxgpt train --config=configs/gpt2_124m.py --config.optim.lr=3e-4 --config.data.path=DIR \\
    --workdir=RUN
docs/config.md lists the keys."""

_DATA_COMMANDS = ("inspect", "show")  # words after `data`; a file of that name is ./inspect


def main(argv=None):
  """Runs a command.

  Args:
    argv: arguments without the program's name; None: those of the process.

  Returns:
    The exit code: 0; 2 for bad input; 75 where the same command may work later; 128 + the number
    of the signal that ended a run.
  """
  parser = _parser()
  argv = sys.argv[1:] if argv is None else list(argv)
  if argv[:1] == ["data"] and argv[1:2] and argv[1] in _DATA_COMMANDS:
    argv[:2] = [f"data {argv[1]}"]
  args, rest = parser.parse_known_args(argv)
  overrides = [a for a in rest if a.startswith(("--config.", "--noconfig."))]
  unknown = [a for a in rest if a not in overrides]
  if unknown or (overrides and args.command not in ("train", "doctor", "plan")):
    parser.error(f"unknown argument {(unknown or overrides)[0]!r} for {args.command!r}; see "
                 f"jaxgpt {args.command} --help")
  args.overrides = overrides
  try:
    return args.run(args) or 0
  except UserError as e:
    print(f"jaxgpt: error: {e}", file=sys.stderr)
    return e.exit_code
  except KeyboardInterrupt:
    print("jaxgpt: interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:  # the reader of our output, such as `head`, is gone
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _parser():
  parser = argparse.ArgumentParser(
      prog="jaxgpt", description="Train, evaluate and use language models in JAX.",
      epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--version", action="version", version=f"jaxgpt {__version__}")
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name, run, text):
    sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False,
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sub.set_defaults(run=run)
    return sub

  _add_data(command("data", _data, "turn text files into tokenized shards"))
  _add_inspect(command("data inspect", _inspect, "the documents of a step of a run, as it saw them"))
  _add_show(command("data show", _show, "rows of a prepared folder, as a model sees them"))
  p = command("train", _train, "train a model, or go on with an interrupted run")
  p.add_argument("--config", required=True, metavar="FILE.py[:ARG]",
                 help="the experiment; overrides follow as --config.KEY=VALUE")
  p.add_argument("--workdir", required=True, help="run folder: checkpoints, metrics, config")
  _add_processes(p)
  p = command("doctor", _doctor, "look for what would go wrong with a run, before it is started")
  p.add_argument("--config", metavar="FILE.py[:ARG]",
                 help="the experiment; overrides follow as --config.KEY=VALUE")
  p.add_argument("--workdir", help="run folder: can it be written, is there room")
  p.add_argument("--no-step", action="store_true", help="don't compile and run a step")
  p.add_argument("--json", action="store_true", help="one JSON object instead of lines")
  _add_plan(command("plan", _plan, "what a config takes on a TPU topology, compiled without one"))
  p = command("evaluate", _evaluate, "loss and bits per byte of a run on held-out text")
  _add_run(p)
  p.add_argument("--split", default="validation", choices=("train", "validation", "test"),
                 help="which documents")
  p.add_argument("--data", metavar="DIR", help="where the run's data is now, if it was moved")
  p.add_argument("--batches", type=_count(0), default=0,
                 help="batches to evaluate; 0: the whole split")
  p.add_argument("--batch-size", type=_count(1), help="rows a batch; default: the run's")
  _add_generate(command("generate", _generate, "continue a prompt with a run's model"))
  _add_import(command("import", _import, "make a run of a model in Hugging Face's format"))
  _add_export(command("export", _export, "write a run's model in Hugging Face's format"))
  p = command("demo", _demo, "train and sample a small model on Python's standard library")
  p.add_argument("--dir", default="runs/demo", help="folder for the data and the run")
  return parser


def _count(least):
  """An argument type: an integer in [least, 2^31)."""
  def parse(text):
    value = int(text)
    if not least <= value < 2**31:
      raise argparse.ArgumentTypeError(f"{text} must be at least {least}, and below 2^31")
    return value
  parse.__name__ = "integer"
  return parse


def _add_data(p):
  p.add_argument("paths", nargs="+", metavar="PATH",
                 help="files, folders, glob patterns or URLs (s3://, gs://, hf://, https://)")
  p.add_argument("--out", required=True, metavar="DIR", help="folder to write")
  p.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote")
  _add_reading(p.add_argument_group("what is read"))
  _add_cleaning(p.add_argument_group("what is left out"))
  _add_tokens(p.add_argument_group("splits and tokens"))
  g = p.add_argument_group("who does the work")
  g.add_argument("--executor", default="local", metavar="KIND",
                 help="process (this one) | local (all cores) | slurm | ray")
  g.add_argument("--workers", type=_count(0), default=0,
                 help="tasks at the same time; 0: one a core, or as many as a cluster takes")
  g.add_argument("--executor-option", action="append", default=[], metavar="KEY=VALUE",
                 help="for datatrove's executor of this kind, such as partition=cpu and "
                      "time=20:00:00 of slurm; may be repeated")
  g.add_argument("--task-bytes", type=_count(1), default=16_000_000,
                 help="inputs are divided into tasks of about so many bytes, 512 at most")


def _add_inspect(p):
  p.add_argument("workdir", metavar="RUN", help="run folder")
  p.add_argument("--step", type=_count(0), required=True, help="which step; the first is 0")
  p.add_argument("--row", type=_count(0), help="which row of it; default: all")
  p.add_argument("--data", metavar="DIR", help="where the run's data is now, if it was moved")
  _add_chars(p)


def _add_show(p):
  p.add_argument("path", metavar="DIR", help="prepared folder; several, separated by commas, are "
                                             "mixed")
  p.add_argument("--split", default="train", choices=("train", "validation", "test"),
                 help="which documents")
  p.add_argument("--rows", type=_count(1), default=3, help="rows to show")
  p.add_argument("--seed", type=_count(0), default=0, help="of the draw")
  p.add_argument("--seq-len", type=_count(1), default=256, help="places in a row")
  _add_chars(p)


def _add_chars(p):
  p.add_argument("--chars", type=_count(0), default=300, help="of each text to show; 0: all")


def _add_reading(g):
  g.add_argument("--kind", default="text", metavar="KIND",
                 help="text | classification | seq2seq | chat | preference")
  g.add_argument("--field", action="append", default=[], metavar="NAME=COLUMN",
                 help="column of text, id, text_pair, label, input, target, messages, prompt, "
                      "chosen or rejected, where it isn't called so; may be repeated")
  g.add_argument("--format", help="of all files: text, jsonl, csv, parquet, …; default: by the "
                                  "suffix of each")
  g.add_argument("--exclude", action="append", default=[], metavar="PATTERN",
                 help="shell pattern of files or folders to leave out; may be repeated")
  g.add_argument("--max-record-bytes", type=_count(1), default=64 << 20,
                 help="longer records are dropped, longer text files cut")
  g.add_argument("--max-errors", type=_count(0),
                 help="broken records after which to give up; default: never")
  g.add_argument("--examples", type=_count(0), default=5, metavar="N",
                 help="how many dropped documents are named, of each rule")


def _add_cleaning(g):
  g.add_argument("--clean", action="append", default=[], metavar="STEP[:KEY=VALUE,…]",
                 help="a cleaning step, such as ftfy, html, length:min_chars=200, gopher_quality; "
                      "may be repeated, and is carried out in order")
  g.add_argument("--dedup", action="append", default=[], metavar="exact|near[:KEY=VALUE,…]",
                 help="remove duplicates, near ones such as near:threshold=0.65; may be repeated")
  g.add_argument("--decontaminate", action="append", default=[], metavar="PATH|held-out",
                 help="remove training documents that share runs of words with these files, or "
                      "with the held-out splits; may be repeated")
  g.add_argument("--decontaminate-options", default="", metavar="KEY=VALUE,…",
                 help="such as words=13,runs=1,share=0,common=10,remove=true")
  g.add_argument("--decontaminate-field", default="text", metavar="COLUMN",
                 help="column of the text in these files")


def _add_tokens(g):
  g.add_argument("--validation", type=float, default=0.05, help="share of held-out documents")
  g.add_argument("--test", type=float, default=0.05, help="share of documents for a last test")
  g.add_argument("--salt", default="", help="another salt draws other held-out documents")
  g.add_argument("--cut-chars", type=int, metavar="N",
                 help="cut longer documents after a line; 0: never; default: only where there are "
                      "too few documents to hold some out")
  g.add_argument("--tokenizer", default="sentencepiece:4096", metavar="SPEC",
                 help="bytes | sentencepiece:SIZE[:bpe|unigram|char] | a .model, .tiktoken or "
                      "tokenizer.json file | a folder with one, or that this command wrote")
  g.add_argument("--template", default="",
                 help="kinds chat and preference: simple, chatml, llama3, gemma, …, or tokenizer for the one that "
                      "came with it; default: the first that fits the tokenizer")
  g.add_argument("--sample-bytes", type=int, default=4_000_000,
                 help="bytes of text that the tokenizer is trained on")
  g.add_argument("--symbol", action="append", default=[], metavar="TEXT",
                 help="a text that is one token wherever it occurs, of a tokenizer that is "
                      "trained; may be repeated")
  g.add_argument("--shard-tokens", type=_count(1), default=1 << 27,
                 help="tokens after which a task begins another file")


def _key_value(flag, text, parse=json.loads):
  """(key, value) of KEY=VALUE; a value that `parse` doesn't take stays as it is."""
  key, equals, value = text.partition("=")
  if not (key and equals):
    raise UserError(f"{flag}={text}: write it as {flag} KEY=VALUE")
  try:
    return key, parse(value)
  except ValueError:
    return key, value


def _add_processes(p):
  group = p.add_argument_group(
      "several processes", "SLURM, Open MPI and Cloud TPU (also GKE) need none of these; elsewhere "
      "start the same command once a process. The run folder and the data must be visible to all.")
  group.add_argument("--coordinator", metavar="HOST:PORT",
                     help="where process 0 is (or JAX_COORDINATOR_ADDRESS)")
  group.add_argument("--num-processes", metavar="N", help="how many (or JAX_NUM_PROCESSES)")
  group.add_argument("--process-id", metavar="I", help="this one, from 0 (or JAX_PROCESS_ID)")
  group.add_argument("--join-timeout", type=_count(1), default=300, metavar="SECONDS",
                     help="how long to wait for the others")


def _add_plan(p):
  p.add_argument("--config", required=True, metavar="FILE.py[:ARG]",
                 help="the experiment; overrides follow as --config.KEY=VALUE")
  p.add_argument("--topology", required=True, metavar="NAME",
                 help="v5e-256, v5p-128 (cores), v6e-64x2 (two slices), v5p:4x4x8, …")
  p.add_argument("--price", type=float, help="of a chip-hour, in any currency")
  p.add_argument("--json", metavar="FILE", help="write all figures there")
  p.add_argument("--golden", metavar="FILE",
                 help="compare the collectives with this budget; written where there is none")
  p.add_argument("--top", type=_count(0), default=0,
                 help="print so many of the heaviest instructions")
  p.add_argument("--search", action="store_true",
                 help="look for the mesh, the rows a device and what is saved that are fastest")
  p.add_argument("--finalists", type=_count(1), default=4, help="of a search: plans to compile")
  p.add_argument("--keep-batch", action="store_true",
                 help="of a search: keep data.batch_size, by accumulation")
  p.add_argument("--hlo", metavar="FILE", help="write the compiled program's text there")


def _add_run(p):
  p.add_argument("--workdir", required=True, help="run folder")
  p.add_argument("--step", type=_count(0), help="which checkpoint; default: the newest")


def _add_generate(p):
  _add_run(p)
  p.add_argument("--prompt", default="", help="text to continue; @FILE reads a file")
  p.add_argument("--samples", type=_count(1), default=1, help="texts to draw")
  p.add_argument("--max-new", type=_count(1), default=200, help="new tokens at most")
  p.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
  p.add_argument("--top-k", type=_count(0), default=0, help="draw from the k likeliest; 0: all")
  p.add_argument("--top-p", type=float, default=1.0,
                 help="draw from the likeliest that reach this probability together")
  p.add_argument("--min-p", type=float, default=0.0,
                 help="draw from tokens at least this times as likely as the likeliest")
  p.add_argument("--seed", type=_count(0), default=0, help="of the draws")


def _add_import(p):
  p.add_argument("--from", required=True, metavar="DIR", dest="source",
                 help="folder with config.json, safetensors files and the tokenizer's files")
  p.add_argument("--workdir", required=True, help="run folder to make")
  p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                 help="what the run computes in; parameters are float32")
  p.add_argument("--seq-len", type=_count(1), metavar="N",
                 help="longest rows of evaluate and generate; default: the model's context, at "
                      "most 2048")
  p.add_argument("--tokenizer", metavar="PATH", help="file or folder, where DIR holds none")


def _add_export(p):
  _add_run(p)
  p.add_argument("--to", required=True, metavar="DIR", help="folder to make")
  p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                 help="of the weights in the files")
  p.add_argument("--shard-gb", type=float, default=5.0, help="GB of a file at most")
  p.add_argument("--family", help="model_type to export as; default: the first that fits")
  p.add_argument("--no-check", action="store_true", help="don't compare with transformers")
  p.add_argument("--adapter", action="store_true",
                 help="write the LoRA adapters alone, as peft loads them; else they are merged")
  p.add_argument("--base", metavar="ADDRESS",
                 help="with --adapter: the model it refers to; default: the run's init_from")


def _start_backend(several=False):
  from absl import logging

  from jaxgpt import mesh
  logging.set_verbosity(logging.ERROR)  # what a user can act on, we say ourselves
  mesh.prepare_cpu(several)


def _data(args):
  from jaxgpt.text import executors, prepare

  def report(line):
    print(line, flush=True)

  options = dict(_key_value("--executor-option", text) for text in args.executor_option)
  prepare.prepare(
      args.paths, args.out, overwrite=args.overwrite, report=report,
      executor=executors.make(args.executor, args.workers, options, report),
      kind=args.kind, fields=tuple(_key_value("--field", text, str) for text in args.field),
      format=args.format, exclude=tuple(args.exclude), max_record_bytes=args.max_record_bytes,
      max_errors=args.max_errors, examples=args.examples, clean=tuple(args.clean), dedup=tuple(args.dedup),
      decontaminate=tuple(args.decontaminate), decontaminate_options=args.decontaminate_options,
      decontaminate_field=args.decontaminate_field, tokenizer=args.tokenizer, template=args.template,
      sample_bytes=args.sample_bytes, symbols=tuple(args.symbol), validation=args.validation,
      test=args.test, salt=args.salt, cut_chars=args.cut_chars, shard_tokens=args.shard_tokens,
      task_bytes=args.task_bytes)
  print(f"wrote {args.out}; train with --config.data.path={args.out}")


def _inspect(args):
  from jaxgpt import ledger
  for line in ledger.inspect(args.workdir, args.step, args.row, args.data, args.chars):
    print(line)


def _show(args):
  from jaxgpt import ledger
  for line in ledger.show(args.path, args.split, args.rows, args.seed, args.seq_len, args.chars):
    print(line)


def _train(args):
  from jaxgpt import config, processes
  settings = processes.find(args.coordinator, args.num_processes, args.process_id)
  loaded = None
  if settings is None:  # what is wrong with the config is said before anything heavy is imported
    loaded = config.load(args.config, args.overrides)
    config.resolve(loaded[0])
  from jaxgpt import distributed, evaluate, loop
  _start_backend(several=settings is not None)
  with distributed.joined(settings, args.join_timeout):
    c, origin = loaded or config.load(args.config, args.overrides)
    step, result, stopped = loop.train(c, args.workdir, origin)
    say = print if distributed.is_first() else lambda _: None
  if stopped:
    say(f"stopped by {stopped.name} after step {step} of {c.train.steps}; everything is saved, "
        "the same command goes on")
    return 128 + stopped
  say(f"done: {args.workdir} holds {step} steps; validation {evaluate.describe(result)}")


def _doctor(args):
  import json

  from jaxgpt import config, doctor, machine
  _start_backend()
  load = (lambda: _resolved(config, args)) if args.config else None
  if args.overrides and not args.config:
    raise UserError(f"{args.overrides[0]} needs --config=FILE.py beside it")
  findings = []
  for finding in doctor.examine(load, args.workdir, not args.no_step):
    findings.append(finding)
    if not args.json:
      print(f"{finding.status:<8} {finding.topic:<9} {finding.text}", flush=True)
  problems = sum(finding.status == machine.PROBLEM for finding in findings)
  if args.json:
    print(json.dumps({"ok": not problems, "findings": [f._asdict() for f in findings]}, indent=1))
  elif problems:
    print(f"{problems} problem{'s' if problems > 1 else ''}: a run would fail")
  else:
    print("no problem found")
  return 2 if problems else 0


def _resolved(config, args):
  c, _ = config.load(args.config, args.overrides)
  config.resolve(c)
  return c


def _plan(args):
  from jaxgpt.plan import environment
  environment.prepare()
  from jaxgpt.plan import command
  if args.search:
    return command.search(args.config, args.overrides, args.topology, finalists=args.finalists,
                          keep_batch=args.keep_batch, out=args.json)
  return command.plan(args.config, args.overrides, args.topology, price=args.price, out=args.json,
                      golden=args.golden, save_text=args.hlo, top=args.top)


def _evaluate(args):
  from jaxgpt import evaluate, runs
  _start_backend()
  run = runs.load(args.workdir, args.step)
  result = runs.evaluate_run(run, args.split, args.batches, args.batch_size, args.data)
  print(f"{args.split} at step {run.step}: {evaluate.describe(result)}")


def _generate(args):
  from jaxgpt import runs
  sampling = runs.Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
  prompt = args.prompt
  if prompt.startswith("@"):
    try:
      with open(prompt[1:], encoding="utf-8") as f:
        prompt = f.read()
    except (OSError, UnicodeDecodeError) as e:
      raise UserError(f"--prompt={prompt}: {e}; give a text file, or the text itself") from e
  _start_backend()
  sampler = runs.Sampler(runs.load(args.workdir, args.step), args.samples)
  for i, text in enumerate(sampler(prompt, args.max_new, sampling, args.seed)):
    if args.samples > 1:
      print(f"--- sample {i + 1} of {args.samples}")
    print(prompt + text, flush=True)


def _import(args):
  from jaxgpt import exchange
  _start_backend()
  done = exchange.import_model(args.source, args.workdir, dtype=args.dtype, seq_len=args.seq_len,
                               tokenizer=args.tokenizer)
  print(f"imported {args.source}: {done['family']}, {done['parameters']:,} parameters, "
        f"{done['bytes'] / 1e9:.2f} GB of files\n{args.workdir} is a run at step 0: generate and "
        f"evaluate take it as it is; train from it with --config.init_from={args.workdir}")


def _export(args):
  from jaxgpt import exchange
  if args.shard_gb <= 0:
    raise UserError(f"--shard-gb={args.shard_gb} must be above 0")
  _start_backend()
  if args.adapter:
    files = exchange.export_adapter(args.workdir, args.to, step=args.step, base=args.base,
                                    family=args.family)
    print(f"wrote {args.to}: {', '.join(files)}")
    return
  family, files, certificate = exchange.export_run(
      args.workdir, args.to, step=args.step, dtype=args.dtype,
      shard_bytes=int(args.shard_gb * 1e9), family=args.family, certify=not args.no_check)
  print(f"wrote {args.to} ({family}, {args.dtype}): {', '.join(files)}")
  if certificate["tokenizer"]["why_not"]:
    print(f"no tokenizer beside it: {certificate['tokenizer']['why_not']}")
  if not certificate["checked"]:
    print(f"not checked against transformers: {certificate['why_not']}")
    return
  greedy = certificate.get("greedy")
  print(f"against transformers {certificate['versions']['transformers']}: logits differ by at most "
        f"{certificate['logits']['max_abs']:.1e} of {certificate['logits']['scale']:.3g}"
        + (f", greedy continuations are {'equal' if greedy['equal'] else 'NOT equal'}"
           if greedy else ""))


def _demo(args):
  from jaxgpt import demo
  _start_backend()
  return demo.main(args.dir)
