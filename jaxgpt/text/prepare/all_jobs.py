"""The jobs of a preparation in their order.

    inputs      divide the files into tasks
    read        read and clean documents
    signatures, buckets, duplicates      with --dedup
    held-out, index, contaminated        with --decontaminate
    tokenizer   load or train it, on a sample of the training split
    tokenize    write shards of each split, per task
    (assemble)  join them in WORK/publish, with manifest and data card

Each job names what its outputs depend on in addition to the jobs before it (`depends`). A change of
`--validation`, for instance, keeps the documents that were read and tokenizes them again.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxgpt.storage import files as files_lib
from jaxgpt.text.filters import decontaminate, dedup
from jaxgpt.text.prepare import assemble, data_card, inputs, run_job, shards, splits
from jaxgpt.text.prepare.jobs import Account, Report, Work
from jaxgpt.text.prepare.options import Options
from jaxgpt.text.prepare.tasks import filtering, reading, tokenizing
from jaxgpt.text.readers import documents, kinds
from jaxgpt.text.tokenizers import labels
from jaxgpt.text.tokenizers import tokenizer as tokenizers

RESULT = "publish"  # subfolder of the work that becomes the prepared folder

_Folders = list[pathlib.Path]  # of a job's tasks, by rank


class _SampleIsWanted(Exception):
  """The tokenizer is to be trained."""


def given_tokenizer(options: Options) -> tokenizers.Tokenizer | None:
  """The tokenizer that the options name, or None if one is to be trained."""

  def sample() -> list[str]:
    raise _SampleIsWanted

  try:
    return tokenizers.from_spec(options.tokenizer, sample, symbols=options.symbols)
  except _SampleIsWanted:
    return None


class AllJobs:
  """Runs the jobs of a preparation."""

  def __init__(
    self, work: Work, options: Options, report: Report, executor: run_job.Executor | None
  ):
    self._work, self._options, self._report = work, options, report
    self._executor = executor

  def run(self, found: inputs.Inputs, digest: str, versions: dict[str, Any]) -> dict[str, Any]:
    """Runs all jobs.

    Args:
      found: The files to read.
      digest: Digest of their names, sizes and versions.
      versions: Versions that the outputs depend on.

    Returns:
      The manifest, which is in WORK/publish with everything that it names.
    """
    options, dropped = self._options, documents.Dropped(self._options.examples)
    self._report_all(found.report())
    stores, cleaned = self._read(found.by_split, digest, versions)
    self._report_all(found.check_unchanged())
    for account in cleaned:
      dropped.merge(account["dropped"])
    dropped.check(options.max_errors)
    if not dropped.kept:
      self._report_all(dropped.lines())
      raise tokenizing.nothing_to_train_on(options)
    label_names = self._label_names(cleaned)
    clusters = self._duplicates(stores) if options.dedup else None
    contaminated = self._contaminated(stores, clusters) if options.decontaminate else None
    corpus = filtering.Corpus(stores, clusters, contaminated)
    shared = self._report_splits(corpus)
    saved = self._tokenizer(corpus)
    written, accounts = self._job(
      "tokenize",
      len(stores),
      functools.partial(tokenizing.tokenize, corpus, saved, label_names, options),
      [
        options.shard_tokens,
        options.template,
        options.examples,
        options.shares,
        *([label_names] if options.labels else []),
        options.template_variables,
        options.train_on,
      ],
    )
    for account in accounts:
      dropped.merge(account["dropped"])
    self._report_all(dropped.lines())
    assert dropped.kept == sum(account["encoded"] for account in accounts), dropped.to_json()
    about = {
      "passed_over": found.passed_over.to_json(),
      "unknown_tokens": tokenizing.check_unknown(accounts, options, self._report),
    }
    manifest = self._assemble(written, accounts, saved, label_names, dropped, about)
    data_card.write(
      self._work.folder / RESULT,
      manifest,
      dropped,
      _sum(account["dropped_bytes"] for account in cleaned + accounts),
      _sum(account["changed"] for account in cleaned),
      _sum(account["sources"] for account in accounts),
      shared,
    )
    folder = self._work.folder / RESULT
    manifest |= {"other_digests": shards.other_digests(folder, manifest)}
    shards.write_manifest(folder, manifest)
    return manifest

  def _report_splits(self, corpus: filtering.Corpus) -> int | None:
    """Reports on groups, and on texts that are in training and held out.

    Returns:
      The number of training documents whose text is held out too, or None if the splits follow from
      the texts, so that there are none.
    """
    options = self._options
    if options.split_by:
      groups = filtering.count_groups(corpus.stores, options.shares)
      counts = dict(zip(shards.SPLITS, groups))
      self._report(
        f"split by {options.split_by!r}: {sum(groups):,} groups, of which "
        f"{counts['validation']:,} in validation and {counts['test']:,} in test"
      )
    if not (options.own_files or options.split_by):
      return None
    shared = filtering.count_shared(corpus, options.shares)
    if shared:
      self._report(
        f"{shared:,} training documents have the text of a document of validation or test; "
        "--dedup=exact removes them from training"
      )
    return shared

  def _report_all(self, lines: Iterable[str]) -> None:
    for line in lines:
      self._report(line)

  def _job(
    self, name: str, count: int, run: Callable[..., Account], depends: Any
  ) -> tuple[_Folders, list[Account]]:
    """Runs a job and returns the folders and accounts of its tasks by rank."""
    job = self._work.job(name, count, run, depends, self._report)
    accounts = run_job.run(job, self._executor, self._report)
    return [job.task_folder(rank) for rank in range(count)], accounts

  def _read(
    self, files: splits.Inputs, digest: str, versions: dict[str, Any]
  ) -> tuple[_Folders, list[Account]]:
    """Folders of cleaned documents, and accounts."""
    options = self._options
    # The job's outputs name the files, and a later run may have another working directory.
    files = {split: [files_lib.absolute(file) for file in files[split]] for split in files}
    listed, accounts = self._job(
      "inputs",
      1,
      functools.partial(
        reading.list_inputs,
        files,
        options.task_bytes,
        encoding=options.encoding,
        form=options.format,
      ),
      [
        digest,
        options.task_bytes,
        versions,
        options.encoding,
        options.format,
        {split: [file.address for file in group] for split, group in files.items()},
      ],
    )
    cut_chars = reading.cut_chars(files[splits.BY_HASH], options, self._report)
    task_splits = accounts[0]["splits"]
    return self._job(
      "read",
      len(task_splits),
      functools.partial(reading.read_and_clean, listed[0], options, cut_chars, task_splits),
      [
        options.kind,
        options.fields,
        options.format,
        options.max_record_bytes,
        cut_chars,
        options.clean,
        options.salt,
        options.examples,
        *([labels.RULE, bool(options.labels)] if options.kind in kinds.LABELLED else []),
        options.split_by,
        # Only if given, so that the jobs of an earlier version keep their keys.
        *({"encoding": options.encoding} if options.encoding else {}).items(),
        *({"delimiter": options.delimiter} if options.delimiter else {}).items(),
      ],
    )

  def _label_names(self, cleaned: Sequence[Account]) -> tuple[str, ...]:
    """The classes in order, or () for numbers and for data without classes. Reports them."""
    kind = self._options.kind
    if kind not in kinds.LABELLED:
      return ()
    seen = labels.Seen()
    for account in cleaned:
      seen.merge(account["labels"])
    choose = labels.choose if kind == "classification" else labels.choose_classes
    names = choose(seen, labels.parse(self._options.labels))
    self._report(labels.describe(seen, names))
    return names

  def _duplicates(self, stores: _Folders) -> pathlib.Path:
    """The folder that says which documents are duplicates."""
    config = dedup.make(self._options.dedup, by_fields=self._options.kind != "text")
    signed, _ = self._job(
      "signatures",
      len(stores),
      functools.partial(filtering.sign, stores, config),
      config.depends(),
    )
    pairs, _ = self._job(
      "buckets",
      dedup.bucket_tasks(config),
      functools.partial(filtering.fill_buckets, signed, config),
      [],
    )
    found, accounts = self._job(
      "duplicates", 1, functools.partial(filtering.cluster, signed, pairs, config), ["clusters 3"]
    )
    asked = (config.exact, config.near)
    self._report(
      "duplicates: "
      + ", ".join(
        f"{count:,} by rule {rule!r}"
        for (rule, count), settings in zip(accounts[0]["removed"].items(), asked)
        if settings
      )
    )
    if accounts[0]["conflicts"]:
      names = [tokenizing.source_of(stores, *where) for where in accounts[0]["example"]]
      self._report(
        f"{accounts[0]['conflicts']:,} texts have more than one label, and keep one document for "
        f"each; such as {names[0]} and {names[1]}"
      )
    return found[0]

  def _contaminated(self, stores: _Folders, clusters: pathlib.Path | None) -> _Folders:
    """The folders that say which training documents share runs of words with held-out ones."""
    options, config = self._options, decontaminate.make(self._options.decontaminate_options)
    paths = [path for path in options.decontaminate if path != filtering.HELD_OUT]
    found = [inputs.find(path) for path in paths]
    own = stores if filtering.HELD_OUT in options.decontaminate else []
    collected, accounts = self._job(
      "held-out",
      len(own) + len(found),
      functools.partial(
        filtering.collect_held_out, own, clusters, [x.files for x in found], options, config
      ),
      [
        options.shares,
        options.decontaminate,
        options.decontaminate_field,
        dataclasses.asdict(config),
        [[file.source, file.size, file.version] for x in found for file in x.files],
      ],
    )
    for path, listed, account in zip(paths, found, accounts[len(own) :]):
      lines = [*listed.report(), *listed.check_unchanged(), *filtering.report(account)]
      self._report_all(f"{path}: {line}" for line in lines)
    texts = {
      split: [folder / split for folder in collected[: len(own)]]
      for split in shards.SPLITS[1:]
      if own
    }
    for path, folder in zip(paths, collected[len(own) :]):
      texts[f"./{path}" if path in texts else path] = [folder]
    filtering.check_collected(accounts, len(own), config, self._report)
    index, runs = self._job(
      "index", 1, functools.partial(filtering.index_held_out, texts, config), []
    )
    filtering.check_index(runs[0], config)
    contaminated, accounts = self._job(
      "contaminated",
      len(stores),
      functools.partial(filtering.find_contaminated, stores, clusters, index[0], options, config),
      [],
    )
    for name in texts:
      self._report(
        f"{sum(account['found'][name] for account in accounts):,} training documents "
        f"share runs of words with {name}"
      )
    return contaminated

  def _tokenizer(self, corpus: filtering.Corpus) -> pathlib.Path:
    """The folder of the tokenizer."""
    options, given = self._options, given_tokenizer(self._options)
    made, _ = self._job(
      "tokenizer",
      1,
      functools.partial(tokenizing.make_tokenizer, corpus, options),
      [
        options.tokenizer,
        given and given.digest,
        options.sample_bytes,
        options.symbols,
        options.shares,
      ],
    )
    return made[0] / "tokenizer"

  def _assemble(
    self,
    written: _Folders,
    accounts: list[Account],
    saved: pathlib.Path,
    label_names: Sequence[str],
    dropped: documents.Dropped,
    about: dict[str, Any],
  ) -> dict[str, Any]:
    """Joins the outputs of the tasks in the folder that becomes the result."""
    folder = self._work.folder / RESULT
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    entries = {
      split: assemble.assemble(
        folder, [(task, account["splits"][split]) for task, account in zip(written, accounts)]
      )
      for split in shards.SPLITS
    }
    if not entries["train"]["documents"]:
      raise tokenizing.nothing_to_train_on(self._options)
    shutil.copytree(saved, folder / "tokenizer")
    template = next((a["template"] for a in accounts if a["template"]), None)
    manifest = shards.make_manifest(
      tokenizers.load(saved),
      entries,
      dropped,
      self._options.kind,
      label_names,
      template,
      template_variables=dict(self._options.template_variables),
      split_by=self._options.split_by,
      own_files=sorted(self._options.own_files),
      about=about,
    )
    for split, entry in entries.items():
      self._report(
        f"{split:<10} {entry['documents']:>9,} documents {entry['tokens']:>13,} tokens "
        f"{entry['bytes']:>14,} bytes"
      )
    for split, share in self._options.shares._asdict().items():
      if share and not entries[split]["documents"]:
        what = "group" if self._options.split_by else "document"
        self._report(
          f"no {what} fell into {split}, though its share is {share:g}: raise --{split}, set "
          f"another --salt, or give more {what}s"
        )
    return manifest


def _sum(accounts: Iterable[dict[str, Any]]) -> dict[str, Any]:
  """Adds up dicts of numbers, or of lists of numbers, by key."""
  out: dict[str, Any] = {}
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
