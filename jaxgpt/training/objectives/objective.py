"""What an objective is, and the registry of those that are built in.

The train step, the loop and the evaluation know an objective only as its loss function, see the
package's docstring.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import ml_collections

from jaxgpt.config import user_code
from jaxgpt.config.registry import Registry
from jaxgpt.model.transformer import Transformer
from jaxgpt.tree import PyTree

Batch: TypeAlias = dict[str, Any]  # name -> array, or a dict of arrays
Aux: TypeAlias = dict[str, jax.Array]
LossFn: TypeAlias = Callable[
  [PyTree, PyTree | None, Batch, jax.Array | None], tuple[jax.Array, jax.Array, Aux]
]


class Stored(NamedTuple):
  """How an objective computes ahead what its fixed model says of each row, see `training.stored`.

  Attributes:
    compute: From the fixed model and the config's `objective` section, the function (its weights,
      batch) -> {name: array [B, …]}, or [B, T, …] in the order of the batch's tokens. Batches of
      training then have these arrays.
    shapes: From the config, {name: (shape of the array without B, dtype)}.
    evaluates: Evaluation needs the arrays too. Otherwise the loss function does without them.
  """

  compute: Callable[
    [Transformer, ml_collections.ConfigDict], Callable[[PyTree, Batch], dict[str, jax.Array]]
  ]
  shapes: Callable[[ml_collections.ConfigDict], dict[str, tuple[tuple[int, ...], Any]]]
  evaluates: bool


@dataclasses.dataclass(frozen=True)
class Objective:
  """A training objective.

  Attributes:
    loss_fn: Makes the loss function from the model and the config's `objective` section, and from
      the teacher's model if `fixed` has one. Batches that it gets have their tokens in the order of
      `token_order.balance`.
    layout: Name of the row layout it reads, a key of `data.layouts.LAYOUTS`.
    sequences: Sequences of each row that the model reads: 2 for pairs. A plan counts them.
    head: The `model.head` that it needs, such as 'lm', or several to choose from.
    causal: Whether it needs `model.causal`.
    loss_chunk: Whether it implements `objective.loss_chunk`.
    qk_clip: Whether its aux has the largest attention logits that `optim.qk_clip` needs.
    whole_batch: Whether its loss compares the rows of a batch. It then gets all rows of a step at
      once, and `loss_fn` the number of microbatches, as the keyword `microbatches`. See
      `objectives.microbatches.mapped`.
    fixed: From the config, the fixed models that the loss compares the trained one with: names of
      `model.fixed_models`, whose weights the loss function then finds in `frozen`.
    stored: How to compute ahead what the fixed model says, for `objective.stored`, or None.
    check: Raises a UserError if the config does not suit it. It gets the whole config, whose
      derived keys may still be None.
    summary: A few words for docs/config.md.
  """

  loss_fn: Callable[..., LossFn]
  layout: str = "causal_lm"
  sequences: int = 1
  head: str | tuple[str, ...] = "lm"
  causal: bool = False
  loss_chunk: bool = False
  qk_clip: bool = False
  whole_batch: bool = False
  fixed: Callable[[ml_collections.ConfigDict], tuple[str, ...]] = lambda c: ()
  stored: Stored | None = None
  check: Callable[[ml_collections.ConfigDict], None] = lambda c: None
  summary: str = ""

  @property
  def heads(self) -> tuple[str, ...]:
    """The values of `model.head` that it takes, the usual one first."""
    return (self.head,) if isinstance(self.head, str) else self.head


OBJECTIVES: Registry[Objective] = Registry("objective.name")


def find(c: ml_collections.ConfigDict) -> Objective:
  """The objective of a config: an entry of `OBJECTIVES`, or an object of a user's file.

  Raises:
    UserError: There is none of that name.
  """
  return user_code.find(OBJECTIVES, Objective, c.objective.name, c.code_folder)
