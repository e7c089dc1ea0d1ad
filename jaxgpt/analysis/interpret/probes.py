"""Linear probes with control tasks: information that can be read linearly from activations.

A probe that predicts a property well may have learned it by itself. A control task tells: random
labels, one for each type of token, which the activations cannot know about. Selectivity is the
accuracy of the probe minus that of the same probe on the control task (Hewitt and Liang,
arXiv:1909.03368).

M examples, D activations, K classes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt.errors import UserError

_STEPS = 300


class Probe(NamedTuple):
  """The result of a probe, on examples that it was not fitted to.

  Attributes:
    accuracy: Share of right answers.
    control: The same for the control task, or None without one.
    majority: Share of the most frequent class, which takes no activations.
    classes: Number of classes.
    held_out: Number of examples that the accuracy is measured on.
  """

  accuracy: float
  control: float | None
  majority: float
  classes: int
  held_out: int

  @property
  def selectivity(self) -> float | None:
    """Accuracy above the control task."""
    return None if self.control is None else self.accuracy - self.control


def probe(
  activations_MD: Any,
  labels_M: Any,
  types_M: Any | None = None,
  *,
  seed: int = 0,
  held_out: float = 0.3,
  l2: float = 1e-3,
) -> Probe:
  """Fits a linear classifier to activations.

  Args:
    activations_MD: Activations, such as one layer of `resid_post` at some positions.
    labels_M: Class numbers from 0.
    types_M: What the control task labels at random, such as token ids. None: no control task. Types
      occur on both sides of the split, or the control would be at chance for another reason.
    seed: Seed of the split and of the control labels.
    held_out: Share of the examples to measure on.
    l2: Weight of the L2 penalty.

  Raises:
    UserError: There are fewer than two classes, or too few examples.
  """
  x = np.asarray(activations_MD, np.float32)
  # Numbers without gaps: the control task has as many classes as occur.
  y = np.unique(np.asarray(labels_M), return_inverse=True)[1]
  classes, rng = int(y.max()) + 1, np.random.default_rng(seed)
  cut = round(len(y) * held_out)
  if len(set(y.tolist())) < 2 or not 0 < cut < len(y) - 1:
    raise UserError(
      f"a probe needs two classes and examples to hold out, got {len(set(y.tolist()))} classes and "
      f"{len(y)} examples; give more text"
    )
  order = rng.permutation(len(y))
  test, train = order[:cut], order[cut:]
  x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
  score = lambda labels: float(
    (_fit(x[train], labels[train], x[test], classes, l2) == labels[test]).mean()
  )
  control = None
  if types_M is not None:
    types, index = np.unique(np.asarray(types_M), return_inverse=True)
    control = score(rng.permutation(np.arange(len(types)) % classes)[index])
  majority = float(np.bincount(y[test]).max() / cut)
  return Probe(score(y), control, majority, classes, cut)


@functools.partial(jax.jit, static_argnames="classes")
def _fit(x_MD: Any, y_M: Any, test_MD: Any, classes: int, l2: float) -> jax.Array:
  """Multinomial logistic regression: the predicted classes of the test examples."""
  optimizer = optax.adam(optax.cosine_decay_schedule(0.05, _STEPS))
  params = (jnp.zeros((x_MD.shape[1], classes)), jnp.zeros(classes))

  def loss(params: Any) -> jax.Array:
    w, b = params
    nll = optax.softmax_cross_entropy_with_integer_labels(x_MD @ w + b, y_M)
    return nll.mean() + l2 * jnp.square(w).sum()

  def step(state: Any, _: None) -> tuple[Any, None]:
    params, inner = state
    updates, inner = optimizer.update(jax.grad(loss)(params), inner)
    return (optax.apply_updates(params, updates), inner), None

  (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, _STEPS)
  return (test_MD @ params[0] + params[1]).argmax(-1)
