"""The table of a run and its variants."""

import itertools
import shutil
import types

import jax
import numpy as np
import pytest

from jaxgpt.analysis.compression import calibration, methods, report
from jaxgpt.commands.main import main
from jaxgpt.commands.models import compress as command
from jaxgpt.config.registry import Registry
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


@pytest.fixture
def few(monkeypatch):
  """Two variants, the first of which does not suit the tiny model."""
  variants = Registry("variants")
  variants.add("int4-12", report._coarse("nearest", 4, 12))
  variants.add("int8", report._coarse("nearest", 8))
  monkeypatch.setattr(report, "VARIANTS", variants)


def test_variants_that_do_not_suit_the_model_are_left_out_by_name(trained, few, tmp_path):
  told = []
  made = report.make(trained, tmp_path / "v", None, None, told.append)
  assert made == [tmp_path / "v" / "int8"]
  why = "layers/attn/k has 32 inputs, which 12 does not divide"
  assert told == [f"left out int4-12: {why}", f"made {tmp_path}/v/int8"]
  with pytest.raises(UserError) as e:
    report.make(trained, tmp_path / "w", ["int4-12"], None, print)
  assert str(e.value) == f"--variants=int4-12: {why}; leave it out of --variants"


def test_a_method_that_reads_experts_does_not_suit():
  seen = calibration.Seen("layers", 0, {}, {"attn/q": np.ones(4)}, {}, 0.5, 1)
  with pytest.raises(methods.UnsuitableError, match="--method=wanda.* use --method=magnitude") as e:
    calibration.require(seen, "mlp/up", "wanda", "magnitude")
  assert e.value.reason.startswith("the inputs of layers/mlp/up can't be measured")
  assert "--" not in e.value.reason  # options that `jaxgpt compress` does not have


def test_runs_and_variants_without_a_checkpoint_say_so(trained, few, tmp_path):
  (tmp_path / "run").mkdir()
  shutil.copy(trained / "config.json", tmp_path / "run")
  with pytest.raises(UserError, match="no checkpoint in .*; train first, or name another run"):
    report.make(tmp_path / "run", tmp_path / "v", ["int8"], None, print)
  (made,) = report.make(trained, tmp_path / "w", ["int8"], None, print)
  shutil.rmtree(made / "checkpoints" / "8")  # as a kill leaves it
  with pytest.raises(UserError, match="int8 is unfinished: .* remove it, and run the same command"):
    report.make(trained, tmp_path / "w", None, None, lambda line: None)


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
