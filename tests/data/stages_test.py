"""Stages: the batch at step N is a function of N, and no row is lost or read twice on the way."""

import pytest

from jaxgpt import config
from jaxgpt.data import stages
from jaxgpt.errors import UserError
from jaxgpt.training import batches as batches_lib

STAGES = ((2, 4, 8), (3, 2, 16), (2, 8, 8))  # then 4 rows of 16


@pytest.fixture(scope="module")
def made(tiny):
  """(resolved config, batches) of four stages with two lengths of rows."""
  c = tiny(data__stages=STAGES, data__batch_size=4, data__seq_len=16, train__steps=12)
  _, c = batches_lib.load_tokenizer_and_config(c)
  return c, batches_lib.training_data(c)


def rows(batches, steps):
  """[(source, epoch, row)] of all rows of some steps."""
  at = lambda n: batches.at(n) if isinstance(batches, stages.StagedBatches) else batches
  return [(r.source, r.epoch, r.row) for n in steps for r in at(n).rows(n)]


def test_shapes_change_at_the_stages(made):
  _, b = made
  found = [b.batch(n)["tokens"].shape for n in range(9)]
  assert found == [(4, 8)] * 2 + [(2, 16)] * 3 + [(8, 8)] * 2 + [(4, 16)] * 2
  assert (b.batch_size, b.seq_len) == (4, 16)


def test_rows_of_a_length_go_on_in_its_next_stage(made, tiny):
  """The rows of each length are those of a run with that length alone, without a gap."""
  c, b = made
  for seq_len, steps in ((8, (0, 1, 5, 6)), (16, (2, 3, 4, 7, 8, 9))):
    got = rows(b, steps)
    own = c.copy_and_resolve_references()
    own.data.update(dict(stages=(), seq_len=seq_len, batch_size=1))
    alone = batches_lib.split_batches(own, "train")
    assert got == rows(alone, range(len(got)))


def test_iterating_from_any_step_and_host_gives_the_batches_of_the_steps(made):
  _, b = made
  for start in (0, 1, 4, 6):
    for host in range(2):
      iterator = b.iterate(start, host_index=host, host_count=2)
      for step in range(start, 8):
        got, want = next(iterator), b.batch(step)
        half = len(want["tokens"]) // 2
        assert (got["tokens"] == want["tokens"][host * half : (host + 1) * half]).all()
      iterator.close()
  with pytest.raises(UserError, match="batch_size=4 does not split evenly over 3 hosts"):
    b.iterate(host_count=3)


def test_epochs_add_up_over_the_lengths(made):
  _, b = made
  of = {n: batches.len_rows for n, batches in b._by_length.items()}
  for step, (short, long) in {0: (0, 0), 2: (8, 0), 4: (8, 4), 7: (24, 6), 9: (24, 14)}.items():
    [found] = b.epochs(step).values()
    assert found == pytest.approx(short / of[8] + long / of[16])


def test_weights_change_at_their_step_whatever_the_batches(tiny, corpus):
  """With a mixture, a change of weights takes effect at its step in rows of both lengths."""
  path = f"{corpus},{corpus}"
  c = tiny(
    data__path=path,
    data__stages=STAGES,
    data__batch_size=4,
    data__seq_len=16,
    data__weights=(1.0, 0.0),
    data__weight_changes=((3, (0.0, 1.0)),),
    train__steps=12,
  )
  _, c = batches_lib.load_tokenizer_and_config(c)
  b = batches_lib.training_data(c)
  assert {n: {s for s, _, _ in rows(b, [n])} for n in range(9)} == {
    n: {int(n >= 3)} for n in range(9)
  }


@pytest.mark.parametrize(
  "keys, message",
  [
    (dict(data__stages=((1, 2),)), r"\(1, 2\) must be \(steps, batch_size, seq_len\)"),
    (dict(data__stages=((8, 4, 8),)), "has 8 steps, which leaves none of train.steps=8"),
    (dict(data__stages=((1, 4, 64),)), "longer rows than the model's context, model.max_len=32"),
    (dict(data__stages=((1, 3, 8),), optim__accumulate=2), "accumulate=2 does not divide"),
    (dict(data__stages=((1, 4, 8),), data__stream="x"), "but data.stream='x'; leave one out"),
  ],
)
def test_stages_that_cannot_be_are_refused(tiny, keys, message):
  with pytest.raises(UserError, match=message):
    config.resolve(tiny(**keys), vocab_size=300)


def test_stages_of_a_config():
  c = config.base()
  c.data.stages = STAGES
  found = [(s.start, s.end) for s in stages.of(c.data)]
  assert found[:3] == [(0, 2), (2, 5), (5, 7)] and found[3][0] == 7
  assert stages.rows_before(stages.of(c.data), 8, 100) == 24
