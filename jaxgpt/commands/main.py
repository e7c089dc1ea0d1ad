"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

import argparse
import json
import os
import sys

from jaxgpt import __version__
from jaxgpt.commands import arguments
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
    parser.error(
      f"unknown argument {(unknown or overrides)[0]!r} for {args.command!r}; see "
      f"jaxgpt {args.command} --help"
    )
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
    prog="jaxgpt",
    description="Train, evaluate and use language models in JAX.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--version", action="version", version=f"jaxgpt {__version__}")
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name, run, text):
    sub = commands.add_parser(
      name,
      help=text,
      description=text,
      allow_abbrev=False,
      formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sub.set_defaults(run=run)
    return sub

  arguments.add_data(command("data", _data, "turn text files into tokenized shards"))
  arguments.add_inspect(
    command("data inspect", _inspect, "the documents of a step of a run, as it saw them")
  )
  arguments.add_show(command("data show", _show, "rows of a prepared folder, as a model sees them"))
  p = command("train", _train, "train a model, or go on with an interrupted run")
  p.add_argument(
    "--config",
    required=True,
    metavar="FILE.py[:ARG]",
    help="the experiment; overrides follow as --config.KEY=VALUE",
  )
  p.add_argument("--workdir", required=True, help="run folder: checkpoints, metrics, config")
  arguments.add_processes(p)
  p = command("doctor", _doctor, "look for what would go wrong with a run, before it is started")
  p.add_argument(
    "--config",
    metavar="FILE.py[:ARG]",
    help="the experiment; overrides follow as --config.KEY=VALUE",
  )
  p.add_argument("--workdir", help="run folder: can it be written, is there room")
  p.add_argument("--no-step", action="store_true", help="don't compile and run a step")
  p.add_argument("--json", action="store_true", help="one JSON object instead of lines")
  arguments.add_plan(
    command("plan", _plan, "what a config takes on TPUs or GPUs, compiled without any")
  )
  p = command("evaluate", _evaluate, "loss and bits per byte of a run on held-out text")
  arguments.add_run(p)
  p.add_argument(
    "--split", default="validation", choices=("train", "validation", "test"), help="which documents"
  )
  p.add_argument("--data", metavar="DIR", help="where the run's data is now, if it was moved")
  p.add_argument(
    "--batches", type=arguments.count(0), default=0, help="batches to evaluate; 0: the whole split"
  )
  p.add_argument("--batch-size", type=arguments.count(1), help="rows a batch; default: the run's")
  arguments.add_generate(command("generate", _generate, "continue a prompt with a run's model"))
  arguments.add_import(command("import", _import, "make a run of a model in Hugging Face's format"))
  arguments.add_export(command("export", _export, "write a run's model in Hugging Face's format"))
  p = command("demo", _demo, "train and sample a small model on Python's standard library")
  p.add_argument("--dir", default="runs/demo", help="folder for the data and the run")
  return parser


def _key_value(flag, text, parse=json.loads):
  """(key, value) of KEY=VALUE; a value that `parse` doesn't take stays as it is."""
  key, equals, value = text.partition("=")
  if not (key and equals):
    raise UserError(f"{flag}={text}: write it as {flag} KEY=VALUE")
  try:
    return key, parse(value)
  except ValueError:
    return key, value


def _start_backend(several=False):
  from absl import logging

  from jaxgpt.parallel import mesh

  logging.set_verbosity(logging.ERROR)  # what a user can act on, we say ourselves
  mesh.prepare_cpu(several)


def _data(args):
  from jaxgpt.storage import malloc
  from jaxgpt.text.prepare import executors, prepare, progress

  malloc.give_back()
  options = dict(_key_value("--executor-option", text) for text in args.executor_option)
  with progress.Terminal() as report:
    prepare.prepare(
      args.paths,
      args.out,
      overwrite=args.overwrite,
      report=report,
      executor=executors.make(args.executor, args.workers, options, report),
      kind=args.kind,
      fields=tuple(_key_value("--field", text, str) for text in args.field),
      format=args.format,
      exclude=tuple(args.exclude),
      max_record_bytes=args.max_record_bytes,
      max_errors=args.max_errors,
      examples=args.examples,
      clean=tuple(args.clean),
      dedup=tuple(args.dedup),
      decontaminate=tuple(args.decontaminate),
      decontaminate_options=args.decontaminate_options,
      decontaminate_field=args.decontaminate_field,
      tokenizer=args.tokenizer,
      template=args.template,
      sample_bytes=args.sample_bytes,
      symbols=tuple(args.symbol),
      validation=args.validation,
      test=args.test,
      salt=args.salt,
      cut_chars=args.cut_chars,
      shard_tokens=args.shard_tokens,
      task_bytes=args.task_bytes,
    )
  print(f"wrote {args.out}; train with --config.data.path={args.out}")


def _inspect(args):
  from jaxgpt.commands import inspect_data

  for line in inspect_data.inspect(args.workdir, args.step, args.row, args.data, args.chars):
    print(line)


def _show(args):
  from jaxgpt.commands import inspect_data

  for line in inspect_data.show(
    args.path, args.split, args.rows, args.seed, args.seq_len, args.chars
  ):
    print(line)


def _train(args):
  from jaxgpt import config
  from jaxgpt.parallel import cluster

  settings = cluster.find(args.coordinator, args.num_processes, args.process_id)
  loaded = None
  if settings is None:  # what is wrong with the config is said before anything heavy is imported
    loaded = config.load(args.config, args.overrides)
    config.resolve(loaded[0])
  from jaxgpt.hf.weight_source import WEIGHT_SOURCES
  from jaxgpt.parallel import distributed
  from jaxgpt.training import evaluation, loop

  _start_backend(several=settings is not None)
  with distributed.joined(settings, args.join_timeout):
    c, origin = loaded or config.load(args.config, args.overrides)
    step, result, stopped = loop.train(c, args.workdir, origin, WEIGHT_SOURCES)
    say = print if distributed.is_first() else lambda _: None
  if stopped:
    say(
      f"stopped by {stopped.name} after step {step} of {c.train.steps}; everything is saved, "
      "the same command goes on"
    )
    return 128 + stopped
  say(f"done: {args.workdir} holds {step} steps; validation {evaluation.describe(result)}")


def _doctor(args):
  from jaxgpt import config
  from jaxgpt.commands import doctor, environment_checks

  _start_backend()
  load = (lambda: _resolved(config, args)) if args.config else None
  if args.overrides and not args.config:
    raise UserError(f"{args.overrides[0]} needs --config=FILE.py beside it")
  findings = []
  for finding in doctor.examine(load, args.workdir, not args.no_step):
    findings.append(finding)
    if not args.json:
      print(f"{finding.status:<8} {finding.topic:<9} {finding.text}", flush=True)
  problems = sum(finding.status == environment_checks.PROBLEM for finding in findings)
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

  here = args.topology == "here"
  if here:
    _start_backend()
  else:
    environment.prepare()
  from jaxgpt.commands import plan

  _refuse_unused(args, here)
  if args.shardings:
    return plan.draw(args.config, args.overrides, args.topology)
  if here:
    return plan.here(args.config, args.overrides, save_text=args.hlo, save=args.save)
  if args.search:
    return plan.search(
      args.config,
      args.overrides,
      args.topology,
      finalists=args.finalists,
      keep_batch=args.keep_batch,
      out=args.json,
    )
  return plan.plan(
    args.config,
    args.overrides,
    args.topology,
    price=args.price,
    out=args.json,
    golden=args.golden,
    save_text=args.hlo,
    top=args.top,
    save=args.save,
  )


def _refuse_unused(args, here):
  """Raises a UserError for an argument of `plan` that another one leaves without effect."""
  mine = {
    "--shardings": (args.shardings, ()),
    "--search": (args.search, ("json", "finalists", "keep_batch")),
    f"--topology={args.topology}": (here, ("hlo", "save")),
  }
  all_of_them = (
    "search",
    "json",
    "golden",
    "price",
    "top",
    "hlo",
    "save",
    "finalists",
    "keep_batch",
  )
  given = [name for name in all_of_them if getattr(args, name)]
  for flag, (is_on, takes) in mine.items():
    unused = [
      f"--{name.replace('_', '-')}" for name in given if name not in takes and f"--{name}" != flag
    ]
    if is_on and unused:
      raise UserError(f"{unused[0]} does nothing beside {flag}: leave one of them out")
  if not args.search and (args.keep_batch or args.finalists):
    raise UserError(
      f"--{'keep-batch' if args.keep_batch else 'finalists'} is of a search: add --search"
    )


def _evaluate(args):
  from jaxgpt.inference import load as load_lib
  from jaxgpt.training import evaluation

  _start_backend()
  run = load_lib.load(args.workdir, args.step)
  result = load_lib.evaluate_run(run, args.split, args.batches, args.batch_size, args.data)
  print(f"{args.split} at step {run.step}: {evaluation.describe(result)}")


def _generate(args):
  from jaxgpt.inference import load as load_lib

  sampling = load_lib.Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
  prompt = args.prompt
  if prompt.startswith("@"):
    try:
      with open(prompt[1:], encoding="utf-8") as f:
        prompt = f.read()
    except (OSError, UnicodeDecodeError) as e:
      raise UserError(f"--prompt={prompt}: {e}; give a text file, or the text itself") from e
  _start_backend()
  sampler = load_lib.Sampler(load_lib.load(args.workdir, args.step), args.samples)
  for i, text in enumerate(sampler(prompt, args.max_new, sampling, args.seed)):
    if args.samples > 1:
      print(f"--- sample {i + 1} of {args.samples}")
    print(prompt + text, flush=True)


def _import(args):
  from jaxgpt.commands import import_export

  _start_backend()
  done = import_export.import_model(
    args.source, args.workdir, dtype=args.dtype, seq_len=args.seq_len, tokenizer=args.tokenizer
  )
  print(
    f"imported {args.source}: {done['family']}, {done['parameters']:,} parameters, "
    f"{done['bytes'] / 1e9:.2f} GB of files\n{args.workdir} is a run at step 0: generate and "
    f"evaluate take it as it is; train from it with --config.init_from={args.workdir}"
  )


def _export(args):
  from jaxgpt.commands import import_export

  if args.shard_gb <= 0:
    raise UserError(f"--shard-gb={args.shard_gb} must be above 0")
  _start_backend()
  if args.adapter:
    files = import_export.export_adapter(
      args.workdir, args.to, step=args.step, base=args.base, family=args.family
    )
    print(f"wrote {args.to}: {', '.join(files)}")
    return
  family, files, certificate = import_export.export_run(
    args.workdir,
    args.to,
    step=args.step,
    dtype=args.dtype,
    shard_bytes=int(args.shard_gb * 1e9),
    family=args.family,
    certify=not args.no_check,
  )
  print(f"wrote {args.to} ({family}, {args.dtype}): {', '.join(files)}")
  if certificate["tokenizer"]["why_not"]:
    print(f"no tokenizer beside it: {certificate['tokenizer']['why_not']}")
  if not certificate["checked"]:
    print(f"not checked against transformers: {certificate['why_not']}")
    return
  greedy = certificate.get("greedy")
  print(
    f"against transformers {certificate['versions']['transformers']}: logits differ by at most "
    f"{certificate['logits']['max_abs']:.1e} of {certificate['logits']['scale']:.3g}"
    + (
      f", greedy continuations are {'equal' if greedy['equal'] else 'NOT equal'}" if greedy else ""
    )
  )


def _demo(args):
  from jaxgpt.commands import demo

  _start_backend()
  return demo.main(args.dir)
