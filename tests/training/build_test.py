"""Objective, optimizer and schedule are checked by name and against the config, before any data."""

import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.training import build, objectives, optimizers, schedules


@pytest.mark.parametrize(
  "change, words",
  [
    ({"optim.name": "adam"}, "optim.name='adam': did you mean 'adamw'"),
    ({"objective.name": "causal"}, "objective.name='causal': did you mean 'causal_lm'"),
    ({"schedule.name": "cosin"}, "schedule.name='cosin': did you mean 'cosine'"),
    ({"model.causal": False}, "causal_lm.*model.causal=True"),
    ({"model.head": "classifier"}, "objective.name='causal_lm' needs model.head='lm'"),
    (
      {"objective.name": "masked_lm", "model.causal": False, "data.stream": "x"},
      "data.stream='x' is for .*causal_lm",
    ),
    ({"optim.options.gamma": 1.0}, "optim.options are for your own .*'adamw' is built in .* gamma"),
    ({"objective.name": "preference"}, "set model.lora.rank"),
    ({"optim.name": "lion", "optim.second_dtype": "bfloat16"}, "has no such moment"),
  ],
)
def test_a_config_that_does_not_suit_is_refused(change, words):
  c = config.base()
  c.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=words):
    build.check(c)


def test_every_built_in_object_has_a_summary():
  for entries in (objectives.OBJECTIVES, optimizers.OPTIMIZERS, schedules.SCHEDULES):
    assert all(entry.summary for entry in entries.values())
