"""The table of a run and its variants."""

import itertools
import types

import jax
import pytest

from jaxgpt.analysis.compression import report
from jaxgpt.commands.main import main
from jaxgpt.commands.models import compress as command
from jaxgpt.errors import UserError
from jaxgpt.inference import load


@pytest.mark.slow
def test_one_command_makes_the_variants_and_the_table(trained, tmp_path, capsys):
  args = [str(trained), f"--to={tmp_path}/v", "--variants=magnitude-2:4,int8", "--tokens=0"]
  assert main(["compress", *args, f"--report={tmp_path}/table.md", "--batches=1"]) == 0
  out = capsys.readouterr().out
  assert out.count(f"made {tmp_path}/v/") == 2
  head, _, original, sparse, int8 = (tmp_path / "table.md").read_text().splitlines()
  assert head.startswith("| run | bytes | zeros | validation bits per byte")
  cells = [[c.strip() for c in line.split("|")[1:-1]] for line in (original, sparse, int8)]
  assert [c[0] for c in cells] == ["run", "magnitude-2of4", "int8"]
  size = [int(c[1].replace(",", "")) for c in cells]
  assert size[0] == size[1] and size[0] > 1.5 * size[2]  # embeddings stay float32
  assert float(cells[0][2].rstrip("%")) < 1 and float(cells[1][2].rstrip("%")) > 25
  assert cells[0][4] == "" and abs(float(cells[2][4].rstrip("%"))) < 1
  assert main(["compress", *args]) == 0  # what is there is not made again
  assert f"{tmp_path}/v/int8 is there already" in capsys.readouterr().out


def test_settings_without_an_effect_are_refused(trained, tmp_path):
  with pytest.raises(UserError, match="variants='int9': did you mean 'int8'"):
    report.make(trained, tmp_path, ["int9"], None, print)
  (tmp_path / "int8").mkdir()
  with pytest.raises(UserError, match="int8 exists and was not made from"):
    report.make(trained, tmp_path, ["int8"], None, print)
  with pytest.raises(UserError, match="--rows needs --to"):
    command.CompressOptions(runs=("a", "b"), rows=3)
  with pytest.raises(UserError, match="one RUN alone"):
    command.CompressOptions(runs=("a",))


def test_speeds_count_the_tokens_that_were_generated(trained, monkeypatch):
  monkeypatch.setattr(
    report, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__)
  )  # a second passes at each call
  run = load.load(trained, devices=jax.local_devices()[:1])
  every = range(run.c.model.vocab_size)
  ends = run.generation._replace(values={"eos_token_id": list(every)})
  assert report._speed(run._replace(generation=ends), 12) == 12
  # Bytes that are no text: each would be three tokens if its text were encoded again.
  noise = 0.3 * jax.random.normal(jax.random.key(3), run.params["embed"].shape)
  assert report._speed(run._replace(params=run.params | {"embed": noise}), 12) == 12


def test_a_run_on_pairs_is_measured_on_text(trained, on_pairs, corpus, monkeypatch):
  run = load.load(trained, use="evaluate")
  paired = on_pairs(run)
  monkeypatch.setattr(load, "load", lambda *_, **__: paired)
  row = report.measure(trained, "run", "validation", str(corpus), 0, 1)
  monkeypatch.setattr(load, "load", lambda *_, **__: run)
  assert row == report.measure(trained, "run", "validation", None, 0, 1)._replace(
    evaluated=row.evaluated
  )


def test_names_tell_the_runs_apart():
  assert report.names_of(["/x/run", "/x/v/int8"]) == ["run", "int8"]
  assert report.names_of(["/x/run", "/y/run"]) == ["x/run", "y/run"]
