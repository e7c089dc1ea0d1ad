"""Checkpoints that check themselves: damage of any kind is named, and never restored."""

import errno
import itertools
import os
import pathlib
import shutil
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.run import checkpoint_handlers, digests
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.storage import buckets

STEPS = (1, 2, 3)


def state_of(step):
  rng = np.random.default_rng(step)
  layers = {"q": rng.normal(size=(2, 16, 8)), "scale": rng.normal(size=(2, 8))}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"layers": layers})
  opt = {"mu": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), "count": jnp.int32(step)}
  scalars = {name: jnp.int32(value) for name, value in (("step", step), ("nonfinite_step", -1))}
  return {**scalars, "params": params, "opt": opt}


def abstract():
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
  return jax.tree.map(place, state_of(0))


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run folder with three checkpoints."""
  folder = tmp_path_factory.mktemp("saved") / "run"
  checkpoints = checkpoints_lib.Checkpoints(folder / "checkpoints")
  for step in STEPS:
    checkpoints.save(state_of(step), {"note": step})
  checkpoints.close()
  return folder


@pytest.fixture
def run(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def restore(run, step=None):
  checkpoints = checkpoints_lib.Checkpoints(run / "checkpoints")
  try:
    if step is None:
      return checkpoints.restore_newest(abstract())
    return checkpoints.restore(abstract(), step)
  finally:
    checkpoints.close()


def change_value(run, step, name="params"):
  """Saves a checkpoint of other values that claims the digests of the first ones."""
  other = state_of(step)
  other[name] = jax.tree.map(lambda x: x + 1, other[name])
  moved = run.parent / "other"
  checkpoints = checkpoints_lib.Checkpoints(moved)
  checkpoints.save(other)
  checkpoints.close()
  shutil.rmtree(run / "checkpoints" / str(step) / name)
  shutil.copytree(moved / str(step) / name, run / "checkpoints" / str(step) / name)


def test_a_whole_checkpoint_is_restored(run):
  state, extra, damaged = restore(run)
  same(state, state_of(3))
  assert extra == {"note": 3} and damaged == []


@pytest.mark.parametrize("name", ["params", "opt"])
def test_a_changed_value_is_named_and_the_checkpoint_before_is_restored(run, name):
  change_value(run, 3, name)
  with pytest.raises(UserError, match=f"3 is damaged: {name}/.* differs from what was saved"):
    restore(run, 3)
  state, extra, damaged = restore(run)
  same(state, state_of(2))
  assert extra == {"note": 2}
  assert f"is damaged: {name}/" in damaged[0] and damaged[1:] == ["goes on from step 2"]
  assert (run / "damaged" / "3").is_dir() and not (run / "checkpoints" / "3").exists()
  assert restore(run)[2] == []


@pytest.mark.parametrize("lost", [("params",), ("opt",), ("opt", "meta")])
def test_a_checkpoint_that_lost_an_item_is_damaged(run, lost):
  for name in lost:
    shutil.rmtree(run / "checkpoints" / "3" / name)
  state, _, damaged = restore(run)
  same(state, state_of(2))
  assert f"checkpoints/3 is damaged: {lost[0]} is missing: it is in" in damaged[0]
  assert (run / "damaged" / "3").is_dir()


def test_an_item_that_was_never_saved_is_no_damage(run):
  checkpoints = checkpoints_lib.Checkpoints(run / "checkpoints")
  with pytest.raises(UserError, match=r"checkpoints/3 has no 'ema'; .* settings \(optim.ema\)"):
    checkpoints.restore_newest(abstract() | {"ema": abstract()["params"]})
  checkpoints.close()
  assert not (run / "damaged").exists()


def test_a_deletion_that_was_killed_is_finished_by_the_next_start(run, monkeypatch):
  """Orbax clears folders of its own in the background, so they have another name than ours."""
  first = checkpoints_lib.Checkpoints(run / "checkpoints")
  monkeypatch.setattr(type(first.folder), "rmtree", lambda path: None)
  first.delete_after(2)
  first.close()
  left = run / "checkpoints" / "3.deleted"
  assert left.is_dir() and not (run / "checkpoints" / "3").exists()
  monkeypatch.undo()
  again = checkpoints_lib.Checkpoints(run / "checkpoints")
  assert not left.exists() and again.latest() == 2
  again.save(state_of(3), {})
  again.close()
  assert (run / "checkpoints" / "3").is_dir()


def test_if_all_are_damaged_none_is_moved(run):
  for step in STEPS:
    shutil.rmtree(run / "checkpoints" / str(step) / "params")
    (run / "checkpoints" / str(step) / "params").mkdir()
  with pytest.raises(UserError, match="checkpoints/3 "):
    restore(run)
  assert not (run / "damaged").exists()


def test_a_checkpoint_without_digests_is_restored(run, monkeypatch):
  monkeypatch.setattr(digests, "text", lambda copied, parts: {})
  checkpoints = checkpoints_lib.Checkpoints(run / "checkpoints")
  checkpoints.save(state_of(4))
  checkpoints.close()
  monkeypatch.undo()
  same(restore(run)[0], state_of(4))


def test_a_save_goes_on_in_training_and_counts_once_its_digests_are_written(tmp_path, monkeypatch):
  go, sums = threading.Event(), digests.sums
  monkeypatch.setattr(digests, "sums", lambda copied: go.wait(60) and sums(copied))
  checkpoints = checkpoints_lib.Checkpoints(tmp_path / "checkpoints")
  state = state_of(1)
  checkpoints.save(state, {"note": 1})
  assert checkpoints.finished() is None
  assert checkpoints_lib.complete_steps(tmp_path / "checkpoints") == []
  later = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
  jax.block_until_ready(later)
  go.set()
  assert checkpoints.wait() == 1
  checkpoints.close()
  same(restore(tmp_path)[0], state_of(1))


def test_a_failure_of_the_digests_is_one_of_the_save(tmp_path, monkeypatch):
  def fail(copied):
    raise OSError(errno.EIO, "digests")

  monkeypatch.setattr(digests, "sums", fail)
  checkpoints = checkpoints_lib.Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(state_of(1))
  with pytest.raises(checkpoints_lib.SaveError, match="digests"):
    checkpoints.wait()
  monkeypatch.undo()
  assert checkpoints.forget_failure() == 1
  checkpoints.save(state_of(2))
  checkpoints.close()
  assert checkpoints_lib.complete_steps(tmp_path / "checkpoints") == [2]


def test_arrays_that_are_written_after_others_failed_do_not_fail_the_next_save(
  tmp_path, monkeypatch
):
  real = ocp.StandardCheckpointHandler.async_save
  began, ended = threading.Event(), threading.Event()

  async def fail():
    assert began.wait(60)
    raise OSError(errno.EIO, "of one item")

  async def write(folder):
    end = time.monotonic() + 2.5  # longer than a folder is tried to be deleted
    for i in itertools.count():
      folder.mkdir(parents=True, exist_ok=True)  # as tensorstore does
      (folder / str(i)).write_bytes(b"values")
      began.set()
      if time.monotonic() > end:
        return ended.set()

  # Orbax waits for items in the order of their calls, which differs by process.
  calls = iter((fail(), write(tmp_path / "checkpoints/1.orbax-checkpoint-tmp/opt.tmp/d")))

  async def save(*args, **kwargs):
    started = await real(*args, **kwargs)
    return [ocp.future.CommitFutureAwaitingContractedSignals(next(calls)), *started]

  checkpoints = checkpoints_lib.Checkpoints(tmp_path / "checkpoints")
  with monkeypatch.context() as patch:
    patch.setattr(ocp.StandardCheckpointHandler, "async_save", save)
    checkpoints.save(state_of(1))
    with pytest.raises(checkpoints_lib.SaveError, match="of one item"):
      checkpoints.wait()
  assert checkpoints.forget_failure() == 1 and ended.is_set()
  checkpoints.save(state_of(2))
  checkpoints.close()
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize("item", ["opt", "params", "meta"])
def test_items_are_not_waited_for_if_the_folder_of_one_cannot_be_made(tmp_path, monkeypatch, item):
  """Orbax begins to write when all folders exist."""
  real = os.mkdir

  def mkdir(path, *args, **kwargs):
    if pathlib.Path(path).name.startswith(f"{item}."):
      raise OSError(errno.ENOSPC, "no space")
    real(path, *args, **kwargs)

  checkpoints = checkpoints_lib.Checkpoints(tmp_path / "checkpoints")
  with monkeypatch.context() as patch:
    patch.setattr(os, "mkdir", mkdir)
    checkpoints.save(state_of(1))
    with pytest.raises(checkpoints_lib.SaveError, match="no space"):
      checkpoints.wait()
  waited = []
  monkeypatch.setattr(checkpoint_handlers.ArraysHandler, "wait", lambda *args: waited.append(args))
  assert checkpoints.forget_failure() == 1 and not waited
  checkpoints.save(state_of(2))
  checkpoints.close()
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize("is_remote", [False, True])
def test_unfinished_checkpoints_of_earlier_failures_are_deleted(run, monkeypatch, is_remote):
  folder = run / "checkpoints"
  for name in ("5.orbax-checkpoint-tmp", "7", "8.deleted", "notes"):
    (folder / name / "opt").mkdir(parents=True)
  # In a bucket, a checkpoint is complete when it has a file that says so.
  monkeypatch.setattr(buckets, "is_remote", lambda path: is_remote)
  complete = [types.SimpleNamespace(step=step) for step in STEPS]
  names = types.SimpleNamespace(find_all=lambda folder: iter(complete))
  monkeypatch.setattr(ocp.path.step, "standard_name_format", lambda: names)
  checkpoint_handlers.Handlers().delete_unfinished(epath.Path(folder))
  left = {"1", "2", "3", "8.deleted", "notes"} | (set() if is_remote else {"7"})
  assert {path.name for path in folder.iterdir()} == left


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_of_a_file_is_never_silent(run, seed):
  rng = np.random.default_rng(seed)
  newest = run / "checkpoints" / "3"
  files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
  path = files[rng.integers(len(files))]
  data = bytearray(path.read_bytes())
  kind = ("flip", "cut", "delete", "stale")[seed % 4]
  if kind == "flip":
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
  elif kind == "cut":
    path.write_bytes(data[: rng.integers(len(data))])
  elif kind == "delete":
    path.unlink()
  else:
    older = run / "checkpoints" / "2" / path.relative_to(newest)
    path.write_bytes(older.read_bytes() if older.exists() else bytes(len(data)))
  try:
    state, _, damaged = restore(run)
  except UserError:
    return
  # Some bytes carry no value, such as those of a timestamp.
  same(state, state_of(2 if damaged else 3))
