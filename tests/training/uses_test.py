"""The uses of a model by its head, its objective and its attention."""

import itertools
import json
import pathlib
import shlex

import jax
import pytest

from jaxgpt import config
from jaxgpt.commands import discover, main
from jaxgpt.commands.models import import_model
from jaxgpt.config import options
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.run import run_folder
from jaxgpt.text.tokenizers.base import ByteTokenizer
from jaxgpt.training import build, objectives, uses

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def model(head, causal, objective, **more):
  c = config.base()
  c.model.update(
    dict(num_layers=1, width=16, num_heads=2, mlp_width=32, max_len=64, vocab_size=288)
  )
  c.model.update(dict(head=head, causal=causal, **more))
  if head == "pooler":
    c.model.head_transform = "tanh"
  c.data.seq_len = 32
  c.objective.name = objective
  return c


@pytest.mark.parametrize(
  "head, causal, objective, able",
  [
    ("lm", True, "causal_lm", "train evaluate generate export"),
    ("lm", False, "masked_lm", "train evaluate export"),
    ("lm", True, "masked_lm", "train evaluate export"),  # of an earlier version
    ("lm", False, "causal_lm", "train evaluate export"),  # `build.check` refuses this one
    ("classifier", False, "classification", "train evaluate export"),
    ("classifier", True, "classification", "train evaluate export"),
    ("pooler", False, "masked_lm", "export"),
    ("none", True, "causal_lm", "export"),
    ("none", False, "masked_lm", "export"),
  ],
)
def test_uses(head, causal, objective, able):
  assert uses.of(model(head, causal, objective)) == able.split()


@pytest.mark.parametrize(
  "head, objective",
  [
    (head, name)
    for head, (name, entry) in itertools.product(objectives.HEADS, objectives.OBJECTIVES.items())
    if head not in entry.heads
  ],
)
def test_training_needs_the_head_of_the_objective(head, objective):
  """In one line that names the head, also where the head is not one to train."""
  c = model(head, objective not in ("masked_lm",), objective)
  c.model.lora.rank = 2
  with pytest.raises(UserError, match="model.head=") as e:
    build.check(c)
  assert repr(head) in str(e.value) and "\n" not in str(e.value)


def run_of(folder, c):
  c = config.resolve(c)
  mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
  run_folder.enter(folder, c, dict.fromkeys(config.flatten(c), "base"), mesh, "", ByteTokenizer())
  return folder


@pytest.mark.parametrize(
  "use, head, causal, words",
  [
    ("evaluate", "none", True, "has no head, it gives hidden states, not logits"),
    ("evaluate", "pooler", False, "has no head, it gives one vector per row"),
    ("generate", "none", True, "hidden states.*only model.head='lm'"),
    ("generate", "classifier", True, "logits over classes.*only model.head='lm'"),
    ("generate", "lm", False, "model.causal=False.*cannot continue a text"),
  ],
)
def test_a_command_refuses_before_it_reads_weights(tmp_path, capsys, use, head, causal, words):
  objective = {"classifier": "classification"}.get(head, "causal_lm" if causal else "masked_lm")
  folder = run_of(tmp_path / "run", model(head, causal, objective))
  more = ["--data=nowhere"] if use == "evaluate" else []
  assert main.main([use, f"--workdir={folder}", *more]) == 2
  found = capsys.readouterr().err
  assert found.count("\n") == 1
  with pytest.raises(UserError, match=words):
    load.load(folder, use=use)


@pytest.mark.parametrize(
  "head, causal, objective",
  [
    ("lm", True, "causal_lm"),
    ("lm", False, "masked_lm"),
    ("classifier", False, "classification"),
    ("token_classifier", False, "token_classification"),
    ("pooler", False, "masked_lm"),
    ("none", True, "causal_lm"),
    ("none", False, "masked_lm"),
  ],
)
def test_import_recommends_commands_that_work(tmp_path, head, causal, objective):
  folder = run_of(tmp_path / "run", model(head, causal, objective))
  c = run_folder.read_config(folder)
  lines = import_model.next_commands(c, str(folder))
  named = set()
  for line in lines:
    words = shlex.split(line.partition("  (")[0].removeprefix("where DATA is made by "))
    assert words.pop(0) == "jaxgpt"
    command, values = main._parse(discover(), words)
    named.add(command.name)
    if command.name != "train":
      if command.name in uses.USES:
        uses.check(c, command.name)
      continue
    where = values["config"].replace("configs/", f"{CONFIGS}/")
    trained, _ = config.load(where, values[options.takes_overrides(command.options)])
    build.check(config.resolve(trained))
    assert trained.data.seq_len <= c.model.max_len
    json.loads(trained.to_json())
  predicts = {"predict"} if "classifier" in head else set()
  assert named == {"train", "data"} | predicts | ({*uses.of(c)} & {"generate", "evaluate"})
