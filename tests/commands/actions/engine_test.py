"""Options of the engine that have no effect are refused, before anything is loaded."""

import pytest

from jaxgpt import config
from jaxgpt.commands.actions import engine
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.engine.drafting import drafter
from jaxgpt.inference.engine.requests import Stats
from tests.commands.main_test import refused


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_a_number_of_drafts_without_a_drafter_is_refused(capsys, command):
  message = refused(capsys, command, "--workdir=r", "--draft-tokens=3")
  assert "--draft-tokens=3 needs --draft" in message


@pytest.mark.parametrize(
  "given",
  [{"draft": "ngram"}, {"cache_dtype": "int8"}, {"template_variables": (("think", True),)}],
)
def test_an_engine_that_does_not_run_has_no_options(given):
  flag = "--" + next(iter(given)).replace("_", "-").removesuffix("s")
  with pytest.raises(UserError, match=f"{flag} has no effect here: it writes no text; leave it"):
    engine.check_none(engine.EngineOptions(**given), "it writes no text")
  engine.check_none(engine.EngineOptions(), "it writes no text")


def test_texts_depend_on_the_step_and_the_config_of_the_draft_model():
  nothing = None

  def found(step, **model):
    c = config.base()
    c.model.update(model)
    run = load.Run(c, nothing, nothing, nothing, step, nothing, "", nothing)
    options = engine.EngineOptions(draft="runs/small")
    return engine.identity(options, drafter.Drafting(4, run))

  assert found(3) == found(3)
  assert found(3) != found(4) and found(3) != found(3, width=48)
  assert engine.identity(engine.EngineOptions(), None) == {}


def test_the_report_says_how_many_drafts_were_accepted():
  stats = Stats(0, 0, 0, 0, 0, 0, 90)
  assert engine.drafting_report(stats) is None
  line = engine.drafting_report(stats._replace(drafted=80, accepted=50))
  assert line == "50 of 80 drafted tokens accepted (62.5%)"
