"""The names of a classifier's classes: from its config, its run folder, its source or its data."""

from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
from etils import epath

from jaxgpt.data import label_numbers, pipeline
from jaxgpt.errors import UserError
from jaxgpt.run import init_from, run_folder, source_heads
from jaxgpt.text.prepare import shards


class Settled(NamedTuple):
  """A config whose `model.label_names` is settled.

  Attributes:
    c: The config.
    notes: Sentences for the user on names that had to be assumed.
  """

  c: ml_collections.ConfigDict
  notes: list[str]


def settle(
  c: ml_collections.ConfigDict,
  folder: epath.PathLike,
  sources: Sequence[init_from.WeightSource] = (),
) -> Settled:
  """Fills in `model.label_names`, which number the classes of the data.

  Of a run that exists they are those it has. Else they are those that the config names, those of
  the weights in `init_from`, or those of the data, in this order.

  Args:
    c: A resolved config. It stays unchanged.
    folder: The run folder, which need not exist.
    sources: Formats of `init_from` besides run folders.

  Raises:
    UserError: The classes of the data are not among those of the weights, or the config numbers
      the classes of the weights in another order.
  """
  m = c.model
  if m.head not in source_heads.WITH_CLASSES or m.num_labels == 1:
    return Settled(c, [])
  if run_folder.is_run(folder):  # perhaps of a version that did not record them
    return Settled(c if m.label_names else _named(c, _recorded(folder)), [])
  theirs: tuple[str, ...] | None = None  # (): there is a head, but its classes have no names
  if c.init_from:
    old = init_from.inspect(c.init_from, sources).c_model
    if old.head == m.head and old.num_labels == m.num_labels:
      theirs = tuple(old.label_names)
      if m.head == "token_classifier" and not theirs:  # it finds answers, which have no classes
        theirs = None
  own = of_data(c)
  if m.label_names:
    _check_order(m.label_names, theirs or (), c.init_from)
    return Settled(c, [])
  if not own:  # the labels are numbers, which `check_labels` refuses
    return Settled(c, [])
  if not theirs:
    return Settled(_named(c, own), [] if theirs is None else _unknown(c, own))
  where = f"data.path={c.data.path!r}"
  if not label_numbers.generic(theirs):
    if label_numbers.find(own, theirs) is None:
      raise UserError(
        f"{where} has the classes {label_numbers.listed(own)}, but the weights in init_from="
        f"{c.init_from!r} have {label_numbers.listed(theirs)}; to start with a new head for the "
        f"classes of the data, add {label_numbers.as_override(own)}"
      )
    return Settled(_named(c, theirs), [])
  if label_numbers.find(own, theirs) is not None:  # class k is output k
    return Settled(_named(c, tuple(str(i) for i in range(m.num_labels))), [])
  return Settled(_named(c, own), _unknown(c, own))


def _check_order(ours: tuple[str, ...], theirs: tuple[str, ...], source: str) -> None:
  """Refuses names that say the weights' own classes in another order."""
  same_classes = bool(label_numbers.find(ours, theirs)) and len(ours) == len(theirs)
  named = same_classes and not label_numbers.generic(theirs)
  if named and not source_heads.same_order(ours, theirs):
    raise UserError(
      f"model.label_names={ours!r}, but the weights in init_from={source!r} number these classes "
      f"{label_numbers.listed(theirs)}; leave model.label_names out"
    )


def _unknown(c: ml_collections.ConfigDict, names: Sequence[str]) -> list[str]:
  """The note on a head whose classes have no names."""
  return [
    f"init_from={c.init_from!r} names no classes: its outputs are taken to be "
    f"{label_numbers.listed(names)}, in this order; model.label_names gives another"
  ]


def _named(c: ml_collections.ConfigDict, names: Sequence[str]) -> ml_collections.ConfigDict:
  c = c.copy_and_resolve_references()
  c.model.label_names = tuple(names)
  return c


def _recorded(folder: epath.PathLike) -> tuple[str, ...]:
  return tuple(run_folder.read_config(folder).model.label_names)


def of_data(c: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The names of the classes in the first folder of `data.path`, or ()."""
  return tuple(shards.read_manifest(pipeline.check_sources(c.data.path)[0])["label_names"])


def of_run(c: ml_collections.ConfigDict, data_digest: str) -> tuple[str, ...]:
  """The names of a run's classes, or () if neither it nor its data folder has them.

  Runs of earlier versions do not record them. Their data folder does, if it is still there.

  Args:
    c: The run's config.
    data_digest: Digest of the run's data.
  """
  if c.model.label_names or c.model.head not in source_heads.WITH_CLASSES or not c.data.path:
    return tuple(c.model.label_names)
  try:
    found = [shards.read_manifest(folder) for folder in pipeline.check_sources(c.data.path)]
  except UserError:
    return ()
  same = pipeline.digest_of([manifest["digest"] for manifest in found]) == data_digest
  return tuple(found[0]["label_names"]) if same else ()
