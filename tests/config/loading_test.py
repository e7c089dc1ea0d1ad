"""Loading, overriding and refusing configs."""

import json

import pytest

from jaxgpt import config
from jaxgpt.config import remat
from jaxgpt.config.keys import KEYS
from jaxgpt.data import packing
from jaxgpt.errors import UserError
from jaxgpt.model import ops
from jaxgpt.model import remat as policies
from jaxgpt.model.attention import choose


def write(tmp_path, body):
  path = tmp_path / "c.py"
  path.write_text(
    "from jaxgpt import config\n\ndef get_config(arg=''):\n"
    f"  c = config.base()\n  {body}\n  return c\n"
  )
  return path


def test_values_know_where_they_came_from(tmp_path):
  path = write(
    tmp_path,
    "c.model.update(config.preset('llama3_8b')); c.optim.lr = 3e-4; c.model.num_layers = 2",
  )
  c, origin = config.load(path, ["--config.data.seq_len=128", "--noconfig.data.shuffle"])
  assert (c.optim.lr, c.model.num_layers, c.data.seq_len, c.data.shuffle) == (3e-4, 2, 128, False)
  assert origin["model.width"] == "preset llama3_8b"
  assert origin["model.num_layers"] == origin["optim.lr"] == "file"
  assert origin["data.seq_len"] == origin["data.shuffle"] == "command line"
  assert origin["optim.b1"] == "base"
  assert origin.keys() == config.flatten(c).keys()


def test_a_placeholder_can_be_set_from_the_command_line(tmp_path):
  c, _ = config.load(write(tmp_path, "pass"), ["--config.model.num_kv_heads=3"])
  assert config.resolve(c).model.num_kv_heads == 3


@pytest.mark.parametrize(
  "override, words",
  [
    ("--config.optim.lrr=1", "optim.lrr.*did you mean 'optim.lr'"),
    ("--config.optim.lr=fast", "optim.lr=fast"),
    ("--config.model.num_heads=5", "model.num_heads=5 .*model.width=384"),
    ("--config.model.num_kv_heads=4", "num_kv_heads=4 .*num_heads=6"),
    ("--config.optim.accumulate=3", "optim.accumulate=3 .*data.batch_size=8"),
    ("--config.data.batch_size=0", "data.batch_size=0"),
    ("--config.schedule.warmup_steps=2000", "warmup_steps=2000 .*train.steps=1000"),
    ("--config.model.max_len=64", "data.seq_len=256 .*model.max_len=64"),
    ("--config.optim.lr=nan", "optim.lr=nan"),
    ("--config.model.dropout=1.0", "model.dropout=1.0"),
    ("--config.optim.eps=nan", "optim.eps=nan"),
    ("--config.data.stream_window=0", "data.stream_window=0"),
    ("--config.schedule.final_ratio=2", "final_ratio=2"),
    ("--config.model.init_std=-1", "init_std=-1"),
    ("--config.seed=100000000000000000000", "seed=1000"),
    ("--config.mesh.rules.mpl=none", "mesh.rules.mpl; did you mean 'mesh.rules.mlp'"),
    ("--config.mesh.rules.mlp=tensr", "mesh.rules.mlp='tensr'.*did you mean 'tensor'"),
    ("--config.mesh.rules.mlp=", "mesh.rules.mlp='': no mesh axis ''; give .*or none"),
    ("--config.mesh.rules.embed=fsdp,fsdp", "mesh.rules.embed='fsdp,fsdp': .*'fsdp' twice"),
    (
      "--config.mesh.rules.act_heads=fsdp",
      "mesh.rules.act_heads='fsdp': the heads .*'fsdp' twice .its 'rows' always is.; "
      "take 'fsdp' out",
    ),
    (
      "--config.mesh.rules.act_embed=tensor",
      "mesh.rules.act_embed='tensor' and mesh.rules."
      "residual_length='seq,tensor': the residual stream between blocks",
    ),
    ("--config.mesh.rules.layers=none", "rules.layers cannot be set: the pipeline .*mesh.stage;"),
    ("--config.model.rope.beta_slow=0.0", "model.rope.beta_slow=0.0: must be above 0"),
    ("--config.model.rope.fraction=1.5", "model.rope.fraction=1.5 is a fraction of a head"),
    (
      "--config.mesh.compiler_options=('xla_foo',)",
      "mesh.compiler_options: 'xla_foo' must be .name=",
    ),
    ("--config.optim.lr_scales=('layers/*',0.1)", r"'layers/\*' must be \(pattern, factor\)"),
    ("--config.mesh.rules.length=tensor", "rules.length cannot be set: the ring .*mesh.seq;"),
  ],
)
def test_bad_values_are_named(tmp_path, override, words):
  with pytest.raises(UserError, match=words):
    config.resolve(config.load(write(tmp_path, "pass"), [override])[0])


def test_sigmoid_routers_need_two_experts_per_group(tmp_path):
  body = (
    "c.model.update_from_flattened_dict({'mlp_pattern': ('moe',), 'moe.experts': 4, "
    "'moe.groups': 4, 'moe.top_groups': 2, 'moe.router': 'sigmoid'})"
  )
  with pytest.raises(UserError, match="model.moe.groups=4 leaves one expert per group"):
    config.resolve(config.load(write(tmp_path, body))[0], vocab_size=8)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"data.weights": (0.5, 0.5)}, "data.stream='x' replaces the training splits"),
  ],
)
def test_keys_that_a_stream_excludes_are_named(change, words):
  c = config.base()
  c.update_from_flattened_dict(change)
  config.resolve(c, vocab_size=8)
  c.data.stream = "x"
  with pytest.raises(UserError, match=words):
    config.resolve(c, vocab_size=8)


@pytest.mark.parametrize(
  "body, words",
  [
    ("c.optim.lrr = 1", "lrr"),
    ("c.model.update(config.preset('llama4_8b'))", "llama4_8b.*did you mean 'llama3_8b'"),
    ("c.optim.lr = 'fast'", "c.py:5: .*lr"),
    ("c.optim.lr = undefined", "undefined"),
    ("return 3", "get_config"),
    ("c.optim.lr = None", "optim.lr=None"),
    ("c.data.batch_size = None", "data.batch_size=None"),
    ("import ml_collections; c = ml_collections.ConfigDict({'optim': 1})", "config.base"),
    ("c.unlock(); c.extra = 1", "unknown key 'extra'"),
  ],
)
def test_bad_files_are_named(tmp_path, body, words):
  with pytest.raises(UserError, match=words):
    config.load(write(tmp_path, body))


def test_a_relative_path_still_names_the_line(tmp_path, monkeypatch):
  write(tmp_path, "c.optim.lrr = 1")
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="c.py:5: "):
    config.load("c.py")


def test_a_file_that_is_not_python_is_refused(tmp_path):
  (tmp_path / "c.txt").write_text("")
  with pytest.raises(UserError, match="Python file"):
    config.load(tmp_path / "c.txt")


def test_a_missing_file_is_named():
  with pytest.raises(UserError, match="no such file"):
    config.load("configs/nothing_like_it.py")


def test_a_resolved_config_survives_the_run_folder():
  c = config.base()
  c.model.logit_softcap = 30.0
  c = config.resolve(c, vocab_size=99)
  again = config.resolve(config.from_dict(c.to_dict()))
  assert again.to_dict() == c.to_dict()
  assert again.model.vocab_size == 99


def test_every_choice_is_implemented():
  implemented = {
    "model.activation": ops.ACTIVATIONS,
    "model.attention": {"auto", *choose.FORMS},
    "data.packing": packing.PACKINGS,
  }
  for key, names in implemented.items():
    assert set(KEYS[key].choices) == set(names), key
  assert set(remat.POLICIES) == {"none", *policies.REMAT}


def test_keys_that_are_free_on_resume_do_not_count_as_a_difference():
  a = config.resolve(config.base(), vocab_size=10)
  b = config.from_dict(a.to_dict())
  b.log.every = 1
  b.mesh.data = 4
  b.optim.lr = 0.5
  b.update_from_flattened_dict({"model.remat": "full", "objective.loss_chunk": 8})
  assert config.difference(a, b) == [("optim.lr", a.optim.lr, 0.5)]


def test_resolving_does_not_change_the_config():
  c = config.base()
  config.resolve(c, 100)
  assert c.model.max_len is None and c.model.rope.original_len is None


def test_user_options_are_kept(tmp_path):
  body = "c.objective.options.gamma = 2.0; c.optim.options.names = ('a', 'b')"
  overrides = [
    "--config.objective.options.gamma=3",
    "--config.schedule.options.power=0.5",
    "--config.schedule.options.kind=fast",
    "--config.optim.options.nesterov",
    "--noconfig.optim.options.bias",
    "--config.optim.options.fused=true",
  ]
  c, origin = config.load(write(tmp_path, body), overrides)
  c = config.resolve(c, 10)
  assert c.objective.options.to_dict() == {"gamma": 3.0}
  assert c.schedule.options.to_dict() == {"power": 0.5, "kind": "fast"}
  assert c.optim.options.to_dict() == {
    "names": ("a", "b"),
    "nesterov": True,
    "bias": False,
    "fused": True,
  }
  assert origin["objective.options.gamma"] == origin["schedule.options.power"] == "command line"
  assert origin["optim.options.names"] == "file"
  again = config.from_dict(json.loads(c.to_json()))
  assert config.difference(c, again) == []
  again.objective.options.gamma = 4.0
  assert config.difference(c, again) == [("objective.options.gamma", 3.0, 4.0)]


@pytest.mark.parametrize(
  "body, words",
  [
    ("c.objective.options.f = print", "objective.options.f=<built-in.*options are numbers"),
    ("c.objective.options.f = (1, None)", "objective.options.f=None: options are numbers"),
    ("c.objective.options.a = {'b': 1}", "unknown key 'objective.options.a.b'"),
  ],
)
def test_options_have_plain_values(tmp_path, body, words):
  with pytest.raises(UserError, match=words):
    config.resolve(config.load(write(tmp_path, body))[0], 10)


@pytest.mark.parametrize("key", ["objective.name", "optim.name", "schedule.name"])
def test_a_name_may_stand_for_an_object_in_a_users_file(key):
  c = config.base()
  c.update_from_flattened_dict({key: "my/file.py:thing"})
  config.resolution.check_values(c)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"scaling": "llama3", "low_freq": 4.0}, "high_freq=4.0 must be above model.rope.low_freq=4.0"),
    ({"scaling": "ntk", "fraction": 0.03125}, "'ntk' needs more than 2 rotated entries"),
    ({"scaling": "yarn", "theta": 1.0}, "'yarn' needs model.rope.theta other than 1.0"),
    (
      {"scaling": "longrope", "original_len": 1, "factor": 2.0},
      "model.rope.original_len=1 is too short for longrope's formula",
    ),
  ],
)
def test_scalings_that_would_divide_by_zero_are_refused(changes, words):
  c = config.base()
  c.model.position = "rotary"
  c.model.rope.update(changes)
  with pytest.raises(UserError, match=words):
    config.resolve(c, vocab_size=8)
