"""Options of `jaxgpt evaluate` that cannot do what they say are refused in one line."""

import pytest

from jaxgpt.commands import main
from tests.training import uses_test


@pytest.mark.parametrize(
  "options, words",
  [
    (["--tables"], "--tables: the predictions of objective.name='preference' are not choices"),
    (["--contamination=5"], "--contamination: the predictions of"),
    (["--gap", "--split=train"], "--gap compares with the training split"),
    (["--tasks=a", "--gap"], "--gap is not for --tasks=a"),
    (["--chat"], "--chat needs --tasks"),
  ],
)
def test_options_without_effect_are_refused(tmp_path, capsys, options, words):
  c = uses_test.model("lm", True, "preference")
  folder = uses_test.run_of(tmp_path / "run", c)
  assert main.main(["evaluate", f"--workdir={folder}", *options]) == 2
  found = capsys.readouterr().err
  assert words in found and found.count("\n") == 1
