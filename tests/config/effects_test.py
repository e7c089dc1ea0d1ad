"""Settings without effect: a new run is refused, an old one told, and nobody is for a default."""

import pathlib

import pytest

from jaxgpt import config
from jaxgpt.config import effects
from jaxgpt.config.keys import DECLARATIONS, KEYS
from jaxgpt.config.presets import PRESETS
from jaxgpt.errors import UserError
from tests.config import configs_test

CONFIGS = [
  path
  for path in sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
  if path.stem not in configs_test.SWEEPS  # those are checked setting by setting there
]
CLASSIFIER = {"objective.name": "classification", "model.head": "classifier"}
# (a config with a setting that cannot do what it says, words of the refusal)
REFUSED = [
  ({"model.rope.factor": 8.0}, "model.rope.factor=8.0 has no effect: it needs model.position="),
  ({"model.position": "rotary", "model.rope.factor": 8.0}, "it needs model.rope.scaling='linear'"),
  ({"model.position": "rotary", "model.rope.scaling": "yarn"}, "'yarn' needs model.rope.factor"),
  (
    {"model.position": "rotary", "model.rope.scaling": "ntk", "model.rope.factor": 2.0},
    "'ntk' needs model.rope.original_len below model.max_len",
  ),
  ({"model.rope.theta": 5e5}, "model.rope.theta=500000.0 has no effect"),
  ({"model.window": 8}, "model.window=8 has no effect: it needs a 'local' layer"),
  (
    {"model.num_layers": 1, "model.attention_pattern": ("global", "local"), "model.window": 8},
    "model.window=8 has no effect: .*within model.num_layers",
  ),
  ({"model.attention_pattern": ("nope",)}, "'nope' needs model.position='rotary'"),
  ({"model.moe.experts": 4}, "model.moe.experts=4 has no effect: it needs a 'moe' layer"),
  ({"model.moe.z_loss": 0.1}, "model.moe.z_loss=0.1 has no effect"),
  ({"model.latent.q_rank": 4}, "model.latent.q_rank=4 has no effect: .*kv_rank above 0"),
  ({"model.lora.targets": ("q",)}, "model.lora.targets=.* needs model.lora.rank above 0"),
  ({"model.num_labels": 3}, "model.num_labels=3 has no effect: it needs model.head='classifier'"),
  ({"model.pooling": "mean"}, "model.pooling='mean' has no effect"),
  ({"model.grad_dtype": "float32"}, "it needs model.dtype='bfloat16'"),
  ({"model.remat": "save:q,gate"}, "no layer has the activation 'gate', .*model.gated=True"),
  (CLASSIFIER, "model.pooling='first' needs model.causal=False, since the first token"),
  ({"objective.name": "masked_lm"}, "objective.name='masked_lm' needs model.causal=False"),
  ({"objective.mask_rate": 0.3}, "objective.mask_rate=0.3 has no effect: .*name='masked_lm'"),
  ({"objective.beta": 0.3}, "objective.beta=0.3 has no effect: it needs objective.name="),
  (
    CLASSIFIER | {"model.pooling": "last", "data.packing": "concat"},
    "data.packing='concat' has no effect",
  ),
  ({"data.weights": (1, 2), "data.path": "a"}, "data.weights=.* needs several folders"),
  ({"data.stream_field": "body"}, "data.stream_field='body' has no effect"),
  ({"optim.name": "adafactor", "optim.b1": 0.5}, "optim.b1=0.5 .*'adamw', 'lion' or 'muon'"),
  ({"optim.muon_momentum": 0.5}, "optim.muon_momentum=0.5 has no effect"),
  ({"optim.adam_lr": 0.5}, "optim.adam_lr=0.5 has no effect: it needs optim.name='muon'"),
  ({"schedule.decay_fraction": 0.5}, "schedule.decay_fraction=0.5 .*schedule.name='wsd'"),
  (
    {"schedule.name": "constant", "schedule.final_ratio": 0.0},
    "schedule.final_ratio=0.0 has no effect",
  ),
  ({"checkpoint.keep_every": 300}, "checkpoint.keep_every=300 keeps no checkpoint"),
  ({"model.preset": "gpt2_124m"}, "model.preset='gpt2_124m': the name alone fills in nothing"),
]


def changed(changes):
  c = config.base()
  c.update_from_flattened_dict(changes)
  return c


@pytest.mark.parametrize("changes, words", REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_a_new_run_is_refused_and_an_old_one_told(changes, words):
  c = changed(changes)
  with pytest.raises(UserError, match=words):
    effects.check(c, {})
  assert effects.check(c, {}, resumed=True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_are_accepted(path):
  assert effects.check(*config.load(path)) == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_accepted_at_any_depth_and_when_copied(name):
  for num_layers in (PRESETS[name]["num_layers"], 1):
    c = config.base()
    c.model.update(config.preset(name))
    c.model.num_layers, c.model.moe.first_dense = num_layers, 0
    c.objective.name = "causal_lm" if c.model.causal else "masked_lm"
    assert effects.check(c, {}) == []
    copy = config.base()
    copy.model.update(config.resolve(c, 8).model)
    copy.objective.name = c.objective.name
    assert effects.check(copy, {}) == []


def test_a_copied_setting_without_effect_is_only_noted_unless_it_is_typed():
  source = config.resolve(changed({"model.causal": False, "objective.name": "masked_lm"}), 8)
  source.model.pooling = "mean"
  copy = changed({"objective.name": "masked_lm"})
  copy.model.update(source.model)
  notes = effects.check(copy, {})
  assert len(notes) == 1 and notes[0].startswith("note: model.pooling='mean' has no effect")
  with pytest.raises(UserError, match="model.pooling='mean' has no effect"):
    effects.check(copy, {"model.pooling": "command line"})


def test_an_override_may_switch_off_what_the_file_set_up(tmp_path):
  (tmp_path / "c.py").write_text(
    "from jaxgpt import config\n\ndef get_config():\n  c = config.base()\n"
    "  c.schedule.name = 'wsd'\n  c.schedule.decay_fraction = 0.5\n  return c\n"
  )
  c, origin = config.load(tmp_path / "c.py", ["--config.schedule.name=constant"])
  assert [note.split("=")[0] for note in effects.check(c, origin)] == [
    "note: schedule.decay_fraction"
  ]
  c, origin = config.load(tmp_path / "c.py", ["--config.optim.muon_momentum=0.5"])
  with pytest.raises(UserError, match="optim.muon_momentum=0.5 has no effect"):
    effects.check(c, origin)


def test_settings_that_change_no_result_are_noted():
  notes = effects.check(changed({"eval.every": 0, "eval.batches": 3}), {})
  assert [note.split(":")[1] for note in notes] == [" eval.batches=3 has no effect"]
  notes = effects.check(changed({"mesh.stage_microbatches": 4}), {})
  assert "mesh.stage other than 1" in notes[0]


def test_several_settings_are_one_message():
  c = changed(
    {"objective.beta": 0.5, "model.window": 3, "optim.adam_lr": 0.1, "model.num_labels": 5}
  )
  with pytest.raises(
    UserError, match="^model.window=3 .*; model.num_labels.*; and 1 more setting$"
  ):
    effects.check(c, {})


def test_the_defaults_are_accepted_and_conditions_name_keys():
  assert effects.check(config.base(), {}) == []
  for flat in KEYS:
    for node in DECLARATIONS.on_path(flat):
      if node.needs is not None:
        assert node.needs.keys and set(node.needs.keys) <= KEYS.keys(), flat


def test_a_preset_on_the_command_line_is_refused_unless_it_is_the_files_own():
  path = CONFIGS[0].parent / "llama3_8b.py"
  assert config.load(path, ["--config.model.preset=llama3_8b"])[0].model.num_layers == 32
  with pytest.raises(UserError, match="model.preset='gpt2_124m': the name alone fills in nothing"):
    config.load(path, ["--config.model.preset=gpt2_124m"])
