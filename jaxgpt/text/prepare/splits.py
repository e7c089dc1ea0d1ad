"""The splits of a corpus: shares of the documents by a hash, or files of their own.

    --validation=0.05         5 % of the documents of PATH, by the hash of the text
    --split-by=author         the same, by the hash of a column: a group is never divided
    --validation=dev.jsonl    all documents of these files, and none of PATH

Inputs are read in the order of `ORDER`, held-out splits first: where `--dedup` finds two equal
documents in different splits, the one that is held out stays.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from jaxgpt.errors import UserError
from jaxgpt.storage.files import File
from jaxgpt.storage.passed_over import PassedOver
from jaxgpt.text.readers import documents

SHARE = 0.05  # of each held-out split, unless it is set
BY_HASH = ""  # in place of a split: the hash of each document chooses it
ORDER = ("test", "validation", BY_HASH)

Given: TypeAlias = "tuple[float | str, ...]"  # one share, or paths
Inputs: TypeAlias = Mapping[str, Sequence[File]]  # {split or BY_HASH: its files}


class Shares(NamedTuple):
  """Shares of the documents in the held-out splits, each in [0, 1)."""

  validation: float
  test: float


def parse(text: str) -> float | str:
  """A share or a path, from the command line."""
  try:
    return float(text)
  except ValueError:
    return text


def normal(name: str, value: object) -> Given:
  """The value of `validation` or `test` in its normal form.

  Args:
    name: 'validation' or 'test', for messages.
    value: A share, a path, or a sequence of these.

  Raises:
    UserError: More than one share, a share next to paths, or a share outside [0, 1).
  """
  values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
  out = tuple(
    float(one) if isinstance(one, int | float) else os.fspath(one)  # type: ignore[arg-type]
    for one in values
    if one is not None
  )
  shares = [one for one in out if isinstance(one, float)]
  if shares and len(out) > 1:
    raise UserError(
      f"{name}={', '.join(map(str, out))}: give one share of the documents, or only files"
    )
  if shares and not 0 <= shares[0] < 1:  # NaN is in no range
    raise UserError(
      f"{name}={shares[0]:g} must be at least 0 and below 1, or a file (write ./{shares[0]:g} for "
      "a file of this name)"
    )
  if "" in out:
    raise UserError(f"{name}='' is empty; give a share such as 0.05, or files")
  return out


def shares(validation: Given, test: Given) -> Shares:
  """The shares in effect: 0 for a split with files of its own.

  Without a value, a share is `SHARE`, or 0 if the other split has files: then PATH is all for
  training.

  Raises:
    UserError: They leave nothing to train on.
  """
  has_files = any(isinstance(one, str) for one in (*validation, *test))

  def share(given: Given) -> float:
    if not given:
      return 0.0 if has_files else SHARE
    return given[0] if isinstance(given[0], float) else 0.0

  out = Shares(share(validation), share(test))
  if sum(out) >= 1:
    raise UserError(
      f"validation={out.validation:g} and test={out.test:g} leave nothing to train on; their sum "
      "must be below 1"
    )
  return out


def own_paths(given: Given) -> list[str]:
  """The paths of a split's own files, or []."""
  return [one for one in given if isinstance(one, str)]


def find(
  listed: Sequence[File],
  own: Mapping[str, Sequence[str]],
  exclude: Sequence[str],
  passed_over: PassedOver | None = None,
) -> tuple[dict[str, list[File]], list[str]]:
  """The files of each split, and lines to report.

  Args:
    listed: The files of PATH. Those that a held-out split names are left out.
    own: {held-out split: the paths of its own files}.
    exclude: As for `documents.find`.
    passed_over: The account to count the rest in.

  Raises:
    UserError: A path does not exist, two splits share a file, or no file is left to train on.
  """
  inputs: dict[str, list[File]] = {}
  split_of: dict[str, str] = {}
  for split in ORDER[:-1]:
    for file in documents.find(own[split], exclude, passed_over) if own.get(split) else ():
      if (other := split_of.setdefault(_identity(file), split)) != split:
        raise UserError(
          f"--{split}: {file.address} is also a file of --{other}; name it in one of them"
        )
      inputs.setdefault(split, []).append(file)
  rest = [file for file in listed if _identity(file) not in split_of]
  if not rest:
    raise UserError(
      "no file is left to train on: --validation and --test name all files of PATH; name others"
    )
  inputs[BY_HASH] = rest
  _name_apart(inputs)
  taken = len(listed) - len(rest)
  lines = [
    f"{split}: {len(files):,} file{'s' * (len(files) > 1)} of its own"
    for split, files in inputs.items()
    if split != BY_HASH
  ]
  if taken:
    lines.append(f"{taken:,} of the files in PATH are held out, so they are not trained on")
  return inputs, lines


def _name_apart(inputs: dict[str, list[File]]) -> None:
  """Gives files of held-out splits other names, where other files have theirs."""
  taken = {file.source for file in inputs[BY_HASH]}
  for split in ORDER[:-1]:
    for number, file in enumerate(inputs.get(split, ())):
      name = file.source
      while name in taken:
        name = f"{split}/{name}"
      taken.add(name)
      inputs[split][number] = file._replace(source=name)


def _identity(file: File) -> str:
  return file.address if "://" in file.address else os.path.realpath(file.address)


def check(own_files: bool, in_effect: Shares, split_by: str) -> None:
  """Refuses `split_by` where nothing is split.

  Raises:
    UserError: It has no effect.
  """
  if split_by and sum(in_effect) == 0:
    why = "the held-out splits have files of their own" if own_files else "both shares are 0"
    raise UserError(f"split_by={split_by!r} has no effect: {why}; leave it out, or set a share")
