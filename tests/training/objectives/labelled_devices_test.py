"""The files in configs train on one device and on several, with equal losses."""

import pathlib

import jax
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.config import loading
from jaxgpt.config.architecture import architecture
from jaxgpt.model import transformer
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.storage import strict_json
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import train_step
from jaxgpt.training.objectives import preference
from tests import quick
from tests.data.layouts_test import T as BYTES
from tests.data.layouts_test import write

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
FILES = {  # kind of data: config file, if it is not called so
  "classification": "tasks/sentiment",
  "preference": "preference",
  "seq2seq": "distillation",
  "text": "masked_lm",
}
VOCAB, BEST = BYTES.vocab_size, 3
STEPS, ROWS, LENGTH = 2, 8, 16
WORDS = ("a", "bc", "def", "gh")
DECODER = dict(causal=True, pooling="last")


def fields(kind):
  """Twelve examples of a pattern, with their classes."""
  for i in range(12):
    word, other = WORDS[i % 4], WORDS[i % 3]
    yield {
      "multi_label": {"text": f"{word} {other}", "labels": sorted({word, other})},
      "tagging": {"words": [word, other], "tags": [word, "a"]},
      "question_answering": {
        "question": "?",
        "context": f"{other} {word} it, and more",
        "answers": [{"text": word, "answer_start": len(other) + 1}] if i % 4 else [],
      },
      "retrieval": {"query": word, "positive": f"{other} {i}"},
      "classification": {"text": f"{other} {word}", "label": word},
      "preference": {"prompt": other, "chosen": word, "rejected": f"{i}"},
      "seq2seq": {"input": other, "target": word},
    }[kind]


def stored(data):
  """Batches with random predictions of a teacher, as `objective.stored` keeps them."""
  rows, draws = data.len_rows, np.random.default_rng(0)
  log_p = np.log(draws.dirichlet(np.ones(BEST + 1), (rows, LENGTH))).astype(np.float32)
  ids = draws.permuted(np.tile(np.arange(VOCAB, dtype=np.int32), (rows, LENGTH, 1)), axis=-1)
  return data.annotated({"teacher_ids": [ids[..., :BEST]], "teacher_log_p": [log_p]})


def trajectory(kind, folder, model, accumulate=1, objective=None, **mesh):
  """[(loss, gradient norm)] of the first steps of a config file, with a smaller model."""
  c, _ = loading.load(CONFIGS / f"{FILES.get(kind, f'tasks/{kind}')}.py")
  c.objective.update(objective or {})
  c.model.update(dict(num_layers=1, width=16, num_heads=4, mlp_width=16, init_std=0.2) | model)
  c.data.update(dict(path=folder, seq_len=LENGTH, batch_size=ROWS))
  c.schedule.warmup_steps = 1
  c.model.num_labels = 2 if kind == "question_answering" else len(WORDS)
  if c.objective.name == "distillation":
    teacher = c.model.copy_and_resolve_references()
    teacher.update(dict(vocab_size=VOCAB, width=32))
    keys = architecture(config.resolve(config.from_dict({"model": teacher.to_dict()})).model)
    c.objective.update(dict(teacher="T", teacher_config=strict_json.dumps(keys)))
  c.mesh.update(dict(data=1, fsdp=1) | mesh)
  c.optim.accumulate = accumulate
  c = config.resolve(c, vocab_size=BYTES.vocab_size)
  build_lib.check(c)
  data = batches_lib.training_data(c)
  data = stored(data) if c.objective.stored else data
  sizes = [c.mesh[axis] for axis in config.MESH_AXES]
  devices = mesh_lib.make(c.mesh, jax.devices()[: int(np.prod(sizes))])
  parts = build_lib.build(c, devices)
  step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), data.batch(0))
  compiled = train_step.compile(step, parts.state, shapes, devices)
  with jax.set_mesh(devices):
    theirs = parts.state.get("frozen", {}).get("teacher")
    if theirs is not None:
      placed = jax.tree.map(lambda s: s.sharding, theirs)
      made = transformer.init(build_lib.teacher(c, devices).model, jax.random.key(1))
      theirs = jax.device_put(made, placed)
    state = train_step.first_state(
      parts.model, parts.tx, c.seed, parts.state, given=None, teacher=theirs
    )
  out = []
  for i in range(STEPS):
    state, metrics = compiled(state, batches_lib.to_devices(data.batch(i), devices))
    out.append((metrics["loss"], metrics["grad_norm"]))
  return np.array(out, np.float64)


# On a decoder the tokens of a row are permuted where mesh.seq cuts it.
@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, model, mesh",
  quick.first(
    [
      ("multi_label", DECODER, dict(fsdp=2, seq=2, tensor=2)),
      ("tagging", DECODER, dict(data=2, seq=2, tensor=2)),
      ("question_answering", DECODER, dict(data=2, fsdp=2, seq=2)),
      ("retrieval", {}, dict(data=4, accumulate=2)),  # microbatches are negatives of each other
      ("question_answering", {}, dict(data=2, seq=4)),
      ("retrieval", DECODER, dict(data=2, fsdp=2, seq=2)),
    ],
    1,
  ),
)
def test_eight_devices_equal_one(tmp_path, kind, model, mesh):
  names = WORDS if kind in ("multi_label", "tagging") else ()
  folder = write(tmp_path / "data", kind, list(fields(kind)), names)
  one = trajectory(kind, folder, model)
  assert np.isfinite(one).all() and one[0, 1] > 1e-3
  np.testing.assert_allclose(trajectory(kind, folder, model, **mesh), one, rtol=5e-6)


SMOOTH = dict(label_smoothing=0.1)
AXES = dict(data=2, fsdp=2, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, objective, mesh",
  quick.first(
    [
      ("seq2seq", dict(stored="S", top_k=BEST, divergence="reverse"), AXES),
      ("seq2seq", {}, dict(data=2, seq=2, tensor=2)),
      ("classification", SMOOTH, AXES),
      ("text", SMOOTH, AXES),
      *(("preference", dict(loss=loss), AXES) for loss in preference.LOSSES),
    ]
  ),
)
def test_eight_devices_equal_one_for_every_loss(tmp_path, corpus, kind, objective, mesh):
  folder = str(corpus)
  if kind != "text":
    names = WORDS if kind == "classification" else ()
    folder = write(tmp_path / "data", kind, list(fields(kind)), names)
  one = trajectory(kind, folder, {}, objective=objective)
  assert np.isfinite(one).all() and one[0, 1] > 1e-3
  np.testing.assert_allclose(
    trajectory(kind, folder, {}, objective=objective, **mesh), one, rtol=5e-6
  )
