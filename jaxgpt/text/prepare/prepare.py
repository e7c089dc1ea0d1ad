"""Files to a prepared data folder: read, clean, remove duplicates, split, tokenize, write.

The work is cut into stages of tasks (`stages`, `tasks`), which keep what they did in
`OUT.unfinished`: whatever ends a run, the same command goes on. What a task does depends on the
inputs and the options alone, so neither the executor nor interruptions can be seen in what comes
out.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil

import jaxgpt
from jaxgpt.config import installed
from jaxgpt.errors import UserError
from jaxgpt.storage import buckets
from jaxgpt.text.filters import clean, decontaminate, dedup
from jaxgpt.text.prepare import assemble, data_card, jobs, shards, tasks
from jaxgpt.text.prepare.options import Options
from jaxgpt.text.readers import documents
from jaxgpt.text.tokenizers import chat_template, examples
from jaxgpt.text.tokenizers import tokenizer as tokenizers

# What outputs depend on, besides this package.
_LIBRARIES = ("sentencepiece", "tokenizers", "tiktoken", "datatrove", "ftfy", "trafilatura")


def prepare(paths, out, *, overwrite=False, report=None, executor=None, **options):
  """Turns files into a folder that training reads.

  A document's split depends on nothing but its text and the salt: equal texts share a split, and
  a document stays where it is when the corpus grows. The work goes on in a folder
  `OUT.unfinished` beside `out`, which is renamed at the end, so what bears the name `out` is
  whole. A call that finds such a folder takes over each stage whose inputs, options and versions
  are the same.

  Args:
    paths: files, folders and glob patterns, as `read.find` takes them.
    out: the folder to make, local or in a bucket; for a bucket the work is done in the cache on
      this machine (`remote.cache_folder`), and what comes out is copied.
    overwrite: replace a prepared folder that is there. A folder of anything else is never
      touched.
    report: called with a line of text at each stage, and every 10 s; default: nobody. Where it has
      a method `show`, that is called every second instead (`stages.Monitor`).
    executor: what runs the tasks, of `executors.make`; default: this process.
    **options: the fields of `Options`.

  Returns:
    The manifest (`shards.make_manifest`), which is also in `out`. Equal inputs, options and
    versions give equal digests.

  Raises:
    UserError: a bad option or path, `out` exists, or nothing is left to train on.
  """
  options = Options(**options)
  report = report or (lambda line: None)
  address = os.fspath(out) if buckets.is_remote(out) else None
  out = pathlib.Path(os.path.abspath(out))
  if address:
    out = buckets.cache_folder().joinpath(
      "out", *address.rstrip("/").replace("://", "/").split("/")
    )
  files = documents.find(paths, options.exclude)
  _check_options(options, files)
  try:
    return _prepare(files, out, overwrite, options, report, executor, address)
  except OSError as e:
    raise UserError(
      f"--out={out} can't be written ({e.strerror or e}); name another folder, make "
      "room or change its permissions"
    ) from e


def _check_options(options, files):
  """Raises what is wrong with options, or missing for the files, now, not after hours of work."""
  documents.documents(
    files,
    kind=options.kind,
    fields=dict(options.fields),
    form=options.format,
    max_bytes=options.max_record_bytes,
  )
  clean.make(options.clean)
  dedup.make(options.dedup)
  decontaminate.make(options.decontaminate_options)
  for path in options.decontaminate:
    if path != tasks.HELD_OUT:
      documents.find(path)
  tokenizer = _given_tokenizer(options)
  if (
    options.kind == "chat" or options.template
  ):  # one that is trained gets the marks that bytes have
    chat_template.load(options.template, tokenizer or tokenizers.ByteTokenizer())


class _SampleIsWanted(Exception):
  """The tokenizer is one that has to be trained."""


def _given_tokenizer(options):
  """The tokenizer that is named, or None where one is to be trained."""

  def sample():
    raise _SampleIsWanted

  try:
    return tokenizers.from_spec(options.tokenizer, sample, symbols=options.symbols)
  except _SampleIsWanted:
    return None


def _prepare(files, out, overwrite, options, report, executor, address):
  inputs = _digest([[file.source, file.size, file.version] for file in files])
  fingerprint = _digest([inputs, dataclasses.asdict(options), _versions()])
  folder = out.with_name(f"{out.name}.unfinished")
  if address:
    _check_free_bucket(address, overwrite)
  if not folder.exists() or not any(folder.iterdir()):
    _check_free(out, overwrite or address)
  out.parent.mkdir(parents=True, exist_ok=True)
  with jobs.Work(folder, {"out": out.name, **_versions()}) as work, _say_what_is_left(work, report):
    if (folder / "replaced").exists() and not out.exists():  # killed between two renames
      (folder / "replaced").rename(out)
    if work.published and work.published == [fingerprint, _digest_of(out)]:  # killed after the last
      manifest = shards.read_manifest(out)
    else:
      _check_free(out, overwrite or address)
      work.publish(None)
      if work.found:
        report(f"going on with the unfinished run in {folder}")
      manifest = _Run(work, options, report, executor).prepare(files, inputs)
      work.publish([fingerprint, manifest["digest"]])
      _check_free(out, overwrite or address)
      if out.exists():
        out.rename(folder / "replaced")
      (folder / "publish").rename(out)
    if address:
      _copy(out, address, overwrite, report)
    work.remove()
  return manifest


def _check_free_bucket(address, overwrite):
  there = buckets.names(address)
  if not there or buckets.UNFINISHED in there:  # or what a killed run has copied of its work
    return
  if shards.MANIFEST not in there:
    raise UserError(
      f"--out={address} is not empty and no prepared data folder; name another, or "
      "delete it yourself"
    )
  if not overwrite:
    raise UserError(
      f"--out={address} holds prepared data; give --overwrite to replace it, or name another folder"
    )


def _copy(out, address, overwrite, report):
  """Puts a prepared folder into a bucket, in the place of what was there."""
  report(f"copying to {address}")
  _check_free_bucket(address, overwrite)
  if buckets.names(address):
    buckets.remove(address)
  buckets.upload(out, address, last=shards.MANIFEST)
  shutil.rmtree(out)


@contextlib.contextmanager
def _say_what_is_left(work, report):
  try:
    yield
  except BaseException:
    report(
      f"what is done so far is in {work.folder}: the same command goes on, and another one "
      "takes what it can use"
    )
    raise


def _digest_of(out):
  """The digest of a prepared folder, or None where there is none."""
  try:
    return shards.read_manifest(out)["digest"]
  except UserError:
    return None


def _versions():
  found = {name: installed.version(name) for name in _LIBRARIES}
  return {
    "jaxgpt": jaxgpt.__version__,
    "format": shards.FORMAT,
    **{name: version for name, version in found.items() if version},
  }


def _digest(value):
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_free(out, overwrite):
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return
  if not (out / shards.MANIFEST).is_file():
    raise UserError(
      f"{out} exists and is no prepared data folder; name another, or delete it yourself"
    )
  if not overwrite:
    raise UserError(
      f"{out} holds prepared data; give --overwrite to replace it, or name another folder"
    )


class _Run:
  """The stages in their order."""

  def __init__(self, work, options, report, executor):
    self._work, self._options, self._report = work, options, report
    self._executor = executor

  def prepare(self, files, inputs):
    """All stages; returns the manifest, which is in WORK/publish with all it names."""
    options, dropped = self._options, documents.Dropped(self._options.examples)
    stores, accounts = self._documents(files, inputs)
    for account in accounts:
      dropped.merge(account["dropped"])
    cleaned = accounts
    dropped.check(options.max_errors)
    if not dropped.kept:
      for line in dropped.lines():
        self._report(line)
      raise tasks.nothing_to_train_on(options)
    label_names = examples.label_names(label for account in accounts for label in account["labels"])
    clusters = self._duplicates(stores) if options.dedup else None
    contaminated = self._contaminated(stores, clusters) if options.decontaminate else None
    corpus = tasks.Corpus(stores, clusters, contaminated)
    given = _given_tokenizer(options)
    made, _ = self._stage(
      "tokenizer",
      1,
      tasks.make_tokenizer,
      (corpus, options),
      [
        options.tokenizer,
        given and given.digest,
        options.sample_bytes,
        options.symbols,
        options.validation,
        options.test,
      ],
    )
    saved = made[0] / "tokenizer"
    written, accounts = self._stage(
      "tokenize",
      len(stores),
      tasks.tokenize,
      (corpus, saved, label_names, options),
      [options.shard_tokens, options.template, options.examples],
    )
    for account in accounts:
      dropped.merge(account["dropped"])
    for line in dropped.lines():
      self._report(line)
    assert dropped.kept == sum(account["encoded"] for account in accounts), dropped.to_json()
    manifest = self._assemble(written, accounts, saved, label_names, dropped)
    data_card.write(
      self._work.folder / "publish",
      manifest,
      dropped,
      _sum(account["dropped_bytes"] for account in cleaned + accounts),
      _sum(account["changed"] for account in cleaned),
      _sum(account["sources"] for account in accounts),
    )
    return manifest

  def _stage(self, name, count, run, args, depends):
    """Runs a stage: its folders and accounts by rank."""
    stage = self._work.stage(name, count, functools.partial(run, *args), depends, self._report)
    accounts = jobs.run(stage, self._executor, self._report)
    return [stage.task_folder(rank) for rank in range(count)], accounts

  def _documents(self, files, inputs):
    """Read and cleaned: folders and accounts by rank."""
    options = self._options
    listed, accounts = self._stage(
      "inputs",
      1,
      tasks.list_inputs,
      (files, options.task_bytes),
      [inputs, options.task_bytes, _versions()],
    )
    cut_chars = tasks.cut_chars(files, options, self._report)
    return self._stage(
      "read",
      accounts[0]["tasks"],
      tasks.read_and_clean,
      (listed[0], options, cut_chars),
      [
        options.kind,
        options.fields,
        options.format,
        options.max_record_bytes,
        cut_chars,
        options.clean,
        options.salt,
        options.examples,
      ],
    )

  def _duplicates(self, stores):
    """The folder that says which documents are duplicates."""
    config = dedup.make(self._options.dedup)
    signed, _ = self._stage(
      "signatures", len(stores), tasks.sign, (stores, config), dataclasses.asdict(config)
    )
    pairs, _ = self._stage(
      "buckets", dedup.bucket_tasks(config), tasks.fill_buckets, (signed, config), []
    )
    found, accounts = self._stage("duplicates", 1, tasks.cluster, (signed, pairs, config), [])
    asked = (config.exact, config.near)
    self._report(
      "duplicates: "
      + ", ".join(
        f"{count:,} by rule {rule!r}"
        for (rule, count), options in zip(accounts[0].items(), asked)
        if options
      )
    )
    return found[0]

  def _contaminated(self, stores, clusters):
    """The folders that say which training documents share runs of words with held-out ones."""
    options, config = self._options, decontaminate.make(self._options.decontaminate_options)
    paths = [path for path in options.decontaminate if path != tasks.HELD_OUT]
    sources = [documents.find(path) for path in paths]
    own = stores if tasks.HELD_OUT in options.decontaminate else []
    collected, accounts = self._stage(
      "held-out",
      len(own) + len(sources),
      tasks.collect_held_out,
      (own, clusters, sources, options, config),
      [
        options.validation,
        options.test,
        options.decontaminate,
        options.decontaminate_field,
        dataclasses.asdict(config),
        [[file.source, file.size, file.version] for listed in sources for file in listed],
      ],
    )
    short = sum(
      part["too short"]
      for account in accounts
      for part in (account.values() if "too short" not in account else [account])
    )
    if short:
      self._report(
        f"{short:,} held-out documents have fewer than {config.words} words, so they "
        "can't be found: --decontaminate-options=words=…"
      )
    inputs = {
      split: [folder / split for folder in collected[: len(own)]]
      for split in shards.SPLITS[1:]
      if own
    }
    inputs.update((path, [folder]) for path, folder in zip(paths, collected[len(own) :]))
    index, _ = self._stage("index", 1, tasks.index_held_out, (inputs, config), [])
    found, accounts = self._stage(
      "contaminated",
      len(stores),
      tasks.find_contaminated,
      (stores, clusters, index[0], options, config),
      [],
    )
    for name in inputs:
      self._report(
        f"{sum(account['found'][name] for account in accounts):,} training documents "
        f"share runs of words with {name}"
      )
    return found

  def _assemble(self, written, accounts, saved, label_names, dropped):
    """What the tasks wrote, joined in a folder that is ready to be published."""
    folder = self._work.folder / "publish"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    splits = {
      split: assemble.assemble(
        folder, [(part, account["splits"][split]) for part, account in zip(written, accounts)]
      )
      for split in shards.SPLITS
    }
    if not splits["train"]["documents"]:
      raise tasks.nothing_to_train_on(self._options)
    shutil.copytree(saved, folder / "tokenizer")
    template = next((a["template"] for a in accounts if a["template"]), None)
    manifest = shards.make_manifest(
      tokenizers.load(saved), splits, dropped, self._options.kind, label_names, template
    )
    shards.write_manifest(folder, manifest)
    for split, entry in splits.items():
      self._report(
        f"{split:<10} {entry['documents']:>9,} documents {entry['tokens']:>13,} tokens "
        f"{entry['bytes']:>14,} bytes"
      )
    return manifest


def _sum(accounts):
  """{key: sum} of dicts of numbers, or of lists of numbers."""
  out = {}
  for account in accounts:
    for key, value in account.items():
      so_far = out.get(key)
      if so_far is None:
        out[key] = value
      elif isinstance(value, list):
        out[key] = [a + b for a, b in zip(so_far, value)]
      else:
        out[key] = so_far + value
  return out
