"""A stream: each token once an epoch, and a state from which it goes on exactly."""

import collections
import gzip
import itertools
import json
import random

import numpy as np
import pytest

from jaxgpt.data import stream
from jaxgpt.data.batch_source import Batching
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import shards
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib

SEQ_LEN = 32
KEYS = {"tokens", "targets", "loss_weights", "segment_ids", "positions"}


@pytest.fixture(scope="module")
def texts():
  """Short ones, long ones (many rows), all different wherever they are cut."""
  return [f"{i:03} " * (1 + i * i % 41 + (200 if i % 17 == 0 else 0)) for i in range(120)]


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
  """The texts in files of several formats, among them a broken one of each sort."""
  folder = tmp_path_factory.mktemp("stream") / "raw"
  folder.mkdir()
  line = lambda text: json.dumps({"text": text}) + "\n"
  (folder / "a.jsonl").write_text("".join(map(line, texts[:50])) + '{"text": "half a li\n')
  with gzip.open(folder / "b.jsonl.gz", "wt") as f:
    f.write("not json\n" + "".join(map(line, texts[50:100])) + line(" ") + '{"other": 1}\n')
  for i, text in enumerate(texts[100:119]):
    (folder / f"c{i}.txt").write_text(text)
  (folder / "d.txt").write_bytes(b"latin1: \xe9")
  (folder / "e.txt").write_text(texts[119])
  return folder


def make(folder, corpus, **overrides):
  names = overrides.keys() & {"window", "field", "readers"}
  own = {"window": 20} | {name: overrides.pop(name) for name in names}
  batching = Batching(**{"seq_len": SEQ_LEN, "batch_size": 4, "seed": 1} | overrides)
  return stream.make(str(folder), corpus, tokenizer_lib.load(corpus), batching, **own)


def spans(batch):
  """The spans of a batch, each as a tuple of its tokens and the one after it."""
  out = []
  for tokens, targets, segments in zip(batch["tokens"], batch["targets"], batch["segment_ids"]):
    for number in range(1, segments.max() + 1):
      here = segments == number
      out.append((*tokens[here].tolist(), int(targets[here][-1])))
  return out


def expected(texts, corpus):
  """What an epoch holds: documents, the long ones cut every `SEQ_LEN` predictions."""
  tokenizer = tokenizer_lib.load(corpus)
  stored = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
  return collections.Counter(
    tuple(ids[i : i + SEQ_LEN + 1]) for ids in stored for i in range(0, len(ids) - 1, SEQ_LEN)
  )


def an_epoch(iterator, size):
  """Spans of batches of one row until they have `size` predictions."""
  out = []
  while size > 0:
    new = spans(next(iterator))
    out += new
    size -= sum(len(span) - 1 for span in new)
  assert size == 0
  return out


def test_each_token_comes_once_an_epoch(folder, corpus, texts):
  want = expected(texts, corpus)
  size = sum((len(span) - 1) * count for span, count in want.items())
  iterator = make(folder, corpus, batch_size=1).iterate()
  first, second = an_epoch(iterator, size), an_epoch(iterator, size)
  iterator.close()
  assert collections.Counter(first) == collections.Counter(second) == want
  assert first != second


@pytest.mark.parametrize("packing", ["concat", "one_per_row"])
def test_other_packings_lose_nothing_either(folder, corpus, texts, packing):
  pairs = lambda spans: collections.Counter(p for s in spans for p in itertools.pairwise(s))
  want = expected(texts, corpus)
  size = sum((len(span) - 1) * count for span, count in want.items())
  iterator = make(folder, corpus, batch_size=1, packing=packing).iterate()
  got = an_epoch(iterator, size)
  iterator.close()
  assert pairs(got) == pairs(want.elements())


def test_hosts_share_the_files(folder, corpus, texts):
  """Two hosts read each document between them, in batches of their own."""
  beginnings = lambda spans: {span for span in spans if span[0] == 1}  # bos; the texts differ
  got = []
  for host in range(2):
    s = make(folder, corpus, batch_size=2)
    iterator = s.iterate(host_index=host, host_count=2, prefetch=1)
    step, before = 0, []
    while s.epochs(step).get("stream", 0) < 2:  # the reading is ahead of the rows
      before += spans(next(iterator))
      step += 1
    iterator.close()
    got.append(beginnings(before))
  assert not got[0] & got[1]
  assert got[0] | got[1] == beginnings(expected(texts, corpus))


def test_batches_are_those_of_a_causal_language_model(folder, corpus):
  s = make(folder, corpus)
  batch = next(s.iterate())
  blank = s.blank(4)
  assert batch.keys() == blank.keys() == KEYS
  for key in KEYS:
    assert batch[key].shape == blank[key].shape and batch[key].dtype == blank[key].dtype
  np.testing.assert_array_equal(batch["loss_weights"], batch["segment_ids"] > 0)
  starts = batch["positions"] == 0
  np.testing.assert_array_equal(
    starts[:, 1:] & (batch["segment_ids"][:, 1:] > 0), np.diff(batch["segment_ids"]) > 0
  )


def test_it_goes_on_exactly_from_any_step(folder, corpus):
  """Through JSON, with batches in flight, over the ends of windows and epochs."""
  rng = random.Random(0)
  steps = 150
  whole = make(folder, corpus).iterate()
  want = [next(whole) for _ in range(steps)]
  whole.close()
  s, at, saved = make(folder, corpus), 0, None
  while at < steps:
    if saved is not None:
      s.set_state(json.loads(saved), 0, 1)
    iterator = s.iterate(at, prefetch=rng.randint(1, 8))
    for _ in range(min(rng.randint(0, 25), steps - at)):
      batch = next(iterator)
      for key in KEYS:
        np.testing.assert_array_equal(batch[key], want[at][key])
      np.testing.assert_array_equal(s.batch(at)["tokens"], batch["tokens"])
      at += 1
    iterator.close()
    saved = json.dumps(s.merge_states([s.get_state()]))
    account = s.account()
    s = make(folder, corpus)
  assert saved.count("invalid json") and account[0] == make_account(folder, corpus, steps)


def test_other_numbers_of_hosts_go_on_with_the_same_readers(folder, corpus):
  """The global batches of 1, 2 and 4 hosts are equal, whichever of them went on from whichever."""
  hosts, saved, steps = [1, 2, 4, 1, 4, 2, 1], None, 8
  got, whole = [], make(folder, corpus, readers=4).iterate()
  want = [next(whole)["tokens"].tolist() for _ in range(steps * len(hosts))]
  whole.close()
  for number, count in enumerate(hosts):
    parts, states = [], []
    for host in range(count):
      s = make(folder, corpus, readers=4 * (number % 2 == 0))
      if saved is not None:
        s.set_state(json.loads(saved), host, count)
      iterator = s.iterate(number * steps, host_index=host, host_count=count)
      parts.append([next(iterator)["tokens"].tolist() for _ in range(steps)])
      iterator.close()
      states.append(s.get_state())
      assert s.epochs((number + 1) * steps).keys() == {"stream"}
    got += [[row for rows in step for row in rows] for step in zip(*parts)]
    saved = json.dumps(s.merge_states(states))
  assert got == want
  assert len({json.dumps(rows) for rows in want}) > len(want) / 2


def make_account(folder, corpus, steps):
  s = make(folder, corpus)
  iterator = s.iterate()
  for _ in range(steps):
    next(iterator)
  iterator.close()
  return s.account()[0]


def test_what_is_broken_is_counted_and_left_out(folder, corpus):
  s = make(folder, corpus, window=10_000)
  iterator = s.iterate()
  next(iterator)
  iterator.close()
  assert s.epochs(1) == {"stream": 1.0}
  account = s.account()
  assert account[0] == "data.stream: 125 documents read, 5 left out"
  assert "dropped 2 by rule 'invalid json', such as" in account
  for rule in ("missing field", "empty", "invalid utf-8"):
    assert f"dropped 1 by rule '{rule}', such as" in account
  assert any("raw/a.jsonl:51" in line for line in account)


def test_the_order_is_that_of_the_seed(folder, corpus):
  first = lambda **options: next(make(folder, corpus, **options).iterate())["tokens"].tolist()
  assert first() == first()
  assert first() != first(seed=2)
  in_order = next(make(folder, corpus, shuffle=False, packing="concat").iterate())
  assert spans(in_order)[0][1:4] == tuple(b + 3 for b in b"000")


def test_each_epoch_has_its_order_of_files(folder, corpus, texts):
  """Windows of one row shuffle nothing; the documents come as the files do."""
  want = expected(texts, corpus)
  size = sum((len(span) - 1) * count for span, count in want.items())
  iterator = make(folder, corpus, batch_size=1, window=1).iterate()
  ranks = [{span: i for i, span in enumerate(an_epoch(iterator, size))} for _ in range(2)]
  iterator.close()
  assert max(abs(ranks[0][span] - ranks[1][span]) for span in want) > len(want) // 4


def test_a_file_that_changed_behind_its_size_is_told(corpus, tmp_path):
  line = lambda text: json.dumps({"text": text}) + "\n"
  good = "".join(line(f"{i:02} some words") for i in range(40))
  (tmp_path / "a.jsonl").write_text(good)
  s = make(tmp_path, corpus, batch_size=1)
  iterator = s.iterate()
  for _ in range(15):
    next(iterator)
  iterator.close()
  saved = s.merge_states([s.get_state()])
  for text, words in (
    (good, None),
    (
      "{}\n" + " " * (len(good) - len(line("some words")) - 3) + line("some words"),
      "not what they had been 1 times",
    ),
  ):
    (tmp_path / "a.jsonl").write_text(text)
    s = make(tmp_path, corpus, batch_size=1)
    s.set_state(saved, 0, 1)
    iterator = s.iterate()
    next(iterator)
    iterator.close()
    assert (words or "left out") in s.account()[-1]


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda folder: (folder / "f.txt").write_text("new"), "names or sizes have changed"),
    (lambda folder: (folder / "e.txt").write_text("longer than it was" * 9), "names or sizes"),
    (lambda folder: (folder / "c0.txt").unlink(), "put them back"),
  ],
)
def test_other_files_are_refused(folder, corpus, tmp_path, change, words):
  copy = tmp_path / "raw"
  copy.mkdir()
  for path in folder.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  saved = make(folder, corpus).merge_states([[None]])
  make(copy, corpus).set_state(saved, 0, 1)  # the same files, moved
  change(copy)
  with pytest.raises(UserError, match=words):
    make(copy, corpus).set_state(saved, 0, 1)


def test_hosts_that_can_not_share_the_readers_are_refused(folder, corpus):
  saved = make(folder, corpus).merge_states([list("ab"), list("cd")])
  with pytest.raises(UserError, match="data.stream_readers=4 does not split evenly over 8 hosts"):
    make(folder, corpus).set_state(saved, 0, 8)
  with pytest.raises(UserError, match="stream_readers=2, but .* positions of 4; set it to 4"):
    make(folder, corpus, readers=2).set_state(saved, 0, 2)
  with pytest.raises(UserError, match="23 files for 24 readers"):
    make(folder, corpus, batch_size=24).iterate(host_count=24)
  with pytest.raises(UserError, match="23 files for 24 readers"):
    make(folder, corpus, batch_size=24, readers=24).iterate()
  with pytest.raises(UserError, match="batch_size=4 does not split evenly over 3"):
    make(folder, corpus).iterate(host_count=3)
  with pytest.raises(
    UserError, match="batch_size=4 does not split evenly .* data.stream_readers=3"
  ):
    make(folder, corpus, readers=3).iterate()


def test_files_without_a_text_are_one_message(corpus, tmp_path):
  (tmp_path / "a.txt").write_text(" \n")
  (tmp_path / "b.jsonl").write_text("{}\n")
  iterator = make(tmp_path, corpus).iterate()
  with pytest.raises(UserError, match="no document with text in 2 files"):
    next(iterator)
  with pytest.raises(UserError, match="no such file"):
    make(tmp_path / "nothing", corpus)


def test_a_column_can_be_named(corpus, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"content": "abc"}\n')
  batch = next(make(tmp_path, corpus, field="content").iterate())
  assert spans(batch)[0][1:-1] == tuple(b + 3 for b in b"abc")


def test_it_says_what_it_can_not_promise(folder, corpus):
  s = make(folder, corpus)
  assert "can't be looked up" in "\n".join(s.describe(1))
  assert s.digest == shards.read_manifest(corpus)["digest"]
  with pytest.raises(UserError, match="step 7 .* can't be made again"):
    s.batch(7)
