"""What labels are, in which order classes come, and what a user must say."""

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import labels


def seen(found, listed=False):
  out = labels.Seen()
  for number, label in enumerate(found, 1):
    out.add(label, f"f:{number}", listed)
  return out


@pytest.mark.parametrize(
  "found, names",
  [
    ([3, 1, 10], ("1", "3", "10")),
    (["10", "9", "1"], ("1", "9", "10")),  # as a CSV has them
    (["1", 1, "0"], ("0", "1")),
    ([2, "b", "10", "a"], ("2", "10", "a", "b")),
    ([-1, 0, 1], ("-1", "0", "1")),
    (["b", "a"], ("a", "b")),
    (["01", "1"], ("01", "1")),  # two classes, whatever their value
    ([0.5, 1.5], ()),
    (["0.5", "1e3"], ()),
    (["nan", "inf", "0x1"], ("0x1", "inf", "nan")),  # no numbers
    (["1.2.3", "1-2"], ("1-2", "1.2.3")),
  ],
)
def test_order_of_the_classes(found, names):
  assert labels.choose(seen(found)) == names
  assert labels.choose(seen(found[::-1])) == names


@given(
  st.lists(st.one_of(st.integers(-50, 50), st.sampled_from(["a", "B", "é", "7b"])), min_size=1),
  st.randoms(use_true_random=False),
)
def test_the_order_depends_neither_on_types_nor_on_rows_nor_on_tasks(found, rng):
  want = labels.choose(seen(found))
  as_text = [str(label) if rng.random() < 0.5 else label for label in found]
  rng.shuffle(as_text)
  cut = rng.randrange(len(found) + 1)
  both = labels.Seen()
  for part in (as_text[:cut], as_text[cut:]):
    both.merge(json.loads(json.dumps(dataclasses.asdict(seen(part)))))
  assert labels.choose(both) == want
  assert sum(count for count, _ in both.classes.values()) == len(found)


@pytest.mark.parametrize(
  "found, words",
  [
    ([1, 0, 1, 0.5, 1], r"1 are with a fraction, such as '0.5' in f:4, and 4 are whole numbers"),
    (["good", "bad", "0.5"], r"1 are with a fraction, such as '0.5' in f:3, and 2 are no numbers"),
    ([0.1, 0.2, "x", 3], r"2 are with a fraction.*1 are no numbers, such as 'x' in f:3"),
  ],
)
def test_two_kinds_of_labels_need_a_word_of_the_user(found, words):
  with pytest.raises(UserError, match=words) as e:
    labels.choose(seen(found))
  assert "--labels=A,B,C" in str(e.value)


def test_the_user_says_what_labels_are():
  assert labels.choose(seen([1, 0.5, "2"]), labels.parse("numbers")) == ()
  assert labels.choose(seen(["neg", "pos"]), labels.parse("pos, neg")) == ("pos", "neg")
  versions = seen([3.9, "3.10"], listed=True)
  assert labels.choose(versions, labels.parse("3.10,3.9")) == ("3.10", "3.9")
  assert labels.choose(seen(["a"]), labels.parse('["a", "b, c"]')) == ("a", "b, c")
  with pytest.raises(UserError, match=r"1 are no numbers, such as 'x' in f:2"):
    labels.choose(seen([0.5, "x"]), labels.parse("numbers"))
  with pytest.raises(UserError, match=r"2 labels .* not among them, such as 'y' \(f:2\), 'z'"):
    labels.choose(seen(["x", "y", "z"]), labels.parse("x,w"))


@pytest.mark.parametrize("text", ["a", "a,,b", "a,b,a", "[1", '["a"]', ","])
def test_a_list_of_classes_that_says_nothing(text):
  with pytest.raises(UserError, match="labels="):
    labels.parse(text)


def test_a_line_tells_what_was_found():
  many = seen([*range(12), 3])
  assert labels.describe(many, labels.choose(many)) == (
    "labels: 12 classes in this order: 0 (1), 1 (1), 2 (1), 3 (2), 4 (1), 5 (1), 6 (1), 7 (1), "
    "… 4 more"
  )
  assert "numbers from -1.5 to 2.5, so this is a regression" in labels.describe(
    seen([2.5, -1.5]), ()
  )
  assert "numbers from 1 to 5" in labels.describe(seen([1, 2.5, 5]), ())


def test_too_many_classes(monkeypatch):
  monkeypatch.setattr(labels, "MOST", 5)
  with pytest.raises(UserError, match="more than 5 different labels, such as 5 in f:6"):
    seen(range(9))
  seen([random.random() for _ in range(9)])  # numbers are no classes
