"""The files in configs/tasks train on one device and on several, with equal losses."""

import pathlib

import jax
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.config import loading
from jaxgpt.data import pipeline
from jaxgpt.data.batch_source import Batching
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import objectives, train_step
from tests import quick
from tests.data.layouts_test import T as BYTES
from tests.data.layouts_test import write

CONFIGS = pathlib.Path(__file__).parents[3] / "configs" / "tasks"
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
    }[kind]


def trajectory(kind, folder, model, accumulate=1, **mesh):
  """[(loss, gradient norm)] of the first steps of a config file, with a smaller model."""
  c, _ = loading.load(CONFIGS / f"{kind}.py")
  c.model.update(dict(num_layers=1, width=16, num_heads=4, mlp_width=16, init_std=0.2) | model)
  c.data.update(dict(seq_len=LENGTH, batch_size=ROWS))
  c.schedule.warmup_steps = 1
  c.model.num_labels = 2 if kind == "question_answering" else len(WORDS)
  c.mesh.update(dict(data=1, fsdp=1) | mesh)
  c.optim.accumulate = accumulate
  c = config.resolve(c, vocab_size=BYTES.vocab_size)
  build_lib.check(c)
  layout = objectives.find(c).layout
  data = pipeline.make(
    folder, "train", Batching(seq_len=LENGTH, batch_size=ROWS), layout=layout, num_labels=4
  )
  sizes = [c.mesh[axis] for axis in config.MESH_AXES]
  devices = mesh_lib.make(c.mesh, jax.devices()[: int(np.prod(sizes))])
  parts = build_lib.build(c, devices)
  step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), data.batch(0))
  compiled = train_step.compile(step, parts.state, shapes, devices)
  with jax.set_mesh(devices):
    state = train_step.first_state(parts.model, parts.tx, c.seed, parts.state)
  out = []
  for i in range(STEPS):
    state, metrics = compiled(state, batches_lib.to_devices(data.batch(i), devices))
    out.append((metrics["loss"], metrics["grad_norm"]))
  return np.array(out, np.float64)


# On a decoder the tokens of a row are permuted where mesh.seq cuts it.
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
