"""Row layouts: which arrays a row of a batch becomes, and which documents share a row.

An objective names the layout that it reads (`Objective.layout`). Each layout is one entry of
`LAYOUTS`. Suffixes of array names: B rows of a batch, T positions in a row.
"""

from jaxgpt.data.layouts.language_model import packed
from jaxgpt.data.layouts.layout import Batch, Item, Layout
from jaxgpt.data.layouts.registry import (
  LAYOUTS,
  Inputs,
  KindError,
  LayoutEntry,
  blank,
  make,
  of_kind,
)

__all__ = [
  "LAYOUTS",
  "Batch",
  "Inputs",
  "Item",
  "KindError",
  "Layout",
  "LayoutEntry",
  "blank",
  "make",
  "of_kind",
  "packed",
]
