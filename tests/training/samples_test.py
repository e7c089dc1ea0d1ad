"""Samples during training: texts in the run folder and the writers, and no effect on the losses."""

import json
import re

import pytest

from jaxgpt.analysis.report import collect, page
from jaxgpt.errors import UserError
from jaxgpt.run import metric_writers, run_folder
from jaxgpt.tasks.in_training import EVALUATORS
from tests.trained import train


@pytest.fixture(scope="module")
def sampled(tiny, tmp_path_factory):
  """A run folder with samples after steps 4 and 8, and what the run printed."""
  folder = tmp_path_factory.mktemp("sampled") / "run"
  prompts = ("the ", "<b>two & ")
  c = tiny(
    checkpoint__every=4,
    checkpoint__keep=3,
    eval__every=4,
    log__samples__every=4,
    log__samples__prompts=prompts,
    log__samples__max_new=5,
  )
  return folder, train(c, folder, evaluator_makers=EVALUATORS), c


def test_losses_are_equal_to_the_bit(sampled, trained):
  folder, _, _ = sampled
  text = lambda run: metric_writers.read(run / metric_writers.JSONL)
  losses = lambda run: [
    (r["step"], r["kind"], r["loss"]) for r in metric_writers.kept_until(text(run), 8)[0]
  ]
  assert len(losses(folder)) == 10
  assert losses(folder) == losses(trained)


def test_texts_are_in_the_folder_the_output_and_the_account(sampled):
  folder, out, _ = sampled
  found = metric_writers.read_samples(folder)
  assert [r["step"] for r in found] == [4, 8]
  for record in found:
    assert [one["prompt"] for one in record["samples"]] == ["the ", "<b>two & "]
    assert all(0 < len(one["text"]) <= 5 for one in record["samples"])
  assert found[0]["samples"] != found[1]["samples"]
  assert out.count("sample     step 4/8  'the ") == 1
  account = run_folder.read_starts(folder)[-1]["account"]["seconds"]
  assert account["sampling"] > 0


def test_a_start_that_repeats_steps_writes_their_samples_again(sampled, tmp_path):
  folder, _, c = sampled
  run = metric_writers.Run(c, tmp_path, 4)
  for record in metric_writers.read_samples(folder):
    with (tmp_path / metric_writers.SAMPLES).open("a") as f:
      f.write(json.dumps(record) + "\n")
  writer = metric_writers.Samples(run)
  writer.write_samples(8, [metric_writers.Sample("a", "b")])
  assert [r["step"] for r in metric_writers.read_samples(tmp_path)] == [4, 8]
  assert metric_writers.read_samples(tmp_path)[1]["samples"] == [{"prompt": "a", "text": "b"}]


def test_the_report_shows_them_and_escapes_them(sampled, trained):
  folder, _, _ = sampled
  html = page.make(collect.runs([folder]))
  section = re.search(r'<section id="samples".*?</section>', html, re.S)[0]
  assert "&lt;b&gt;two &amp; " in section and "<b>" not in section
  assert section.count("<pre>") == 4
  assert 'id="samples"' not in page.make(collect.runs([trained]))


def test_a_prompt_that_does_not_fit_is_refused_before_the_first_step(tiny, tmp_path):
  c = tiny(log__samples__every=4, log__samples__prompts=("x" * 100,))
  with pytest.raises(UserError, match=r"log.samples.prompts\[0\]='xxx"):
    train(c, tmp_path / "run", evaluator_makers=EVALUATORS)
  c = tiny(log__samples__every=4, log__samples__prompts=())
  with pytest.raises(UserError, match="log.samples.prompts=.*must be one or more texts"):
    train(c, tmp_path / "run", evaluator_makers=EVALUATORS)
