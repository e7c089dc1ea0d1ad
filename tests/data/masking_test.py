"""Masked rows: what is chosen, what replaces it, and that nothing but seed and position decides."""

import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.data import masking, pipeline
from jaxgpt.data.batch_source import Batching
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import prepare
from jaxgpt.text.tokenizers import tokenizer

T = tokenizer.ByteTokenizer()
WORDS = "the cat, sat_on 12 mats "


def make(seed=0, tokenizer=T, **over):
  c = config.base().objective
  c.update(over)
  return masking.make(c, tokenizer, seed)


def row(text, length=0):
  ids = np.array([T.bos_id, *T.encode(text), T.eos_id], np.int32)
  pad = max(length - len(ids), 0)
  return np.pad(ids, (0, pad)), np.pad(np.ones(len(ids), np.int32), (0, pad))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("masking")
  (path / "a.txt").write_text(WORDS * 400)
  prepare.prepare(path / "a.txt", path / "data", tokenizer="bytes", cut_chars=60)
  return path / "data"


def test_shares_are_as_asked_for():
  tokens, segments = row(WORDS * 4000)
  masked, chosen = make(mask_rate=0.2, mask_replace=0.7, mask_random=0.2)(tokens, segments, 0)
  assert chosen.mean() == pytest.approx(0.2, abs=0.01)
  assert (masked == tokens)[~chosen].all()
  was_masked = (masked == T.mask_id)[chosen].mean()
  assert was_masked == pytest.approx(0.7, abs=0.02)
  changed = (masked != tokens)[chosen].mean() - was_masked
  assert changed == pytest.approx(0.2, abs=0.02)
  other = masked[chosen & (masked != T.mask_id) & (masked != tokens)]
  assert len(np.unique(other)) > 250, "random tokens are any of the 256"


def test_specials_and_padding_are_left_alone():
  tokens, segments = row("ab" + "<mask>", 40)
  masked, chosen = make(mask_rate=1.0, mask_replace=0.0, mask_random=1.0)(tokens, segments, 5)
  assert chosen.sum() == len("ab<mask>"), "that is text, and all of it was chosen"
  assert masked[0] == T.bos_id and masked[len("ab<mask>") + 1] == T.eos_id
  for position in range(50):
    masked, _ = make(mask_rate=1.0, mask_replace=0.0, mask_random=1.0)(tokens, segments, position)
    assert not np.isin(masked[chosen], list(T.special_ids.values())).any()


def test_seed_and_position_decide_and_nothing_else():
  tokens, segments = row(WORDS * 10)
  first = make()(tokens, segments, 7)
  for a, b in zip(first, make()(tokens, segments, 7), strict=True):
    np.testing.assert_array_equal(a, b)
  for seed, position in ((0, 8), (1, 7), (7, 0)):
    assert (first[1] != make(seed)(tokens, segments, position)[1]).any()


def test_the_draws_are_those_of_every_version_of_numpy():
  """May only change with a change of what the draws are, which changes all runs."""
  tokens, segments = row("the cat sat on the mat")
  masked, chosen = make()(tokens, segments, 3)
  assert np.nonzero(chosen)[0].tolist() == GOLDEN[0]
  assert masked[chosen].tolist() == GOLDEN[1]


GOLDEN = [4, 6, 8, 18], [227, 259, 259, 259]


def test_whole_words_are_chosen_together():
  tokens, segments = row(WORDS * 50)
  mask = make(mask_whole_words=True, mask_rate=0.3)
  text = "<" + WORDS * 50 + ">"
  words = np.cumsum(
    [
      not (text[i].isalnum() or text[i] == "_") or not (text[i - 1].isalnum() or text[i - 1] == "_")
      for i in range(len(text))
    ]
  )
  seen = []
  for position in range(30):
    _, chosen = mask(tokens, segments, position)
    for word in np.unique(words):
      assert len(set(chosen[words == word].tolist())) == 1
    seen.append(chosen[1:-1].mean())
  assert np.mean(seen) == pytest.approx(0.3, abs=0.02)


def test_a_word_does_not_go_on_into_another_document():
  ids = np.array(T.encode("abcd"), np.int32)
  mask = make(mask_whole_words=True, mask_rate=0.5)
  pairs = {tuple(mask(ids, np.array([1, 1, 2, 2]), p)[1].tolist()) for p in range(40)}
  assert pairs == {(a, a, b, b) for a in (False, True) for b in (False, True)}


def test_a_tokenizer_without_a_mask():
  without = tokenizer.ByteTokenizer()
  without.mask_id = None
  with pytest.raises(UserError, match=r"masked_lm.*\(bytes\) lacks"):
    make(tokenizer=without)


def batches(folder, split="train", seed=0, batch_size=4):
  return pipeline.make(
    folder,
    split,
    Batching(seq_len=64, batch_size=batch_size, seed=seed),
    layout="masked_lm",
    masking=make(seed),
  )


def test_a_batch_has_all_stored_tokens_and_hides_some(folder):
  b = batches(folder, batch_size=1)
  assert not b.predicts_all
  seen, num_chosen = np.zeros(b.sources[0].split.num_documents, int), 0
  for step in range(b.len_rows):
    batch = b.batch(step)
    chosen = batch["loss_weights"] > 0
    hidden = batch["tokens"] != batch["targets"]
    assert not (hidden & ~chosen).any()
    num_chosen += chosen.sum()
    for i, r in enumerate(b.rows(step)):
      at = 0
      _, split, pack, _ = b.sources[r.source]
      for doc, start, n in zip(*pack.spans(r.row), strict=True):
        np.testing.assert_array_equal(batch["targets"][i, at : at + n], split.read(doc, start, n))
        np.testing.assert_array_equal(batch["positions"][i, at : at + n], np.arange(n))
        seen[doc] += n
        at += n
      assert not batch["segment_ids"][i, at:].any() and not batch["targets"][i, at:].any()
  np.testing.assert_array_equal(seen, b.sources[0].split.lengths + 1)
  assert num_chosen == pytest.approx(0.15 * seen.sum(), rel=0.1)


def test_each_epoch_hides_other_tokens_but_evaluation_always_the_same(folder):
  b = batches(folder)
  tokens = {}
  for position in range(3 * b.len_rows):
    r = b.rows(position // 4)[position % 4]
    tokens.setdefault(r.row, set()).add(b.batch(position // 4)["tokens"][position % 4].tobytes())
  assert all(len(variants) == 3 for variants in tokens.values())
  for split in ("train", "validation"):
    first, second = (
      [x["tokens"] for x in batches(folder, split).epoch_batches()] for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
