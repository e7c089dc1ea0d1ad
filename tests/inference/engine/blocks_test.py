"""Blocks of a paged cache: holders, prompts found again, and running out."""

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.inference.engine.blocks import SPARE, Blocks


def test_a_prompt_that_begins_alike_is_found_up_to_the_first_difference():
  blocks = Blocks(8, 2)
  a = blocks.take(3)
  blocks.publish([1, 2, 3, 4, 5], a)
  assert blocks.find([1, 2, 3, 4, 9, 9]) == a[:2]
  assert blocks.find([1, 2, 3]) == a[:1]
  assert blocks.find([3, 4]) == [], "what is before a block is part of what it is found by"
  assert blocks.find([1, 2, 3, 4, 5, 6]) == a[:2], "the last block is not full"


def test_a_block_is_found_only_by_prompts_that_compute_it_in_chunks_of_the_same_size():
  blocks = Blocks(8, 2)
  tokens = [1, 2, 3, 4, 5, 6]
  a = blocks.take(3)
  blocks.publish(tokens, a, large=4)
  assert blocks.find(tokens) == []
  assert blocks.find(tokens[:4], large=4) == a[:2]
  assert blocks.find(tokens, large=4) == a
  assert blocks.find(tokens, large=6) == a[:2]


def test_blocks_are_found_until_their_place_is_needed_and_the_longest_unused_goes_first():
  blocks = Blocks(3, 1)
  for token in (1, 2, 3):
    taken = blocks.take(1)
    blocks.publish([token], taken)
    blocks.release(taken)
  assert blocks.free == 3
  blocks.release(blocks.find([1]))  # used again
  (kept,) = blocks.find([3])
  blocks.take(1)
  assert not blocks.find([2])
  assert blocks.find([3]) == [kept]
  assert blocks.free == 1 and blocks.take(2) is None
  assert blocks.find([1])


def test_a_block_with_two_holders_is_free_after_both_let_go():
  blocks = Blocks(1, 1)
  one = blocks.take(1)
  blocks.publish([5], one)
  assert blocks.find([5]) == one
  blocks.release(one)
  assert blocks.free == 0 and blocks.take(1) is None
  blocks.release(one)
  assert blocks.take(1) == one


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), max_size=6)), max_size=40))
def test_no_block_is_lost_or_given_twice(actions):
  """Requests come and go at random. Contents are checked by a model of the pool."""
  blocks, held, content = Blocks(6, 2), [], {}
  for kind, prompt in actions:
    if kind and held:
      blocks.release(held.pop(kind % len(held))[0])
      continue
    found = blocks.find(prompt)
    for i, block in enumerate(found):
      assert content[block] == prompt[: 2 * i + 2], "found content is the prompt's"
    fresh = blocks.take(max(blocks.needed(len(prompt)) - len(found), 0))
    if fresh is None:
      blocks.release(found)
      continue
    others = {b for own, _ in held for b in own}
    assert not others & set(fresh) and SPARE not in fresh
    own = found + fresh
    for i, block in enumerate(own):
      if block in fresh:
        content[block] = prompt[: 2 * i + 2]
    blocks.publish(prompt, own)
    held.append((own, prompt))
  used = {b for own, _ in held for b in own}
  assert blocks.free == 6 - len(used)
