"""Fixed models: whole models that a loss compares the trained one with, and that never change.

  reference   the weights that training started from (preference optimization)
  teacher     another model with the same vocabulary (distillation)

Their weights are part of the frozen parameters, each tree under its model's name, next to the
trained model's own frozen weights:

  frozen = {"embed": …, "reference": {"layers": …}, "teacher": {"embed": …, "layers": …}}

So they are sharded, restored and counted like all frozen parameters, and the optimizer knows
nothing of them. A reference holds only copies of what is trained, since the rest is shared.
"""

from typing import Any

from jaxgpt.tree import PyTree

REFERENCE, TEACHER = "reference", "teacher"
NAMES = (REFERENCE, TEACHER)


def split(params: PyTree | None) -> tuple[dict[str, Any], dict[str, PyTree]]:
  """Splits a tree of parameters into the model's own and those of fixed models.

  Args:
    params: Parameters, or None.

  Returns:
    (the model's own parameters, {name in `NAMES`: parameters}).
  """
  params = params or {}
  own = {name: value for name, value in params.items() if name not in NAMES}
  return own, {name: params[name] for name in NAMES if name in params}
