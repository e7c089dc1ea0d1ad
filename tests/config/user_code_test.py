"""Objects of user files are found relative to the config file, and mistakes name file and line."""

import pytest

from jaxgpt import config
from jaxgpt.config import user_code
from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError

NUMBERS: Registry[int] = Registry("optim.name")
NUMBERS.add("one", 1)


def find(name, folder):
  return user_code.find(NUMBERS, int, name, folder)


def test_built_in_names_and_user_files(tmp_path):
  (tmp_path / "a.py").write_text("import math\nTwo = math.floor(2.5)\n")
  assert find("one", tmp_path) == 1
  assert find("a.py:Two", tmp_path) == 2
  (tmp_path / "a.py").write_text("Two = 22\n")
  assert find("a.py:Two", tmp_path) == 22, "a changed file is executed again"


@pytest.mark.parametrize(
  "name, words",
  [
    ("onne", "optim.name='onne': did you mean 'one'"),
    ("b.py:Two", "b.py cannot be read .*relative to the config file"),
    ("a.py:Three", "a.py has no 'Three'; the file has Two: Three = int"),
    ("a.py:Text", "Text is a str, not a int"),
    ("../a.py:Two", "next to it or below"),
    ("a.py:", "write FILE.py:NAME"),
    ("broken.py:Two", r"broken.py:2: ZeroDivisionError: division by zero"),
    ("syntax.py:Two", r"syntax.py:1: SyntaxError: "),
    ("neighbour.py:Two", r"neighbour.py:1: ModuleNotFoundError: No module named 'a'"),
  ],
)
def test_mistakes_are_named(tmp_path, name, words):
  (tmp_path / "a.py").write_text("Two = 2\nText = 'x'\n")
  (tmp_path / "broken.py").write_text("Two = 2\nThree = 1 / 0\n")
  (tmp_path / "syntax.py").write_text("Two = = 2\n")
  (tmp_path / "neighbour.py").write_text("from a import Two\n")
  with pytest.raises(UserError, match=words):
    find(name, tmp_path)


def test_a_dataclass_in_a_user_file_works(tmp_path):
  (tmp_path / "d.py").write_text(
    "from __future__ import annotations\nimport dataclasses\n"
    "@dataclasses.dataclass\nclass D:\n  x: int = 3\nThree = D().x\n"
  )
  assert find("d.py:Three", tmp_path) == 3


def test_the_folder_is_that_of_the_config_file(tmp_path):
  path = tmp_path / "c.py"
  path.write_text(
    "from jaxgpt import config\n\ndef get_config():\n  c = config.base()\n"
    "  c.optim.name = 'a.py:Two'\n  return c\n"
  )
  (tmp_path / "a.py").write_text("Two = 2\n")
  c, _ = config.load(path)
  assert c.code_folder == str(tmp_path) and c.optim.name == "a.py:Two"
  assert user_code.files(c) == {"a.py": "Two = 2\n"}
  assert config.load(path, ["--config.optim.name=adamw"])[0].code_folder == ""
