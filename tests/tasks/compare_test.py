"""Two runs on the same examples: the paired bootstrap sees a difference, and only a real one."""

import json

import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.commands import main
from jaxgpt.errors import UserError
from jaxgpt.tasks import compare
from jaxgpt.text.prepare import prepare
from jaxgpt.training import loop


def examples(sums, weights=None, contents="a", form="t", metric="loss", sources=None):
  weights = np.ones(len(sums)) if weights is None else weights
  names = sources or [f"f:{i}" for i in range(len(sums))]
  measures = {metric: (np.asarray(sums, float), np.asarray(weights, float))}
  return compare.Examples(names, [contents] * len(sums), form, measures)


def test_a_metric_is_a_ratio_of_sums_and_its_difference_is_paired():
  draws = np.random.default_rng(0)
  weights = draws.integers(1, 50, 200)
  hard = draws.normal(3, 1, 200)  # examples differ much more than the runs do
  first = examples(hard * weights, weights)
  second = examples((hard - 0.1 + draws.normal(0, 0.05, 200)) * weights, weights)
  (found,) = compare.compare(first, second)
  want = [float(e.measures["loss"][0].sum() / weights.sum()) for e in (first, second)]
  assert (found.first, found.second) == pytest.approx(want)
  assert found.difference.value == pytest.approx(want[1] - want[0])
  assert found.difference.low < -0.09 and found.difference.high < -0.08
  assert found.difference.p_value < 0.01
  (same,) = compare.compare(first, first)
  assert same.difference[:3] == (0, 0, 0) and same.difference.p_value == 1


def test_the_interval_covers_the_difference_as_often_as_it_says():
  covered = 0
  for seed in range(100):
    a, b = np.random.default_rng(seed).normal(size=(2, 60))
    (found,) = compare.compare(examples(a), examples(b), resamples=200)
    covered += found.difference.low <= 0 <= found.difference.high
  assert 88 <= covered <= 99


@pytest.mark.parametrize(
  "other, said",
  [
    (examples([1, 2]), "3 and 2 examples"),
    (examples([1, 2, 3], contents="b"), "f:0 has another content"),
    (examples([1, 2, 3], sources=["f:0", "g:1", "f:2"]), "number 2 is f:1 and g:1"),
    (examples([1, 2, 3], form="u"), "no metric that is comparable"),
    (examples([1, 2, 3], metric="accuracy"), "no metric that is comparable"),
  ],
)
def test_other_examples_are_refused(other, said):
  with pytest.raises(UserError, match=said):
    compare.compare(examples([1, 2, 3]), other)


def test_bits_per_byte_compare_runs_of_other_tokenizers():
  first = examples([8, 4, 6], metric="bits_per_byte")
  (found,) = compare.compare(first, examples([4, 4, 4], metric="bits_per_byte", form="u"))
  assert (found.first, found.second) == (6, 4)


@pytest.mark.slow
def test_a_task_on_the_rows_of_a_file(tiny, tmp_path, capsys):
  rows = [{"text": f"row {i}", "label": "good" if i % 4 else "bad"} for i in range(24)]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  prepare.prepare(
    tmp_path / "rows.jsonl",
    tmp_path / "data",
    tokenizer="bytes",
    kind="classification",
    validation=0,
    test=0,
  )
  runs = []
  for seed in (0, 1):
    c = tiny(
      train__steps=2,
      objective__name="classification",
      model__head="classifier",
      model__num_labels=2,
      model__pooling="last",
      data__path=str(tmp_path / "data"),
    )
    c.seed = seed
    loop.train(c, tmp_path / f"run{seed}", config.flatten(c))
    runs.append(str(tmp_path / f"run{seed}"))
  capsys.readouterr()
  words = ["compare", *runs, "--task=sentiment", f"--data={tmp_path}/rows.jsonl", "--json"]
  assert main.main([*words, "--resamples=100"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["examples"] == 24
  for run, side in zip(runs, ("first", "second")):
    out = str(tmp_path / f"{side}.jsonl")
    words = ["predict", f"--workdir={run}", f"--input={tmp_path}/rows.jsonl", f"--output={out}"]
    assert main.main([*words, "--task=sentiment", "--json"]) == 0
    said = capsys.readouterr().out
    scores = json.loads(said[said.index("{") :])["scores"]
    for name, values in found["metrics"].items():
      assert values[side] == pytest.approx(scores[name][0])
      assert values["difference"]["value"] == pytest.approx(values["second"] - values["first"])


def test_the_command(tiny, tmp_path, capsys):
  c = tiny(train__steps=2)
  loop.train(c, tmp_path / "run", config.flatten(c))
  run = str(tmp_path / "run")
  capsys.readouterr()
  assert main.main(["compare", run, run, "--json", "--resamples=100"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert set(found["metrics"]) == {"loss", "accuracy", "bits_per_byte"}
  assert main.main(["evaluate", f"--workdir={run}", "--json"]) == 0
  want = json.loads(capsys.readouterr().out)
  for name, values in found["metrics"].items():
    assert values["first"] == values["second"] == pytest.approx(want[name], rel=1e-6)
    assert values["difference"]["p_value"] == 1
  assert found["examples"] == sum(row["documents"] for row in want["by"]["length"])
  assert main.main(["compare", run, run]) == 0
  table = capsys.readouterr().out.splitlines()
  assert len(table) == 5 and len({len(line) for line in table[1:]}) == 1
  for words, said in (
    ([run], "two run folders, not 1"),
    ([run, run, "--limit=3"], "--limit needs --tasks"),
    ([run, run, "--tasks=a", "--split=test"], "--split is not for --tasks"),
    ([run, run, "--task=translation"], "--task=translation needs --data=FILE"),
    ([run, run, "--task=translation", "--data=x", "--limit=2"], "--limit is not for --task"),
  ):
    assert main.main(["compare", *words]) == 2
    assert said in capsys.readouterr().err
