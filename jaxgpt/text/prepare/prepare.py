"""Turns files into a prepared data folder: read, clean, deduplicate, split, tokenize, write.

    from jaxgpt.text.prepare import prepare

    prepare.prepare(["corpus/"], "data", tokenizer="bytes", dedup=["exact"])

The work is divided into jobs of tasks, which keep their results in `OUT.unfinished`: the same
command continues a run that ended early, for whatever reason (`jobs`). The result of a task depends
only on the inputs and the options, so the output is independent of executor and interruptions.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jaxgpt
from jaxgpt.config import installed
from jaxgpt.errors import UserError, printable
from jaxgpt.storage import buckets, strict_json
from jaxgpt.storage import files as files_lib
from jaxgpt.storage.files import File
from jaxgpt.text.filters import clean, decontaminate, dedup
from jaxgpt.text.prepare import all_jobs, inputs, shards
from jaxgpt.text.prepare.jobs import Report, Work
from jaxgpt.text.prepare.options import Options
from jaxgpt.text.prepare.run_job import Executor
from jaxgpt.text.prepare.tasks import filtering
from jaxgpt.text.readers import documents, formats, kinds
from jaxgpt.text.tokenizers import chat_template, labels
from jaxgpt.text.tokenizers import tokenizer as tokenizers

__all__ = ["Options", "prepare"]

# Libraries whose version the outputs depend on.
_LIBRARIES = ("sentencepiece", "tokenizers", "tiktoken", "datatrove", "ftfy", "trafilatura")

Manifest = dict[str, Any]


def prepare(
  paths: files_lib.Paths,
  out: str | os.PathLike,
  *,
  overwrite: bool = False,
  report: Report | None = None,
  executor: Executor | None = None,
  **options: Any,
) -> Manifest:
  """Turns files into a folder that training reads.

  A document's split depends only on its text (or its column `split_by`) and the salt. So equal
  texts share a split, and a document keeps its split when the corpus grows. A held-out split may
  have files of its own instead (`splits`). The work is done in a folder `OUT.unfinished` next
  to `out`, which is renamed at the end: a folder named `out` is complete. A call that finds such a
  folder reuses each job whose inputs, options and versions are the same.

  Args:
    paths: Files, folders and glob patterns, as `documents.find` takes them.
    out: The folder to make, local or in a bucket. For a bucket the work is done in the cache on
      this machine (`buckets.cache_folder`) and the result is copied.
    overwrite: Replace an existing prepared folder. A folder with other content is never touched.
    report: Called with a line of text for each job, and every 10 s. If it has a method `show`, that
      is called every second instead (`monitor.Monitor`).
    executor: Runs the tasks, see `executors.make`. Default: this process.
    **options: The fields of `Options`.

  Returns:
    The manifest (`shards.make_manifest`), which is also in `out`. Equal inputs, options and
    versions give equal digests.

  Raises:
    UserError: A bad option or path, `out` exists, or nothing is left to train on.
  """
  chosen = Options(**options)
  report = report or (lambda line: None)
  output = _Output.of(out, overwrite)
  try:
    with inputs.place_for_stdin(output.folder) as stdin:
      found = inputs.find(paths, chosen.exclude, stdin, chosen.own_files)
      _check_options(chosen, found.files)
      return _prepare(found, output, chosen, report, executor)
  except OSError as e:
    raise UserError(
      f"--out={output.folder} cannot be written ({e.strerror or e}); name another folder, make "
      "room or change its permissions"
    ) from e


def _check_options(options: Options, files: Sequence[File]) -> None:
  """Raises errors in the options, or on missing libraries, before hours of work."""
  documents.documents(
    files,
    kind=options.kind,
    fields=dict(options.fields),
    form=options.format,
    max_bytes=options.max_record_bytes,
    group=options.split_by,
    encoding=options.encoding,
    delimiter=options.delimiter,
  )
  labels.parse(options.labels)
  formats.check_used(files, options.format, options.encoding, options.delimiter)
  rewriting = clean.make(options.clean).rewriting
  if rewriting and options.kind in kinds.MARKED:
    raise UserError(
      f"clean={rewriting[0]} rewrites texts, and labels of kind={options.kind} belong to places in "
      "them; leave it out, or clean the texts before they are labelled"
    )
  dedup.make(options.dedup)
  decontaminate.make(options.decontaminate_options)
  for path in options.decontaminate:
    if path != filtering.HELD_OUT:
      documents.find(path)
  tokenizer = all_jobs.given_tokenizer(options)
  if options.kind == "chat" or options.template or options.template_variables:
    # A tokenizer that is still to be trained will have the special tokens of the byte tokenizer.
    variables = dict(options.template_variables)
    chat_template.load(
      options.template, tokenizer or tokenizers.ByteTokenizer(), variables=variables
    )


@dataclasses.dataclass(frozen=True)
class _Output:
  """Where the prepared folder goes.

  Attributes:
    folder: The local folder.
    address: The bucket address that it is copied to, or None.
    overwrite: Replace an existing prepared folder.
  """

  folder: pathlib.Path
  address: str | None
  overwrite: bool

  @classmethod
  def of(cls, out: str | os.PathLike, overwrite: bool) -> "_Output":
    """The output for the value of --out.

    Raises:
      UserError: No folder can have this name.
    """
    name = os.fspath(out)
    if buckets.is_remote(out):
      parts = name.rstrip("/").replace("://", "/").split("/")
      return cls(buckets.cache_folder().joinpath("out", *parts), name, overwrite)
    try:
      folder = pathlib.Path(os.path.abspath(name))
      os.fspath(folder).encode()  # the libraries that write shards take UTF-8
    except UnicodeEncodeError as e:
      raise UserError(f"--out={printable(name)} is not UTF-8; name another folder") from e
    except FileNotFoundError as e:
      raise UserError("the working directory is gone; change to one that exists") from e
    if not name or "\0" in name or not folder.name:
      why = "is the root of the file system" if name and not folder.name else "is no name"
      raise UserError(f"--out={printable(name)!r} {why}; name a folder to make")
    return cls(folder, None, overwrite)

  def check_free(self) -> None:
    """Raises a UserError unless the local folder may be written.

    The local copy of a folder in a bucket may always be replaced.
    """
    folder = self.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
      return
    if not (folder / shards.MANIFEST).is_file():
      raise UserError(
        f"--out={folder} exists and is not a prepared data folder; name another, or delete it"
      )
    if not (self.overwrite or self.address):
      raise UserError(
        f"--out={folder} holds prepared data; give --overwrite to replace it, or name another "
        "folder"
      )

  def check_free_bucket(self) -> None:
    """Raises a UserError unless the bucket address may be written."""
    if not self.address:
      return
    there = buckets.names(self.address)
    if not there or buckets.UNFINISHED in there:  # the rest of a copy that was killed
      return
    if shards.MANIFEST not in there:
      raise UserError(
        f"--out={self.address} is not empty and not a prepared data folder; name another, or "
        "delete it"
      )
    if not self.overwrite:
      raise UserError(
        f"--out={self.address} holds prepared data; give --overwrite to replace it, or name "
        "another folder"
      )

  def copy(self, report: Report) -> None:
    """Moves the local folder to the bucket address, if there is one."""
    if not self.address:
      return
    report(f"copying to {self.address}")
    self.check_free_bucket()
    if buckets.names(self.address):
      buckets.remove(self.address)
    buckets.upload(self.folder, self.address, last=shards.MANIFEST)
    shutil.rmtree(self.folder)


def _prepare(
  found: inputs.Inputs,
  output: _Output,
  options: Options,
  report: Report,
  executor: Executor | None,
) -> Manifest:
  """Does the work in `OUT.unfinished` and moves the result. `jobs` explains the order."""
  versions = _versions()
  digest = _digest(
    {s: [[f.source, f.size, f.version] for f in group] for s, group in found.by_split.items()}
  )
  fingerprint = _digest([digest, dataclasses.asdict(options), versions])
  out = output.folder
  folder = out.with_name(f"{out.name}.unfinished")
  output.check_free_bucket()
  if not folder.exists() or not any(folder.iterdir()):
    output.check_free()
  out.parent.mkdir(parents=True, exist_ok=True)
  with (
    Work(folder, {"out": out.name, **versions}) as work,
    _report_what_is_left(work, report),
    found.stdin_in(folder) as found,
  ):
    if (folder / "replaced").exists() and not out.exists():  # killed between the two renames
      (folder / "replaced").rename(out)
    if work.published and work.published == [fingerprint, _digest_of(out)]:
      manifest = shards.read_manifest(out)  # killed after the last rename
    else:
      output.check_free()
      work.publish(None)
      if work.found:
        report(f"continuing the unfinished run in {folder}")
      manifest = all_jobs.AllJobs(work, options, report, executor).run(found, digest, versions)
      work.publish([fingerprint, manifest["digest"]])
      output.check_free()
      if out.exists():
        out.rename(folder / "replaced")
      (folder / all_jobs.RESULT).rename(out)
    output.copy(report)
    work.remove()
  return manifest


@contextlib.contextmanager
def _report_what_is_left(work: Work, report: Report) -> Iterator[None]:
  try:
    yield
  except BaseException:
    report(
      f"the finished part of the work is in {work.folder}: the same command continues, and a "
      "command with other options reuses as much as possible"
    )
    raise


def _digest_of(out: pathlib.Path) -> str | None:
  """The digest of a prepared folder, or None if there is none."""
  try:
    return shards.read_manifest(out)["digest"]
  except UserError:
    return None


def _versions() -> dict[str, Any]:
  """Versions of everything that the outputs depend on."""
  found = {name: installed.version(name) for name in _LIBRARIES}
  return {
    "jaxgpt": jaxgpt.__version__,
    "format": shards.FORMAT,
    **{name: version for name, version in found.items() if version},
  }


def _digest(value: Any) -> str:
  return hashlib.sha256(strict_json.dumps(value, sort_keys=True).encode()).hexdigest()
