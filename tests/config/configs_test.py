"""Every file in configs/ builds and has the expected number of parameters."""

import functools
import pathlib

import jax
import ml_collections
import pytest

from jaxgpt import config, tree
from jaxgpt.analysis.sweep import definition
from jaxgpt.config import effects
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh
from jaxgpt.training import build as build_lib
from tests.training import uses_test

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SIZES = {  # (parameters, vocabulary where the config leaves it to the tokenizer)
  "char_level": (10_723_200, 264),
  "classifier": (129_474, 264),
  "demo": (4_196_608, 4096),
  "distillation": (0, 264),  # without a teacher it does not build
  "finetune": (10_945_536, 264),  # without a run to start from: the base config
  "gpt2_124m": (124_475_904, None),
  "induction": (50_560, 264),
  "llama3_8b": (8_030_261_248, None),
  "lr_sensitivity": (41_632, 264),
  "lr_sweep": (33_184, 264),
  "masked_lm": (1_100_296, 264),
  "mup_transfer": (33_184, 264),
  "muon_or_adamw": (461_440, 264),
  "preference": (10_945_536, 264),  # without a run to start from: the base config
  "tasks/chat": (558_720, 264),
  "tasks/generated_answers": (558_720, 264),
  "tasks/multi_label": (148_418, 264),
  "tasks/question_answering": (214_082, 264),
  "tasks/retrieval": (148_288, 264),
  "tasks/sentiment": (148_416, 264),
  "tasks/summarization": (558_720, 264),
  "tasks/tagging": (148_418, 264),
  "tasks/translation": (558_720, 264),
}
FILES = sorted(CONFIGS.rglob("*.py"))
SWEEPS = ("shallow",)  # files whose runs start from another config


def test_every_config_is_listed():
  found = {p.relative_to(CONFIGS).with_suffix("").as_posix() for p in FILES}
  assert found == SIZES.keys() | set(SWEEPS)


@pytest.mark.parametrize("name", SIZES)
def test_a_config_builds_and_has_its_size(name):
  count, vocab_size = SIZES[name]
  c, _ = config.load(CONFIGS / f"{name}.py")
  c = config.resolve(c, vocab_size)
  sizes = mesh.axis_sizes(c.mesh, 8)
  mesh.check_batch(sizes, c.data.batch_size, c.optim.accumulate)
  if name == "distillation":
    with pytest.raises(UserError, match="needs objective.teacher"):
      build_lib.build(c, mesh.make(c.mesh))
    return
  parts = build_lib.build(c, mesh.make(c.mesh))
  assert tree.count(parts.state["params"]) == count
  batch = jax.ShapeDtypeStruct((8, c.data.seq_len), "int32")
  logits = jax.eval_shape(
    lambda p, t: parts.model.apply({"params": p}, t, t).logits, parts.state["params"], batch
  )
  m, length = c.model, c.data.seq_len
  of_row = {
    "lm": (length, m.vocab_size),
    "classifier": (m.num_labels,),
    "token_classifier": (length, m.num_labels),
    "none": (length, m.width),
  }
  assert logits.shape == (8, *of_row[m.head])
  assert isinstance(parts.model.cfg, ml_collections.FrozenConfigDict)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_header_gives_the_command(path):
  head = path.read_text().split('"""')[1]
  command = "sweep" if path.stem in SWEEPS else "train"
  assert f"jaxgpt {command} --config=configs/" in head or "make demo" in head


@pytest.mark.parametrize("name", SWEEPS)
def test_the_settings_of_a_sweep_are_configs(name):
  sweep = definition.load(CONFIGS / f"{name}.py")
  for setting in sweep.settings():
    values = dict(sweep.fixed) | setting
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    c, overrides = config.load(CONFIGS / sweep.base, flags)
    assert effects.check(c, overrides) == []
    found = c.to_dict()
    for key, value in values.items():
      assert functools.reduce(lambda section, name: section[name], key.split("."), found) == value


@pytest.mark.parametrize("name", ["sentiment", "multi_label", "tagging", "question_answering"])
def test_a_recipe_does_not_take_the_classes_of_a_run_of_another_kind(name, tmp_path):
  """Those of a run of its own kind come with the weights, see `run.label_names`."""
  classes = ("some", "other", "names")
  given = uses_test.model("classifier", False, "classification", num_labels=3, label_names=classes)
  folder = uses_test.run_of(tmp_path / "run", given)
  c, _ = config.load(f"{CONFIGS}/tasks/{name}.py:{folder}")
  assert c.init_from == str(folder) and c.model.label_names == ()
