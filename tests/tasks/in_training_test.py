"""A task's metrics in the evaluations of a run of two real processes: those of one."""

import json

import pytest

from jaxgpt.tasks import in_training
from jaxgpt.text.prepare import prepare
from tests.parallel import distributed_test

CONFIG = """from jaxgpt import config

def get_config(kind):
  c = config.base()
  c.model.update(dict(num_layers=1, width=32, num_heads=2, norm="rmsnorm", position="rotary",
                      bias=False, init_std=0.3))
  c.data.update(dict(seq_len=32, batch_size=8, threads=1))
  c.optim.lr = 1e-2
  c.train.steps = 2
  c.schedule.warmup_steps = 1
  c.log.every = 1
  c.eval.every = 1
  c.task.update(dict(data="{rows}", rows=9, batch_size=2, max_new=4))
  c.task.name = "translation"
  if kind == "classification":
    c.model.update(dict(head="classifier", pooling="mean", num_labels=2, causal=False))
    c.objective.name, c.task.name = kind, "sentiment"
  return c
"""


def test_a_sample_is_drawn_from_all_rows_and_stays_in_order():
  items = [(i, "neg" if i < 500 else "pos") for i in range(1000)]  # sorted by class
  found = in_training.sample(items, 100)
  assert len(set(found)) == 100 and found == sorted(found) == in_training.sample(items, 100)
  assert 35 <= sum(name == "neg" for _, name in found) <= 65
  assert in_training.sample(items, 0) == in_training.sample(items, 2000) == items


@pytest.mark.slow  # two runs in processes of their own
@pytest.mark.parametrize("kind", ["seq2seq", "classification"])
def test_two_processes_report_the_metrics_of_one(kind, tmp_path):
  if kind == "seq2seq":
    pytest.importorskip("sacrebleu")
  rows = [
    {
      "text": f"{i} " * (1 + i % 3),
      "label": "ab"[i % 2],
      "input": f"{i}" + "x" * (i % 5),
      "target": "xy",
    }
    for i in range(40)
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  prepare.prepare(path, tmp_path / "data", tokenizer="bytes", kind=kind, validation=0.3, test=0)
  (tmp_path / "c.py").write_text(CONFIG.replace("{rows}", str(path)))

  def found(count, devices):
    words = ("train", f"--config={tmp_path}/c.py:{kind}", f"--workdir={tmp_path}/{count}")
    words += (f"--config.data.path={tmp_path}/data",)
    done = distributed_test.finish(
      distributed_test.start(tmp_path, "", count, devices=devices, command=words)
    )
    assert [code for code, _, _ in done] == [0] * count, done
    return distributed_test.lines(tmp_path, str(count), "validation")

  one, two = found(1, 2), found(2, 1)
  names = [name for name in one[0] if name.startswith("task/")]
  assert len(one) == len(two) == 2 and len(names) > 1
  for a, b in zip(one, two, strict=True):
    for name in ("loss", *names):
      assert b[name] == pytest.approx(a[name], rel=1e-4), name
