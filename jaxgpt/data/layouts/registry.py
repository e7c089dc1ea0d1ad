"""The registry of layouts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxgpt.config.registry import Registry
from jaxgpt.data import source
from jaxgpt.data.layouts.classification import Classification, MultiLabel
from jaxgpt.data.layouts.language_model import CausalLM, MaskedLM
from jaxgpt.data.layouts.layout import Batch, Layout
from jaxgpt.data.layouts.pairs import Preference, Retrieval
from jaxgpt.data.layouts.token_labels import QuestionAnswering, TokenClassification
from jaxgpt.data.masking import Masking
from jaxgpt.errors import UserError


class Inputs(NamedTuple):
  """Values that layouts are made from.

  Attributes:
    masking: From `masking.make`, for layouts with `needs_masking`.
    has_classes: Labels are classes, not numbers.
    num_labels: Outputs of the model. None: the classes of the data.
    overlap: Tokens that consecutive windows of a text share. None: the usual number.
  """

  masking: Masking | None = None
  has_classes: bool = True
  num_labels: int | None = None
  overlap: int | None = None


class LayoutEntry(NamedTuple):
  """A kind of layout.

  Attributes:
    make: Makes the layout.
    kinds: Kinds of data that it can lay out, keys of `documents.KINDS`. The first is the usual one.
    summary: One line for the documentation.
    needs_masking: `make` needs `Inputs.masking`.
    has_labels: Rows have a label, whose classes the model must have outputs for.
    predicts_text: Each token of a text is predicted once, so that bits per byte are defined.
  """

  make: Callable[[Inputs], Layout]
  kinds: tuple[str, ...]
  summary: str
  needs_masking: bool = False
  has_labels: bool = False
  predicts_text: bool = False


class KindError(UserError):
  """A layout cannot take data of a kind.

  Attributes:
    source: Name of the data.
    kind: Its kind.
    kinds: Kinds that the layout takes, the usual one first.
  """

  def __init__(self, layout: str, source: str, kind: str):
    self.source, self.kind, self.kinds = source, kind, LAYOUTS[layout].kinds
    super().__init__(
      f"objective.name={layout!r} takes data of kind {' or '.join(self.kinds)}, but "
      f"{source!r} is of kind {kind}: set objective.name to {' or '.join(of_kind(kind))}, or "
      f"prepare it with --kind={self.kinds[0]}"
    )


LAYOUTS: Registry[LayoutEntry] = Registry("layout")
LAYOUTS.add(
  "causal_lm",
  LayoutEntry(
    lambda _: CausalLM(),
    ("text", "seq2seq", "chat"),
    "packed next-token predictions",
    predicts_text=True,
  ),
)
LAYOUTS.add(
  "masked_lm",
  LayoutEntry(
    lambda inputs: MaskedLM(inputs.masking),
    ("text",),
    "packed tokens with some of them masked",
    needs_masking=True,
  ),
)
LAYOUTS.add(
  "classification",
  LayoutEntry(
    lambda inputs: Classification(inputs.has_classes),
    ("classification",),
    "one labelled example per row",
    has_labels=True,
  ),
)
LAYOUTS.add(
  "preference",
  LayoutEntry(lambda _: Preference(), ("preference",), "one pair of answers per row"),
)
LAYOUTS.add(
  "multi_label",
  LayoutEntry(
    lambda inputs: MultiLabel(inputs.num_labels or 1),
    ("multi_label",),
    "one example per row, with any number of classes",
    has_labels=True,
  ),
)
LAYOUTS.add(
  "token_classification",
  LayoutEntry(
    lambda _: TokenClassification(),
    ("tagging",),
    "packed texts with a class for each word",
    has_labels=True,
  ),
)
LAYOUTS.add(
  "question_answering",
  LayoutEntry(
    lambda inputs: QuestionAnswering(inputs.overlap),
    ("question_answering",),
    "a question and a window of its passage per row",
  ),
)
LAYOUTS.add(
  "retrieval",
  LayoutEntry(lambda _: Retrieval(), ("retrieval",), "a query and its positive per row"),
)


def of_kind(kind: str) -> list[str]:
  """Names of the layouts for data of a kind, the usual one first."""
  return [name for name, entry in LAYOUTS.items() if kind in entry.kinds]


def blank(name: str, num_rows: int, seq_len: int, num_labels: int = 2) -> Batch:
  """A batch of padding, for its shapes and dtypes. It needs no data.

  Args:
    name: A key of `LAYOUTS`.
    num_rows: Rows of the batch.
    seq_len: T.
    num_labels: Outputs of the model, if the layout has labels. 1: they are numbers, or one class.
  """
  inputs = Inputs(has_classes=num_labels > 1, num_labels=num_labels)
  return LAYOUTS[name].make(inputs).batch([], num_rows, seq_len)


def make(
  name: str, splits: Sequence[tuple[str, source.Split]], inputs: Inputs | None = None
) -> Layout:
  """Makes a layout for some splits.

  Args:
    name: A key of `LAYOUTS`.
    splits: (name, split) of each source.
    inputs: Values that the layout needs. The classes of the splits replace `has_classes`.

  Raises:
    UserError: The layout can't take a split's kind of data (`KindError`), or the splits have
      different classes.
  """
  entry = LAYOUTS[name]
  first_name, first = splits[0]
  for other, split in splits:
    if split.kind not in entry.kinds:
      raise KindError(name, other, split.kind)
    if split.label_names != first.label_names:
      raise UserError(
        f"{other!r} and {first_name!r} have different classes: {', '.join(split.label_names)} "
        f"and {', '.join(first.label_names)}; prepare them together, or name all classes in the "
        "order of the model's outputs with model.label_names"
      )
  inputs, classes = inputs or Inputs(), len(first.label_names)
  return entry.make(
    inputs._replace(has_classes=bool(classes), num_labels=inputs.num_labels or classes)
  )
