import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.hf.layout import Layout

PATTERNS = [
  ("(N H) D -> D N H", (6, 4, 5), {}),
  ("D (N H) -> N H D", (4, 5, 6), {}),
  ("V D -> D V", (7, 3), {}),
  ("(N H) -> N H", (4, 5), {}),
  ("(N P Q) D -> D N (Q P)", (6, 4, 10), {"Q": 2}),
  ("E D F -> E D F", (2, 3, 4), {}),
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PATTERNS), st.data())
def test_a_part_is_read_as_the_whole_has_it(case, data):
  pattern, shape, given_sizes = case
  layout = Layout(pattern, shape, **given_sizes)
  ours = np.arange(np.prod(shape)).reshape(shape)
  theirs = layout.to_theirs(ours)
  assert theirs.shape == layout.their_shape
  index = []
  for group, n in zip(pattern.split("->")[1].replace("(Q P)", "_").split(), shape):
    start = 0 if group == "_" else data.draw(st.integers(0, n - 1))
    index.append((start, n if group == "_" else data.draw(st.integers(start + 1, n))))
  region, convert = layout.region(index)
  box = theirs[tuple(slice(*r) for r in region)]
  np.testing.assert_array_equal(convert(box), ours[tuple(slice(*i) for i in index)])


def test_a_linear_layer_is_transposed_and_split():
  weight = np.arange(24).reshape(6, 4)  # [out, in] of 3 heads of 2
  layout = Layout("(N H) D -> D N H", (4, 3, 2))
  _, convert = layout.region([(0, 4), (0, 3), (0, 2)])
  np.testing.assert_array_equal(convert(weight), weight.T.reshape(4, 3, 2))


def test_sizes_that_do_not_follow_are_an_error():
  with pytest.raises(ValueError, match="not given"):
    Layout("(N P Q) D -> D N (Q P)", (6, 4, 10))
  with pytest.raises(ValueError, match="letters on the two sides differ"):
    Layout("A B -> B C", (1, 2))
