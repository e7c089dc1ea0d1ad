"""Batches by length: every row once, in few lengths, the same on any number of devices."""

import random

from jaxgpt.tasks.predict import batching


def test_lengths_are_few_and_padding_is_bounded():
  assert [batching.padded(n, 200) for n in (1, 16, 17, 24, 25, 33, 64, 65, 96, 97, 150, 200)] == [
    *(16, 16, 24, 24, 32, 48, 64, 96, 96, 128, 192, 200)
  ]


def test_each_row_is_in_one_batch_that_does_not_depend_on_the_devices():
  rng = random.Random(0)
  lengths = [rng.randint(1, 90) for _ in range(101)]
  batches = {}
  for shards in (1, 2, 3, 8):
    found = set()
    for step in batching.steps(lengths, 4, shards, 90):
      assert len(step.batches) == shards
      for batch in filter(None, step.batches):
        assert len(batch) <= 4 and max(lengths[i] for i in batch) <= step.length
        found.add((step.length, *batch))
    assert sorted(i for _, *batch in found for i in batch) == list(range(101))
    batches[shards] = found
  assert all(found == batches[1] for found in batches.values())
