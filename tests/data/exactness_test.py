"""One sequence of batches, whatever makes them: hosts, processes, threads, stops and goes.

Each batch of 201 steps of a mixture of three packed sources with a curriculum, for causal and for
masked language models, is compared by its digest.
"""

import hashlib
import json
import os
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxgpt import config
from jaxgpt.data import masking, pipeline
from jaxgpt.data.batch_source import Batching
from jaxgpt.text.prepare import prepare, shards
from jaxgpt.text.readers import documents
from jaxgpt.text.tokenizers import examples, tokenizer
from tests import quick

STEPS, B = 201, 8
OBJECTIVES = ("causal_lm", "masked_lm")


def make(path, objective, seq_len=96):
  masked = None
  if objective == "masked_lm":
    masked = masking.make(config.base().objective, tokenizer.ByteTokenizer(), 5)
  return pipeline.make(
    path,
    "train",
    Batching(seq_len=seq_len, batch_size=B, seed=5),
    weights=(0.6, 0.3, 0.1),
    weight_changes=((60, (0.2, 0.3, 0.5)), (150, (0, 1, 1))),
    layout=objective,
    masking=masked,
  )


def digest(batch):
  """Of all arrays: names, dtypes, shapes and content."""
  h = hashlib.sha256()
  for key in sorted(batch):
    x = batch[key]
    h.update(f"{key} {x.dtype} {x.shape}".encode() + x.tobytes())
  return h.hexdigest()


def joined(parts):
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """data.path of three folders with documents of very different lengths."""
  folder = tmp_path_factory.mktemp("exactness")
  rng = np.random.default_rng(0)
  for name, count, mean in (("web", 300, 3.5), ("code", 60, 5), ("notes", 90, 2.5)):
    texts = (
      f"{name} {i} " + "".join(rng.choice(list("abcdef \n"), int(n)))
      for i, n in enumerate(rng.lognormal(mean, 1, count))
    )
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepare.prepare(folder / f"{name}.jsonl", folder / name, tokenizer="bytes", shard_tokens=4000)
  return ",".join(str(folder / name) for name in ("web", "code", "notes"))


@pytest.fixture(scope="module", params=quick.first(OBJECTIVES))
def expected(path, request):
  """(objective, its digests): one host, no threads."""
  b = make(path, request.param)
  digests = [digest(b.batch(step)) for step in range(STEPS)]
  assert len(set(digests)) == STEPS
  return request.param, digests


@pytest.mark.parametrize("hosts", quick.first([4, 2, 8]))
def test_any_number_of_hosts_gives_the_same_batches(path, expected, hosts):
  objective, digests = expected
  b = make(path, objective)
  for step in range(STEPS):
    assert digest(joined([b.batch(step, h, hosts) for h in range(hosts)])) == digests[step]


@pytest.mark.parametrize("threads, prefetch", [(0, 0), (1, 1), (2, 7), (8, 3)])
def test_threads_and_prefetching_change_nothing(path, expected, threads, prefetch):
  objective, digests = expected
  b = make(path, objective)
  batches = b.iterate(stop_step=STEPS, threads=threads, prefetch=prefetch)
  assert [digest(batch) for batch in batches] == digests


def test_a_run_that_stopped_goes_on_with_other_hosts(path, expected):
  objective, digests = expected
  first = make(path, objective)
  before = [digest(batch) for batch in first.iterate(stop_step=77)]
  after = make(path, objective)
  hosts = [
    after.iterate(77, stop_step=STEPS, host_index=h, host_count=4, threads=2) for h in range(4)
  ]
  assert before + [digest(joined(parts)) for parts in zip(*hosts, strict=True)] == digests


_PROCESS = """
import hashlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
from tests.data import exactness_test as t
path, objective, host, count, out = sys.argv[2:]
b = t.make(path, objective)
with open(out, "wb") as f:
  for batch in b.iterate(stop_step=t.STEPS, host_index=int(host), host_count=int(count)):
    for key in sorted(batch):
      f.write(batch[key].tobytes())
"""


@pytest.mark.slow
def test_two_processes_make_a_half_each(path, expected, tmp_path):
  objective, digests = expected
  root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _PROCESS, root, path, objective, str(h), "2", str(tmp_path / str(h))]
    )
    for h in range(2)
  ]
  assert [p.wait() for p in processes] == [0, 0]
  like = make(path, objective).batch(0, 0, 2)
  halves = [np.fromfile(tmp_path / str(h), np.uint8).reshape(STEPS, -1) for h in range(2)]
  for step in range(STEPS):
    parts = []
    for half in halves:
      part, at = {}, 0
      for key in sorted(like):
        part[key] = (
          half[step, at : at + like[key].nbytes].view(like[key].dtype).reshape(like[key].shape)
        )
        at += like[key].nbytes
      parts.append(part)
    assert digest(joined(parts)) == digests[step]


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
  st.data(),
  st.integers(1, 40),
  st.integers(0, 2**31),
  st.sampled_from(OBJECTIVES),
  st.sampled_from(["best_fit", "concat", "one_per_row"]),
)
def test_each_token_comes_once_an_epoch(tmp_path_factory, data, seq_len, seed, objective, packing):
  """Over lengths, row lengths and seeds, for each source of a mixture."""
  folder = tmp_path_factory.mktemp("once")
  t, serial = tokenizer.ByteTokenizer(), 0
  lengths = []
  for name in ("a", "b"):
    (folder / name).mkdir()
    writer = shards.SplitWriter(folder / name, "train", t, 50)
    lengths.append(data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=20)))
    for n in lengths[-1]:  # no two pieces of this stream of numbers are alike
      ids = 3 + (serial + np.arange(n)) ** 3 % 251
      serial += n
      writer.add(examples.Encoded(np.concatenate(([1], ids, [2])).astype(np.int32)), n, "x")
    shards.write_manifest(
      folder / name, shards.make_manifest(t, {"train": writer.finish()}, documents.Dropped())
    )
  masked = None
  if objective == "masked_lm":
    masked = masking.make(config.base().objective, t, seed)
  b = pipeline.make(
    f"{folder / 'a'},{folder / 'b'}",
    "train",
    Batching(seq_len=seq_len, batch_size=3, seed=seed, packing=packing),
    layout=objective,
    masking=masked,
  )
  more = 1 if objective == "causal_lm" else 0
  used = [[np.zeros(n + 2 - more, int) for n in of_source] for of_source in lengths]
  step = 0
  while min(b.epochs(step).values()) < 1:
    batch = b.batch(step)
    for i, r in enumerate(b.rows(step)):
      spans = list(zip(*b.sources[r.source].pack.spans(r.row), strict=True))
      total = sum(int(n) for _, _, n in spans)
      assert (batch["segment_ids"][i] > 0).sum() == total <= seq_len
      stored = [b.sources[r.source].split.read(d, s, n + more) for d, s, n in spans]
      inputs = np.concatenate([ids[:n] for ids, (_, _, n) in zip(stored, spans, strict=True)])
      np.testing.assert_array_equal(batch["tokens" if more else "targets"][i, :total], inputs)
      if r.epoch == 0:
        for d, s, n in spans:
          used[r.source][d][s : s + n] += 1
    step += 1
  assert all((u == 1).all() for of_source in used for u in of_source)


@hypothesis.settings(deadline=None, max_examples=8)
@hypothesis.given(
  st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1), st.integers(0, 9)
)
def test_no_document_is_in_two_splits(tmp_path_factory, texts, salt):
  folder = tmp_path_factory.mktemp("splits")
  texts = ["always there"] + [t for t in texts if t.strip()]
  (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts * 2))
  try:
    prepare.prepare(
      folder / "a.jsonl",
      folder / "data",
      tokenizer="bytes",
      validation=0.3,
      test=0.3,
      cut_chars=0,
      salt=str(salt),
    )
  except Exception as e:
    assert "training split" in str(e)
    return
  seen = []
  for split in shards.SPLITS:
    if shards.read_manifest(folder / "data")["splits"][split]["documents"]:
      b = pipeline.make(
        folder / "data", split, Batching(seq_len=4096, batch_size=1, packing="one_per_row")
      )
      seen.append({batch["tokens"].tobytes() for batch in b.epoch_batches(threads=0, prefetch=0)})
  assert sum(map(len, seen)) == len(set().union(*seen)) == len(set(texts))
