"""Options that are declared once: defaults, checks and reading follow from the declaration."""

import dataclasses

import pytest

from jaxgpt.config import options
from jaxgpt.config.options import integer, key_value, option
from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  path: str = option(positional=True, metavar="DIR", help="a folder")
  split: str = option("train", choices=("train", "test"), help="a split")
  share: float = option(0.5, above=0, below=1, help="a share")
  seq_len: int | None = integer(None, least=1, help="a length")
  tags: tuple[tuple[str, str], ...] = option((), flag="tag", parse=key_value(), help="tags")
  search: bool = option(False, modes=("search",), selects={True: "search"}, help="search")
  draw: str = option("", selects={"all": "draw"}, help="draw")
  finalists: int = integer(0, modes=("search",), help="plans")
  overrides: tuple[str, ...] = options.overrides()

  def __post_init__(self) -> None:
    options.check(self)


BY_NAME = {o.name: o for o in options.declared(Example)}


def test_a_declaration_knows_its_field():
  assert [o.label for o in BY_NAME.values()] == [
    "DIR", "--split", "--share", "--seq-len", "--tag", "--search", "--draw", "--finalists",
  ]  # fmt: skip
  assert BY_NAME["path"].required and not BY_NAME["share"].required
  assert BY_NAME["tags"].repeated and BY_NAME["seq_len"].value_type is int
  assert BY_NAME["split"].value_name == "{train,test}" and BY_NAME["share"].value_name == "X"
  assert (
    BY_NAME["share"].range_text() == "> 0 and < 1" and BY_NAME["finalists"].range_text() == "≥ 0"
  )
  assert options.takes_overrides(Example) == "overrides"
  assert options.flags(Example)[0] == "--split"


@pytest.mark.parametrize(
  "values, message",
  [
    ({"split": "trian"}, r"split='trian': did you mean 'train'\? choose one of train, test"),
    ({"share": 1.0}, "share=1.0 must be above 0 and below 1"),
    ({"share": float("nan")}, "share=nan must be above 0"),
    ({"seq_len": 0}, "seq_len=0 must be at least 1"),
    ({"seq_len": 2**31}, r"must be at least 1 and below 2\^31"),
  ],
)
def test_values_are_checked_where_they_are_declared(values, message):
  with pytest.raises(UserError, match=message):
    Example(path="x", **values)


@pytest.mark.parametrize(
  "name, text, value",
  [
    ("seq_len", "3", 3),
    ("share", "1e-2", 0.01),
    ("split", "test", "test"),
    ("tags", "a=b=c", ("a", "b=c")),
  ],
)
def test_text_becomes_a_value(name, text, value):
  assert BY_NAME[name].read(text) == value


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("seq_len", "x", "'x' is not an integer"),
    ("share", "x", "'x' is not a number"),
    ("share", "2", "2 must be above 0 and below 1"),
    ("split", "all", "all: choose one of"),
    ("tags", "a", "'a' is not of the form KEY=VALUE"),
  ],
)
def test_text_that_is_no_value_is_refused_with_the_reason(name, text, message):
  with pytest.raises(ValueError, match=message):
    BY_NAME[name].read(text)


def test_an_option_that_the_mode_does_not_use_is_refused():
  options.refuse_unused(Example(path="x", finalists=3, search=True), "search")
  options.refuse_unused(Example(path="x"), "compile")
  with pytest.raises(UserError, match="--finalists needs --search: add it"):
    options.refuse_unused(Example(path="x", finalists=3), "compile")
  with pytest.raises(UserError, match="--search has no effect with --draw=all"):
    options.refuse_unused(Example(path="x", search=True), "draw")


def test_a_command_hands_on_the_options_of_a_library_function():
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class More(Example):
    out: str = option(help="a folder")

  given = options.take(More(path="x", out="y", share=0.25), Example)
  assert Example(**given) == Example(path="x", share=0.25)
