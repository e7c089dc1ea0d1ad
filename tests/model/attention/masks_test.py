"""Bands: which blocks they leave, and their labels."""

import numpy as np
import pytest

from jaxgpt.model.attention import masks
from jaxgpt.model.attention.masks import Band

BANDS = [
  Band(),
  Band(causal=True),
  Band(causal=True, window=3),
  Band(window=5),
  Band(causal=True, window=9, offset=8),
  Band(window=4, offset=-6),
]


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("blocks", [(4, 4), (2, 8), (8, 2), (1, 1)])
def test_blocks_with_a_visible_pair(band, blocks):
  T, S, (q, k) = 16, 24, blocks
  pairs = np.asarray(band.array(T, S)).reshape(T // q, q, S // k, k)
  np.testing.assert_array_equal(band.blocks(T, S, q, k), pairs.any((1, 3)))


@pytest.mark.parametrize("band", BANDS)
def test_labels_are_read_from_the_names_of_instructions(band):
  name = f"jit(step)/transpose(jvp({band.label(512, 256)}))/vmap(kernel)"
  assert masks.read_label(name) == (band, 512, 256)
  assert masks.read_label("jit(step)/kernel") is None
