"""Declarations of config keys: consistency, ranges, and no second list of keys anywhere."""

import ast
import pathlib

import pytest

from jaxgpt import config
from jaxgpt.config.keys import KEYS, SECTIONS
from jaxgpt.config.schema import ABOVE_0, AT_LEAST_1, BELOW_1, FRACTION, Key
from jaxgpt.errors import UserError

PACKAGE = pathlib.Path(__file__).parents[2] / "jaxgpt"
# Literals with names of keys that declare nothing: (file, a name in it): reason.
ALLOWED = {
  ("plan/search/candidates.py", "model.remat"): "overrides that it writes for the user",
  ("plan/search/candidates.py", "optim.accumulate"): "overrides that it writes for the user",
  ("plan/search/candidates.py", "data.batch_size"): "overrides that it writes for the user",
  ("plan/search/candidates.py", "objective.loss_chunk"): "overrides that it writes for the user",
  ("plan/search/search.py", "model.materialize"): "overrides that it writes for the user",
  ("plan/search/search.py", "model.remat"): "names of groups of candidates",
  ("plan/search/search.py", "objective.loss_chunk"): "names of groups of candidates",
  ("plan/explain.py", "model.remat"): "overrides that a plan writes for the user",
  ("plan/explain.py", "optim.accumulate"): "overrides that a plan writes for the user",
  ("plan/explain.py", "data.batch_size"): "overrides that a plan writes for the user",
  ("text/prepare/data_card.py", "data.seq_len"): "an example config to paste",
  ("hf/rotary.py", "attention_factor"): "translates keys to Hugging Face's names",
  ("hf/rotary.py", "rope.factor"): "translates keys to Hugging Face's names",
  ("hf/rotary.py", "rope.theta"): "translates keys to Hugging Face's names",
}


def test_the_base_config_has_the_declared_keys():
  assert config.flatten(config.base()).keys() == KEYS.keys()


def test_declarations_are_complete_and_valid():
  for name, section in SECTIONS.items():
    assert section.help.endswith("."), name
  for name, key in KEYS.items():
    assert key.help.endswith("."), name
    assert (key.default is None) == (key.value_type is not None) == bool(key.unset), name
    assert key.derive is None or key.default is None, name
    key.validate(name, key.default)


def test_sections_are_locked_except_for_options():
  c = config.base()
  with pytest.raises(AttributeError):
    c.optim.lrr = 1
  with pytest.raises(AttributeError):
    c.new = 1
  for name, section in SECTIONS.items():
    if section.user_keys:
      c.update_from_flattened_dict({f"{name}.anything": 1})


@pytest.mark.parametrize(
  "interval, inside, outside, words",
  [
    (AT_LEAST_1, (1, 5), (0, -1), "at least 1"),
    (ABOVE_0, (1e-9, 3), (0, -1), "above 0"),
    (FRACTION, (0, 0.5, 1), (-0.1, 1.1), r"in \[0, 1\]"),
    (BELOW_1, (0, 0.999), (1, -0.1), r"in \[0, 1\)"),
  ],
)
def test_intervals(interval, inside, outside, words):
  key = Key(0.5, "", interval=interval)
  for value in inside:
    key.validate("a.b", value)
  for value in outside:
    with pytest.raises(UserError, match=f"a.b={value}: must be {words}"):
      key.validate("a.b", value)


def lists_of_keys(path):
  """Yields names of keys in the list, tuple, set and dict literals of a file.

  A literal counts if it contains a flat name ('optim.lr'), or if it has at least three strings,
  all of which are keys below the same section ('lr', 'options.x'). The sections `mesh` and
  `mesh.rules` do not count: their keys also name mesh axes and logical axes in annotations.
  """
  sections = [
    {key for key, _ in section.flat_keys()}
    for name, section in SECTIONS.items()
    if name.split(".")[0] != "mesh"
  ]
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
      elements = node.elts
    elif isinstance(node, ast.Dict):
      elements = [key for key in node.keys if key is not None]
    else:
      continue
    names = [e.value for e in elements if isinstance(e, ast.Constant) and isinstance(e.value, str)]
    yield from (name for name in names if "." in name and name in KEYS)
    if len(names) >= 3 and any(set(names) <= section for section in sections):
      yield names[0]


@pytest.mark.parametrize(
  "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_no_second_list_of_keys(path):
  file = str(path.relative_to(PACKAGE))
  again = [name for name in lists_of_keys(path) if (file, name) not in ALLOWED]
  assert not again, f"{again} are declared in jaxgpt/config; derive the list from there"


def test_every_exception_is_needed():
  for file, name in ALLOWED:
    assert name in lists_of_keys(PACKAGE / file), (file, name)


def test_a_second_list_would_be_found(tmp_path):
  file = tmp_path / "x.py"
  file.write_text("""A = ("optim.lr",)\nB = {"lr": 1, "b1": 2, "b2": 3}\nC = ("lr", "b1", "x")\n""")
  assert list(lists_of_keys(file)) == ["optim.lr", "lr"]
