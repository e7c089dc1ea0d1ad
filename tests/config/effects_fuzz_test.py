"""Every setting of an accepted config acts: on the program, on the batches, or as listed here.

A config is drawn, and one of its keys is changed. If a new run with the change is accepted without
a note on that key, the lowered program or the batches must differ from those without the change.
"""

import functools
import hashlib
import json

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from jaxgpt import config
from jaxgpt.config import effects
from jaxgpt.config.keys import KEYS
from jaxgpt.data import layouts
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build, objectives, train_step

# Keys that change neither the program nor the batches, and what they change instead. Keys that are
# free on resume need no entry: they never change a result, only speed, memory, or what is written.
ELSEWHERE = {
  "init_from": "the initial weights, which are read from a folder",
  "model.preset": "nothing: it records the preset that filled the section",
  "model.head": "nothing by itself: each objective takes one head, others are refused",
  "model.max_len": "the longest row and the longest generated text, unless positions are learned",
  "model.label_names": "the numbers of the classes in labelled data",
  "model.moe.buffer": "rows of devices with experts, in tests/model/experts/dropless_test.py",
  "optim.keep_zeros": "zeros in training, in tests/analysis/compression/compressed_run_test.py",
  "data.stream": "the training data, in tests/data/stream_test.py",
  "data.stream_field": "the column that a stream reads, in tests/data/stream_test.py",
  "data.stream_window": "the shuffling of a stream, in tests/data/stream_test.py",
  "data.stream_readers": "who reads which file of a stream, in tests/data/stream_test.py",
  "data.overlap": "the windows of long passages, in tests/text/tokenizers/passages_test.py",
  "data.stages": "the shapes of the batches, in tests/data/stages_test.py",
  "objective.teacher": "the teacher's weights, which are read from a folder",
  "objective.teacher_config": "the teacher, which training fills in from its folder",
  "objective.stored": "arrays of the batches, in tests/training/objectives/fixed_models_test.py",
  "objective.top_k": "arrays of the batches, in tests/training/objectives/distillation_test.py",
  "train.spike.factor": "at which losses the run goes back, in tests/training/spikes_test.py",
  "train.spike.window": "at which losses the run goes back, in tests/training/spikes_test.py",
  "train.spike.patience": "at which losses the run goes back, in tests/training/spikes_test.py",
  "train.spike.before": "the batches that are left out, in tests/training/spikes_test.py",
  "train.spike.rewinds": "how often a run goes back, in tests/training/spikes_test.py",
  "train.steps": "the number of steps, and the schedules that fall towards the last one",
}
# Keys that act only for some values of others, in a way that no condition can say.
IT_DEPENDS = {
  "model.rope.low_freq": "whether a frequency of the head lies in the ramp",
  "model.rope.high_freq": "whether a frequency of the head lies in the ramp",
  "model.rope.beta_fast": "whether a frequency of the head lies in the ramp",
  "model.rope.beta_slow": "whether a frequency of the head lies in the ramp",
  "model.rope.original_len": "ntk, longrope: whether the row is longer than it",
  "model.rope.factor": "ntk: whether the row is longer than the original context",
  "model.rope.long_factors": "whether the row is longer than the original context",
  "model.rope.short_factors": "whether the row is longer than the original context",
}

LLAMA = {
  "model.norm": "rmsnorm",
  "model.position": "rotary",
  "model.activation": "silu",
  "model.gated": True,
  "model.bias": False,
}
LOCAL = {"model.attention_pattern": ("local", "global"), "model.window": 3}
MOE = {"model.mlp_pattern": ("moe",), "model.moe.experts": 4}
ENCODER = {"model.causal": False, "model.head_bias": True, "model.head_transform": "norm"}
CLASSIFIER = {"objective.name": "classification", "model.head": "classifier"}
PROFILES = {
  "gpt": {},
  "llama": LLAMA | {"model.tie_embeddings": False},
  "local": LLAMA | LOCAL | {"model.rope.local_theta": 100.0, "model.norm_placement": "both"},
  "linear": LLAMA | {"model.rope.scaling": "linear", "model.rope.factor": 4.0},
  "llama3": LLAMA | {"model.rope.scaling": "llama3", "model.rope.factor": 8.0},
  "yarn": LLAMA | {"model.rope.scaling": "yarn", "model.rope.factor": 4.0},
  "ntk": LLAMA
  | {"model.rope.scaling": "ntk", "model.rope.factor": 2.0, "model.rope.original_len": 4},
  "longrope": LLAMA
  | {
    "model.rope.scaling": "longrope",
    "model.rope.factor": 2.0,
    "model.rope.short_factors": (1.0, 2.0),
    "model.rope.long_factors": (3.0, 4.0),
  },
  "experts": MOE,
  "some experts": LLAMA | MOE | {"model.mlp_pattern": ("dense", "moe"), "model.moe.capacity": 1.0},
  "groups": MOE | {"model.moe.groups": 2, "model.moe.router": "sigmoid", "model.moe.shared": 1},
  "latent": LLAMA | {"model.head_dim": 8, "model.latent.kv_rank": 4, "model.latent.rope_dim": 2},
  "masked": ENCODER | {"objective.name": "masked_lm", "model.token_types": 2},
  "encoder": ENCODER | CLASSIFIER | {"model.norm_placement": "post", "model.embed_norm": True},
  "labels": ENCODER | CLASSIFIER | {"objective.name": "multi_label", "model.num_labels": 3},
  "tags": ENCODER
  | {
    "objective.name": "token_classification",
    "model.head": "token_classifier",
    "model.num_labels": 3,
  },
  "passages": ENCODER
  | {
    "objective.name": "question_answering",
    "model.head": "token_classifier",
    "model.num_labels": 2,
  },
  "vectors": {"objective.name": "contrastive", "model.head": "none", "model.causal": False},
  "decoder": LLAMA | CLASSIFIER | {"model.pooling": "last"},
  "adapters": LLAMA | {"model.lora.rank": 2, "model.lora.targets": ("q", "up")},
  "quantized base": LLAMA | {"model.lora.rank": 2, "model.lora.base": "int4"},
  "preference": {"objective.name": "preference", "model.lora.rank": 2},
  "all preferred": {"objective.name": "preference", "optim.ema": 0.5},
  "simpo": {"objective.name": "preference", "objective.loss": "simpo"},
  "distillation": {
    "objective.name": "distillation",
    "objective.teacher": "RUN",
    "objective.teacher_config": json.dumps(
      {"vocab_size": 259, "max_len": 8, "num_layers": 1, "width": 8, "num_heads": 2}
    ),
  },
  "bfloat16": {"model.dtype": "bfloat16", "optim.name": "lion"},
  "int8": {"model.quantize": "int8"},
  "muon": {"optim.name": "muon", "schedule.name": "wsd", "optim.ema": 0.5},
  "adafactor": {"optim.name": "adafactor", "schedule.name": "constant", "model.dropout": 0.1},
  "pruned": LLAMA | {"optim.prune.sparsity": 0.5, "optim.prune.every": 2},
  "mup": LLAMA | {"model.mup.base_width": 4, "model.mup.base_depth": 1},
  "mixture": {"data.path": "two folders", "data.weights": (0.5, 0.5), "schedule.name": "linear"},
}
SMALL = {
  "model.num_layers": 2,
  "model.width": 8,
  "model.num_heads": 2,
  "data.seq_len": 8,
  "data.batch_size": 2,
  "schedule.warmup_steps": 2,
  "train.steps": 8,
}
# Values for keys that their declarations do not give any.
VALUES = {
  "data.path": ("one folder", "two folders"),
  "data.weights": ((1, 0), (0.25, 0.75)),
  "data.weight_changes": (((1, (1, 0)),), ((2, (0.1, 0.9)),)),
  "objective.name": tuple(objectives.OBJECTIVES),
  "optim.name": ("adamw", "lion", "adafactor", "muon"),
  "optim.trainable": (("embed",), ("layers/*",), ("*_lora_?",), ("*q*", "embed")),
  "optim.frozen": (("embed",), ("layers/*",), ("*_lora_a",), ("nothing",)),
  "optim.lr_scales": ((("embed", 2.0),), (("*", 1.5), ("embed", 2.0)), (("layers/*", 0.5),)),
  "schedule.name": ("cosine", "linear", "wsd", "inverse_sqrt", "constant"),
  "model.lora.targets": (("q",), ("*",), ("down", "o"), ("gate",), ("k_proj", "v_proj")),
  "model.rope.short_factors": ((1.0, 1.5), ()),
  "model.rope.long_factors": ((2.0, 1.5), ()),
}
NUMBERS = (0, 1, 2, 3, 4, 6, 8, 0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 8.0, 10_000.0)
TRIED = [flat for flat in KEYS if not config.is_free_on_resume(flat) and flat not in ELSEWHERE]


def values_of(flat):
  """Values to try for a key, from its declaration."""
  key = KEYS[flat]
  if flat in VALUES or key.choices:
    return VALUES.get(flat) or tuple(key.choices)
  if key.items:
    pairs = tuple((a, b) for a in key.items for b in key.items if a != b)
    return tuple((a,) for a in key.items) + pairs
  kind = key.value_type or type(key.default)
  if kind is bool:
    return (True, False)
  assert kind in (int, float), f"{flat}: give it values to try"
  within = lambda x: key.interval is None or x in key.interval
  return tuple(x for x in NUMBERS if type(x) is kind and within(x))


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
  """{name in the values above: data.path}."""
  from jaxgpt.text.prepare import prepare

  other = tmp_path_factory.mktemp("other")
  (other / "a.jsonl").write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(40)))
  options = dict(tokenizer="bytes", validation=0.1, cut_chars=0)
  prepare.prepare([other / "a.jsonl"], other / "data", **options)
  return {"one folder": str(corpus), "two folders": f"{corpus},{other / 'data'}"}


class Accepted:
  """A config that a new run accepts, and what becomes of it. Each part is computed when asked for.

  Raises:
    UserError: A new run refuses the config.
  """

  def __init__(self, changes, folders):
    c = config.base()
    values = SMALL | {"data.path": "one folder"} | changes
    c.update_from_flattened_dict(values | {"data.path": folders[values["data.path"]]})
    self.notes = effects.check(c, {})
    build.check(c)
    self.c = config.resolve(c, vocab_size=259)
    self.mesh = mesh_lib.make(self.c.mesh, jax.devices()[:1])
    self.parts = build.build(self.c, self.mesh)
    self.layout = objectives.find(self.c).layout
    rows, num_labels = self.c.data.batch_size, self.c.model.num_labels
    self.batch = layouts.blank(self.layout, rows, self.c.data.seq_len, num_labels)

  @functools.cached_property
  def data(self):
    if self.layout not in ("causal_lm", "masked_lm"):
      return self.layout  # the folders have no labels and no pairs
    read = batches_lib.training_data(self.c)
    arrays = [x for step in range(6) for x in read.batch(step).values()]
    return [hashlib.sha256(x.tobytes()).hexdigest() for x in arrays]

  @functools.cached_property
  def evaluation(self):
    loss = lambda weights, batch: self.parts.objective(weights, None, batch, None)
    return self._text(loss, train_step.weights(self.parts.state), self.batch)

  @functools.cached_property
  def initial(self):
    return self._text(lambda: transformer.init(self.parts.model, jax.random.key(self.c.seed)))

  @functools.cached_property
  def training(self):
    step = train_step.make(self.parts.objective, self.parts.tx, self.parts.schedule, self.c)
    return train_step.lower(step, self.parts.state, self.batch, self.mesh).as_text()

  def _text(self, f, *args):
    with jax.set_mesh(self.mesh):
      return jax.jit(f).lower(*args).as_text()


PARTS = ("data", "evaluation", "training", "initial")


@functools.cache
def base_of(profile, folders_json):
  return Accepted(PROFILES[profile], json.loads(folders_json))


def outcome(profile, flat, value, folders):
  """'same', 'refused', 'noted', 'listed', the first part that differs, or None: no effect."""
  base = base_of(profile, json.dumps(folders))
  try:
    other = Accepted(PROFILES[profile] | {flat: value}, folders)
    if other.c.to_dict() == base.c.to_dict():
      return "same"
    if any(note.startswith(f"note: {flat}=") for note in other.notes):
      return "noted"
    differs = next((part for part in PARTS if getattr(base, part) != getattr(other, part)), None)
  except UserError:
    return "refused"
  return differs or ("listed" if flat in IT_DEPENDS else None)


def check(data, folders):
  flat = data.draw(st.sampled_from(TRIED), "key")
  profile = data.draw(st.sampled_from(list(PROFILES)), "profile")
  value = data.draw(st.sampled_from(values_of(flat)), "value")
  found = outcome(profile, flat, value, folders)
  assert found, f"{flat}={value!r} is accepted in {profile!r} and changes nothing"


SETTINGS = dict(
  deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True
)


def test_a_changed_key_acts(folders):
  run = hypothesis.given(st.data())(lambda data: check(data, folders))
  hypothesis.settings(max_examples=10, **SETTINGS)(run)()


@pytest.mark.slow
def test_many_changed_keys_act(folders):
  run = hypothesis.given(st.data())(lambda data: check(data, folders))
  hypothesis.settings(max_examples=300, **SETTINGS)(run)()


@pytest.mark.slow
@pytest.mark.parametrize("flat", TRIED)
def test_every_key_acts_somewhere(flat, folders):
  acts = ("listed", *PARTS)
  assert any(
    outcome(profile, flat, value, folders) in acts
    for profile in PROFILES
    for value in values_of(flat)
  )


def test_the_lists_name_keys_with_a_reason():
  assert {*ELSEWHERE, *IT_DEPENDS} <= KEYS.keys()
  assert not {flat for flat in ELSEWHERE if config.is_free_on_resume(flat)}
  assert all([*ELSEWHERE.values(), *IT_DEPENDS.values()])
