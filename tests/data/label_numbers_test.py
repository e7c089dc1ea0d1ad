"""The numbers of classes agree by name between data and model, or the error has both lists."""

import pytest

from jaxgpt.data import label_numbers
from jaxgpt.errors import UserError


@pytest.mark.parametrize(
  "data, model, numbers",
  [
    (["bad", "good"], ["good", "bad"], [1, 0]),
    (["bad", "good"], ["bad", "good"], [0, 1]),
    (["good"], ["bad", "good", "so-so"], [1]),  # not every class need occur
    (["negative", "positive"], ["POSITIVE", "NEGATIVE"], [1, 0]),
    (["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2]),
    (["1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"], [1, 2]),  # by number, not by order
    (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"], [0, 1]),
    (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], [1, 0]),
    (["1", "0"], ["0", "1"], [1, 0]),
    (["bad", "good"], ["LABEL_0", "LABEL_1"], None),
    (["1", "2"], ["LABEL_0", "LABEL_1"], None),  # class 2 of two classes
    (["1", "01"], ["LABEL_0", "LABEL_1"], None),
    (["0", "1"], ["negative", "positive"], None),
    (["bad", "worse"], ["bad", "good"], None),
    (["a", "A"], ["A", "b"], None),
    (["a"], ["A", "a", "b"], [1]),
    (["B"], ["b", "A", "a"], None),  # A and a: letters' case counts here
  ],
)
def test_names_agree_or_nothing_does(data, model, numbers):
  assert label_numbers.find(data, model) == numbers
  if numbers is None:
    with pytest.raises(UserError, match=r"d has the classes .* but the model has ") as e:
      label_numbers.numbering(data, model, "d")
    assert all(name in str(e.value) for name in (*data, *model))
