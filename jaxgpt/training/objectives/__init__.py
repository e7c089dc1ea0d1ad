"""Objectives: the loss functions that a model can be trained on.

The train step, the loop and the evaluation know an objective only as its loss function:

  loss_fn(params, frozen, batch, key) -> (weighted loss sum, weight sum, aux)

`params` are the trained parameters, `frozen` the other parameters of the same tree or None. `key`
is the step's PRNG key, or None in evaluation, which turns dropout off. `aux` is a dict of further
weighted sums, which are reported per weight. All are sums, not means: the train step divides once
by the weight of the global batch, so the result depends neither on the mesh nor on the number of
microbatches.

An entry of `OBJECTIVES` says how to make the loss function, which row layout it reads and which
models it can train.

B batch, T position, V vocabulary.

Each objective has a file of its own, which adds it to `OBJECTIVES`. Messages and documentation list
them in the order of the imports below.
"""

# isort: off
from jaxgpt.training.objectives.objective import (
  OBJECTIVES,
  Aux,
  Batch,
  LossFn,
  Objective,
  Stored,
  find,
)
from jaxgpt.training.objectives.forward import apply, balanced, make, make_stored, router_terms
from jaxgpt.training.objectives.checks import HEADS, check, head_problem
from jaxgpt.training.objectives import language_model
from jaxgpt.training.objectives import classification
from jaxgpt.training.objectives import preference
from jaxgpt.training.objectives import multi_label
from jaxgpt.training.objectives import token_classification
from jaxgpt.training.objectives import question_answering
from jaxgpt.training.objectives import contrastive
from jaxgpt.training.objectives import distillation
# isort: on

__all__ = [
  "HEADS",
  "OBJECTIVES",
  "Aux",
  "Batch",
  "LossFn",
  "Objective",
  "Stored",
  "apply",
  "balanced",
  "check",
  "classification",
  "contrastive",
  "distillation",
  "find",
  "head_problem",
  "language_model",
  "make",
  "make_stored",
  "multi_label",
  "preference",
  "question_answering",
  "router_terms",
  "token_classification",
]
