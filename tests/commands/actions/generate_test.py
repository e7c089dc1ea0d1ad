"""`jaxgpt generate`: streams one text, and continues the prompts of a file in order."""

import json

import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.inference.engine.requests import Constraint
from jaxgpt.tasks import api
from jaxgpt.tasks.predict import job
from jaxgpt.text.tokenizers import token_bytes
from jaxgpt.training import loop
from tests.commands.main_test import refused, run


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
  """A run folder."""
  folder = tmp_path_factory.mktemp("generate") / "run"
  c = tiny(train__steps=2, schedule__warmup_steps=1)
  loop.train(c, folder, config.flatten(c))
  return folder


def test_one_text_is_written_as_it_is_drawn_and_its_rate_reported(trained, capsys):
  args = ["generate", f"--workdir={trained}", "--prompt=the cat", "--max-new=9"]
  code, out, err = run(capsys, *args)
  assert code == 0 and out.startswith("the cat") and out.endswith("\n")
  assert "tokens/s" in err
  assert run(capsys, *args)[1] == out, "the same seed draws the same text"
  text = out[len("the cat") : -1]
  stop = text[3:5]
  _, stopped, _ = run(capsys, *args, f"--stop={stop}")
  assert stopped == "the cat" + text[: text.index(stop)] + "\n"


def test_prompts_of_a_file_are_continued_in_order_and_a_second_start_goes_on(
  trained, tmp_path, capsys, monkeypatch
):
  source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
  lines = [{"text": "the cat"}, {"text": " " * 3}, {"text": "two dogs " * 9}, {"text": "a"}]
  source.write_text("".join(json.dumps(line) + "\n" for line in lines))
  args = ["generate", f"--workdir={trained}", f"--input={source}", "--max-new=6", "--samples=2"]
  code, out, err = run(capsys, *args, f"--output={output}")
  assert code == 0 and not out and "4 rows, 2 predictions" in err
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert [row["row"].rsplit(":")[-1] for row in rows] == ["1", "2", "3", "4"]
  assert "empty" in rows[1]["error"] and "context" in rows[2]["error"]
  assert len(rows[0]["texts"]) == 2 and rows[0]["texts"][0] != rows[0]["texts"][1]
  assert set(rows[3]["finishes"]) <= {"length", "stop"}
  code, out, _ = run(capsys, *args)
  assert out == output.read_text(), "standard output has the same lines"

  def cut_off(*args):
    raise UserError("cut off")

  monkeypatch.setattr(job, "_assemble", cut_off)
  again = tmp_path / "again.jsonl"
  assert "cut off" in refused(capsys, *args, f"--output={again}")
  monkeypatch.undo()
  other = refused(capsys, *args[:3], "--max-new=7", "--samples=2", f"--output={again}")
  assert "max_new was 6, is 7" in other
  code, _, err = run(capsys, *args, f"--output={again}")
  assert code == 0 and "goes on" in err and again.read_text() == output.read_text()
  assert "tokens/s" not in err, "nothing was drawn again"


@pytest.mark.slow
def test_a_draft_model_changes_nothing_but_the_speed(trained, capsys):
  args = ["generate", f"--workdir={trained}", "--prompt=the cat", "--max-new=9", "--temperature=0"]
  _, plain, _ = run(capsys, *args)
  code, out, err = run(capsys, *args, f"--draft={trained}", "--draft-tokens=2")
  assert code == 0 and out == plain
  assert "6 of 6 drafted tokens accepted (100.0%)" in err


def test_a_text_of_a_prescribed_form(trained, capsys):
  pytest.importorskip("llguidance", reason="needs the extra [guided]")
  args = ["generate", f"--workdir={trained}", "--prompt=the cat", "--max-new=9"]
  code, out, _ = run(capsys, *args, "--choice= sat", "--choice= saw")
  assert code == 0 and out in ("the cat sat\n", "the cat saw\n")
  assert "regular expression: " in refused(capsys, *args, "--regex=(a")


@pytest.fixture
def without_z(monkeypatch):
  """A vocabulary in which no token goes on with a text that needs a Z."""
  of = token_bytes.of
  monkeypatch.setattr(token_bytes, "of", lambda t: [b"" if d == b"Z" else d for d in of(t)])


def test_a_form_that_cannot_go_on_is_an_error(trained, without_z, tmp_path, capsys):
  pytest.importorskip("llguidance", reason="needs the extra [guided]")
  args = ["generate", f"--workdir={trained}", "--regex=abZcd"]
  why = "the text's form: no token of the vocabulary goes on with it"
  for samples in (1, 2):
    code, out, err = run(capsys, *args, "--prompt=the cat", f"--samples={samples}")
    assert code == 2 and "the catab\n" in out and why in err
  (tmp_path / "prompts.txt").write_text("the cat\n")
  code, out, err = run(capsys, *args, f"--input={tmp_path}/prompts.txt")
  assert code == 0 and json.loads(out)["error"] == why and "1 rows without one" in err
  form = Constraint.of_regex("abZcd")
  (found,) = api.load(trained).predict(["the cat"], constraint=form)
  assert found == {"error": why}


@pytest.mark.slow
def test_a_search_with_beams(trained, tmp_path, capsys):
  args = ["generate", f"--workdir={trained}", "--max-new=9", "--beams=3"]
  code, out, _ = run(capsys, *args, "--prompt=the cat")
  assert code == 0 and out.startswith("the cat") and len(out) > len("the cat") + 2
  (tmp_path / "prompts.txt").write_text("the cat\ntwo\n")
  code, lines, _ = run(capsys, *args, f"--input={tmp_path}/prompts.txt")
  found = [json.loads(line)["text"] for line in lines.splitlines()]
  assert code == 0 and "the cat" + found[0] + "\n" == out and len(found) == 2
  words = ["predict", f"--workdir={trained}", f"--input={tmp_path}/prompts.txt", "--output=-"]
  code, lines, _ = run(capsys, *words, "--max-new=9", "--beams=3")
  assert code == 0 and [json.loads(line)["text"] for line in lines.splitlines()] == found
  assert "beams draw nothing" in refused(capsys, *words, "--beams=3", "--temperature=0.5")


@pytest.mark.parametrize(
  "more, message",
  [
    (["--prompt=x", "--input=y"], "--prompt and --input"),
    (["--prompt=x", "--output=y"], "--output=y needs --input"),
    (["--regex=a", "--choice=b"], "--regex and --choice each prescribe the text"),
    (["--json-schema=@nothing"], "--json-schema=@nothing: "),
    (["--template-variable=think=false"], "--template-variable=think=false needs --chat"),
    (["--draft=ngram", "--regex=a"], "--draft=ngram drafts no text of a prescribed form"),
    (["--beams=2", "--regex=a"], "--beams=2 finds no text of a prescribed form"),
    (["--beams=2", "--draft=ngram"], "--draft=ngram drafts nothing with --beams"),
    (["--beams=2", "--samples=2"], "--samples=2 would be one text 2 times"),
    (["--beams=2", "--seed=5"], "--seed=5 has no effect with --beams"),
    (["--beams=9"], "--beams=9 needs a batch of at least 9"),
    (["--length-penalty=0"], "--length-penalty=0.0 needs --beams"),
    (["--early-stopping"], "--early-stopping=True needs --beams"),
  ],
)
def test_options_that_do_not_go_together(capsys, more, message):
  assert message in refused(capsys, "generate", "--workdir=r", *more)
