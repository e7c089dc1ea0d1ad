"""Drafts from the text itself."""

import pytest

from jaxgpt.inference.engine.drafting import ngrams


@pytest.mark.parametrize(
  "text, most, want",
  [
    ("", 4, ""),
    ("a", 4, ""),
    ("abc", 4, ""),  # nothing stood before
    ("abcd-abc", 4, "d-ab"),  # the longest match
    ("xbcA abcB ybcC zbc", 1, "C"),  # the latest
    ("abcA bcB c", 3, "B c"),  # one token alone
    ("abcA..abc", 9, "A..abc"),  # as far as the text goes
    ("aaaaaaaa", 3, "aaa"),  # a latest place with enough after it
  ],
)
def test_what_followed_the_last_tokens_before(text, most, want):
  assert bytes(ngrams.following(list(text.encode()), most).tolist()).decode() == want
