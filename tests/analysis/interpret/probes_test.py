"""Linear probes: they find what is linear in activations, and control tasks tell memorizing."""

import numpy as np
import pytest

from jaxgpt.analysis.interpret import probes
from jaxgpt.errors import UserError


def test_a_probe_finds_a_linear_property_and_not_the_control_task():
  rng = np.random.default_rng(0)
  types = rng.integers(0, 100, 1500)
  labels = types % 2
  direction = rng.normal(size=16)
  x = rng.normal(size=(1500, 16)) + 3 * labels[:, None] * direction
  found = probes.probe(x, labels, types)
  assert found.accuracy > 0.97
  assert 0.4 < found.control < 0.65
  assert found.selectivity == found.accuracy - found.control > 0.3
  assert (found.classes, found.held_out) == (2, 450)
  assert found.majority < 0.6


def test_a_probe_of_noise_is_at_chance_on_examples_that_it_was_not_fitted_to():
  rng = np.random.default_rng(1)
  found = probes.probe(rng.normal(size=(1500, 16)), rng.integers(0, 2, 1500))
  assert 0.4 < found.accuracy < 0.6
  assert found.control is None and found.selectivity is None


def test_a_probe_needs_two_classes():
  with pytest.raises(UserError, match="got 1 classes and 9 examples"):
    probes.probe(np.zeros((9, 2)), np.zeros(9, int))
