"""A run with a user file records it, refuses a changed one, and works without the original."""

import json
import types

import pytest

from jaxgpt import config
from jaxgpt.config import user_code
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.training import loop, objectives, optimizers, schedules

SCHEDULE = """from jaxgpt.training.schedules import Schedule

Half = Schedule(lambda c_schedule, steps: lambda step: c_schedule.options.factor)
"""


def test_a_run_records_its_user_file_and_works_without_the_original(tiny, tmp_path):
  path = tmp_path / "code" / "half.py"
  path.parent.mkdir()
  path.write_text(SCHEDULE)
  c = tiny(train__steps=1, schedule__name="half.py:Half", code_folder=str(path.parent))
  c.schedule.options.factor = 0.5
  c.schedule.warmup_steps = 0
  folder = tmp_path / "run"
  loop.train(c, folder, config.flatten(c))
  stored = json.loads((folder / "config.json").read_text())["config"]
  assert stored["code_folder"] == "code" and stored["schedule"]["name"] == "half.py:Half"
  assert (folder / "code" / "half.py").read_text() == SCHEDULE
  start = json.loads((folder / "starts.jsonl").read_text().splitlines()[0])
  assert start["code"] == {"half.py": user_code.digest(SCHEDULE)}
  metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
  assert metrics["lr"] == pytest.approx(0.5 * c.optim.lr)
  loop.train(c, folder, {})  # an unchanged file resumes
  path.write_text(SCHEDULE + "# changed\n")
  with pytest.raises(UserError, match="half.py changed since .* began: its SHA-256 was .* restore"):
    loop.train(c, folder, {})
  path.unlink()
  assert load.evaluate_run(load.load(folder))["loss"] > 0


def test_an_option_that_is_not_set_is_named(tmp_path):
  (tmp_path / "mine.py").write_text(
    "from jaxgpt.training import objectives, optimizers, schedules\n"
    "O = objectives.Objective(lambda model, c_objective: lambda *_: c_objective.options.gamma)\n"
    "P = optimizers.Optimizer(lambda c_optim, axes: c_optim.options.momentum)\n"
    "S = schedules.Schedule(lambda c_schedule, steps: c_schedule.optoins.pieces)\n"
  )
  c = config.base()
  c.code_folder = str(tmp_path)
  c.objective.name, c.optim.name, c.schedule.name = "mine.py:O", "mine.py:P", "mine.py:S"
  model = types.SimpleNamespace(cfg=types.SimpleNamespace(causal=False))
  with pytest.raises(UserError, match="^objective.options.gamma is not set, but .*'mine.py:O'"):
    objectives.make(model, c)(None, None, None, None)
  with pytest.raises(UserError, match="^optim.options.momentum .* add --config.optim.options.mom"):
    optimizers.make(c, None, {}, {})
  with pytest.raises(AttributeError, match="optoins"):  # a bug of the file keeps its traceback
    schedules.make(c)
  (tmp_path / "mine.py").write_text(SCHEDULE.replace("Half", "S"))
  with pytest.raises(UserError, match="^schedule.options.factor is not set"):
    schedules.make(c)(3)
