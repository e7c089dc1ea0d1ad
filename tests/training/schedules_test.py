import pytest

from jaxgpt import config
from jaxgpt.training import schedules


def rate(step, steps=100, **fields):
  c = config.base()
  c.train.steps = steps
  c.schedule.update(dict(warmup_steps=10, final_ratio=0.1, decay_fraction=0.2) | fields)
  return float(schedules.make(c)(step))


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_warmup_rises_in_equal_steps_and_wastes_none(name):
  assert [rate(i, name=name) for i in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])


@pytest.mark.parametrize(
  "name, step, want",
  [
    ("cosine", 55, 0.55),
    ("cosine", 100, 0.1),
    ("linear", 55, 0.55),
    ("linear", 100, 0.1),
    ("wsd", 79, 1.0),
    ("wsd", 90, 0.55),
    ("wsd", 100, 0.1),
    ("inverse_sqrt", 40, (10 / 40) ** 0.5),
    ("constant", 100, 1.0),
  ],
)
def test_values_after_warmup(name, step, want):
  assert rate(step, name=name) == pytest.approx(want)


def test_no_warmup_starts_at_the_peak():
  assert rate(0, name="cosine", warmup_steps=0) == 1.0
