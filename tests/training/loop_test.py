"""A run from its first step to its last, interrupted, resumed, moved to other devices, broken."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec as P

from jaxgpt import config
from jaxgpt.commands.actions import import_export, inspect_data
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.sampler import Sampler
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import metric_writers, run_folder, run_lock, throughput
from jaxgpt.run.process import memory, stop_signal
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import evaluation, loop, train_step
from tests import quick

MEASURED = (*throughput.METRICS, *memory.METRICS)


def lines(folder):
  """What the run reported, without what a clock said."""
  out = []
  for line in (epath.Path(folder) / metric_writers.JSONL).read_text().splitlines():
    out.append({k: v for k, v in json.loads(line).items() if k not in MEASURED})
  return out


def train(c, folder):
  return loop.train(c, folder, config.flatten(c))


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
  """(config, folder) of a run of 8 steps on 8 devices."""
  c, folder = (
    tiny(eval__every=4, checkpoint__every=4, checkpoint__keep=1, log__every=2, model__dropout=0.1),
    tmp_path_factory.mktemp("finished") / "run",
  )
  train(c, folder)
  return c, folder


def test_a_run_reports_what_it_did(finished):
  c, folder = finished
  record = lines(folder)
  assert [(r["step"], r["kind"]) for r in record] == [
    (2, "train"),
    (4, "train"),
    (4, "validation"),
    (6, "train"),
    (8, "train"),
    (8, "validation"),
  ]
  assert {"loss", "grad_norm", "param_norm", "lr", "tokens"} <= record[0].keys()
  assert {"bits_per_byte", "perplexity"} <= record[-1].keys()
  assert record[-1]["bits_per_byte"] < record[2]["bits_per_byte"] < 9
  raw = json.loads((folder / metric_writers.JSONL).read_text().splitlines()[0])
  assert all(raw[name] >= 0 for name in ("tokens_per_second", "step_time", "input_wait"))
  assert raw["host_memory"] > 10e6
  saved = run_folder.read_config(folder)
  assert saved.optim.lr == c.optim.lr and saved.model.vocab_size == 264
  (start,) = run_folder.read_starts(folder)
  assert start["packages"]["jax"] == jax.__version__
  assert (start["step"], start["saved"]) == (0, 8)
  seconds = start["account"]["seconds"]
  assert min(seconds[name] for name in ("steps", "compile", "evaluation", "saving")) > 0
  assert start["mesh"]["data"] == 8 and start["data_digest"] and start["command"]
  assert json.loads((folder / "config.json").read_text())["origin"].keys() == (
    config.flatten(c).keys()
  )


def test_running_a_finished_run_again_trains_no_step(finished):
  c, folder = finished
  before = lines(folder)
  steps, result, stopped, *_ = train(c, folder)
  assert (steps, stopped) == (8, None) and result["loss"] == before[-1]["loss"]
  assert lines(folder) == before


def test_an_evaluation_of_some_batches_is_not_the_result_of_the_whole_split(tiny, tmp_path):
  """train.steps is lowered to a step that the run has reached, and evaluated in part."""
  keys = dict(eval__every=2, eval__batches=1)
  loop.train(tiny(**keys), tmp_path, config.flatten(tiny(**keys)), until=2)
  c = tiny(train__steps=2, **keys)
  whole = [loop.train(c, tmp_path, config.flatten(c), accept_changes=True).result for _ in range(2)]
  found = [r for r in lines(tmp_path) if r["kind"] == "validation"]
  assert [r.get("batches") for r in found] == [1, None], "and not a third time"
  assert whole[0]["tokens"] == whole[1]["tokens"] > found[0]["tokens"]


@pytest.mark.parametrize("stop_after", quick.first([3, 1, 4, 5]))
def test_a_signal_at_any_step_changes_no_later_number(finished, tmp_path, monkeypatch, stop_after):
  """Stops inside a log window, at its end, and at an evaluation; then the same call goes on."""
  c, folder = finished
  count = 0
  original = batches_lib.to_devices

  def counting(batch, mesh):
    nonlocal count
    count += 1
    if count == stop_after:
      os.kill(os.getpid(), signal.SIGTERM if stop_after % 2 else signal.SIGINT)
    return original(batch, mesh)

  monkeypatch.setattr(batches_lib, "to_devices", counting)
  c = config.from_dict(c.to_dict())
  c.eval.every = 0  # so that only training batches are counted
  steps, _, stopped, *_ = train(c, tmp_path / "run")
  assert stopped in (signal.SIGTERM, signal.SIGINT) and steps == stop_after
  monkeypatch.setattr(batches_lib, "to_devices", original)
  steps, _, stopped, *_ = train(c, tmp_path / "run")
  assert (steps, stopped) == (8, None)
  want = [r for r in lines(folder) if r["kind"] == "train"]
  assert [r for r in lines(tmp_path / "run") if r["kind"] == "train"] == want
  assert len(run_folder.read_starts(tmp_path / "run")) == 2


STAGES = {  # where a signal arrives: (object, attribute, which call)
  "compile": (train_step, "compile", 1),
  "save": (checkpoints_lib.Checkpoints, "save", 1),
  "data": (batches_lib.pipeline, "make", 1),
  "run folder": (run_folder, "enter", 1),
  "initial state": (train_step, "first_state", 1),
  "evaluation": (evaluation, "evaluate", 1),
  "last evaluation": (evaluation, "evaluate", 2),
}


@pytest.mark.parametrize("stage", quick.first(STAGES))
def test_a_signal_at_any_stage_changes_no_number(finished, tmp_path, stage):
  """The run is stopped in one stage; the same call goes on and reports what it would have."""
  c, folder = finished
  where, name, call = STAGES[stage]
  original, calls = getattr(where, name), []

  def interrupted(*args, **kwargs):
    calls.append(1)
    if len(calls) == call:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(where, name, interrupted)
    steps, result, stopped, *_ = train(c, tmp_path / "run")
  assert stopped == signal.SIGTERM and result is None
  assert steps < 8 or stage == "last evaluation"
  steps, result, stopped, *_ = train(c, tmp_path / "run")
  assert (steps, stopped) == (8, None) and result
  assert lines(tmp_path / "run") == lines(folder)


def test_a_second_signal_is_not_held_back():
  old = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
  with stop_signal.StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    signal.sigtimedwait([], 1)  # another thread may have caught it, and this one hears of it soon
    assert stop.received == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      signal.sigtimedwait([], 5)
  signal.signal(signal.SIGINT, old)


def test_a_start_that_was_killed_before_its_config_was_written_is_made_good(finished, tmp_path):
  c, folder = finished
  (tmp_path / "run" / "tokenizer").mkdir(parents=True)
  (tmp_path / "run" / "config.json.part").write_text("{")
  train(c, tmp_path / "run")
  assert lines(tmp_path / "run") == lines(folder)


@pytest.mark.slow  # `tests/parallel/distributed_test.py` moves a run too
def test_a_run_goes_on_with_fewer_devices(tiny, tmp_path):
  """Restored from fsdp=4 x stage=2 onto 2 devices, losses differ only by the order of sums."""
  c = tiny(mesh__data=1, mesh__fsdp=4, mesh__stage=2)
  _, result, *_ = train(c, tmp_path / "whole")
  half = config.from_dict(c.to_dict())
  cut(half, tmp_path / "moved", at=4)
  devices = jax.devices()[:2]
  half.mesh.update(dict(data=2, fsdp=1, stage=1))
  make = mesh_lib.make
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, "make", lambda c_mesh: make(c_mesh, devices))
    train(half, tmp_path / "moved")
  want, got = (
    [r["loss"] for r in lines(tmp_path / name) if r["kind"] == "train"]
    for name in ("whole", "moved")
  )
  np.testing.assert_allclose(got, want, rtol=1e-4)
  run = load.load(tmp_path / "whole")  # put to use, it has no stages
  assert run.mesh.shape["stage"] == 1
  assert load.evaluate_run(run)["loss"] == pytest.approx(result["loss"], rel=1e-5)
  assert len(Sampler(run)("the cat", max_new=4, seed=1)) == 1
  exported = import_export.export_run(tmp_path / "whole", tmp_path / "out", certify=False)
  assert exported.family == "llama"


@pytest.mark.slow
def test_a_run_goes_on_and_is_used_under_other_rules(tiny, tmp_path):
  c = tiny(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  train(c, tmp_path / "whole")
  other = config.from_dict(c.to_dict())
  other.mesh.rules.update(
    dict(
      embed="none",
      mlp="tensor,fsdp",
      vocab="fsdp",
      head_dim="tensor",
      heads="none",
      kv_heads="none",
      act_heads="none",
    )
  )
  cut(other, tmp_path / "moved", at=4)
  train(c, tmp_path / "moved")  # put to use, it has the rules that it began with
  want, got = (
    [r["loss"] for r in lines(tmp_path / name) if r["kind"] == "train"]
    for name in ("whole", "moved")
  )
  np.testing.assert_allclose(got, want, rtol=1e-4)
  used = [load.load(tmp_path / name) for name in ("whole", "moved")]
  specs = [run.params["layers"]["mlp"]["up"].sharding.spec for run in used]
  assert specs == [P("stage", "fsdp", "tensor"), P("stage", None, ("tensor", "fsdp"))]
  losses = [load.evaluate_run(run)["loss"] for run in used]
  assert losses[0] == pytest.approx(losses[1], rel=1e-4)
  texts = [Sampler(run)("the cat", max_new=4, seed=1) for run in used]
  assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_run_on_a_stream_goes_on_exactly_where_it_stopped(tiny, tmp_path, capsys):
  """Stopped inside an epoch's window; then losses are those of a run that was never stopped."""
  raw = tmp_path / "raw"
  raw.mkdir()
  for name in "abcd":
    lines_ = [json.dumps({"text": f"{name}{i} " * (i * i % 37)}) for i in range(30)]
    (raw / f"{name}.jsonl").write_text("\n".join([*lines_, "{broken"]))
  c = tiny(data__stream=str(raw), data__stream_window=24, train__steps=14, checkpoint__every=5)
  train(c, tmp_path / "whole")
  cut(c, tmp_path / "cut", at=7)
  out = capsys.readouterr().out
  assert "it has no random access" in out and "'invalid json'" in out
  c.data.prefetch = 1
  steps, result, *_ = train(c, tmp_path / "cut")
  assert steps == 14 and "bits_per_byte" in result
  assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
  with pytest.raises(UserError, match="no random access.*jaxgpt data"):
    inspect_data.inspect(tmp_path / "cut", 3)
  (raw / "a.jsonl").write_text("{}")
  with pytest.raises(UserError, match="their names or sizes have changed"):
    train(c, tmp_path / "cut")


def cut(c, folder, at):
  """Trains a run until step `at` and stops it there as SIGTERM would."""
  original, seen = batches_lib.to_devices, []

  def counting(batch, mesh):
    seen.append(1)
    if len(seen) == at:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(batch, mesh)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batches_lib, "to_devices", counting)
    steps, *_ = train(c, folder)
  assert steps == at


def test_the_loop_makes_no_hidden_transfer_and_never_waits_for_the_step_it_dispatched(
  tiny, tmp_path, monkeypatch
):
  """Step n is dispatched before step n-1 is read; under the guard, only explicit reads happen."""
  events = []
  get, compile_step = jax.device_get, train_step.compile

  def compiled(*args):
    step = compile_step(*args)

    def traced(state, batch):
      assert jax.config.jax_transfer_guard == "disallow"
      events.append("dispatch")
      return step(state, batch)

    return traced

  def reading(x):
    if isinstance(x, dict) and "grad_norm" in x:
      events.append("read")
    return get(x)

  monkeypatch.setattr(train_step, "compile", compiled)
  monkeypatch.setattr(jax, "device_get", reading)
  train(tiny(train__steps=4), tmp_path / "run")
  assert events == ["dispatch", "dispatch", "read", "dispatch", "read", "dispatch", "read", "read"]


def test_the_guard_would_catch_a_hidden_transfer(tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(batches_lib, "to_devices", lambda batch, mesh: batch)
  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    train(tiny(), tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_evidence(tiny, tmp_path):
  c = tiny(optim__lr=1e16, optim__clip_norm=0.0, schedule__warmup_steps=0, log__every=1)
  with pytest.raises(UserError, match=r"step \d+ is not finite: loss .* the state before it"):
    train(c, tmp_path / "run")
  (where,) = (tmp_path / "run").glob("nonfinite_*")
  step = int(where.name.split("_")[1])
  batch = np.load(where / "batch.npz")
  _, resolved = batches_lib.load_tokenizer_and_config(c)
  np.testing.assert_array_equal(
    batch["tokens"], batches_lib.split_batches(resolved, "train").batch(step)["tokens"]
  )
  metrics = json.loads((where / "metrics.json").read_text())
  assert None in [metrics[k] for k in ("loss", "grad_norm", "param_norm")], "JSON has no NaN"
  mesh = mesh_lib.make(resolved.mesh)
  state, _ = checkpoints_lib.Checkpoints(where / "state").restore(
    build_lib.build(resolved, mesh).state
  )
  assert int(state["step"]) == step
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state["params"]))


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny, tmp_path, monkeypatch, capsys):
  """Batch 3 is bad. The run is stopped after it, inside a log window, and goes on."""
  make = batches_lib.to_devices

  def to_devices(batch, mesh):
    taken.append(1)
    if len(taken) == 4:
      batch = batch | {"loss_weights": np.full_like(batch["loss_weights"], np.nan)}
    return make(batch, mesh)

  taken = []
  monkeypatch.setattr(batches_lib, "to_devices", to_devices)
  c = tiny(optim__skip_nonfinite=1, log__every=3)
  loop.train(c, tmp_path / "run", config.flatten(c), until=4)
  train(c, tmp_path / "run")
  out = capsys.readouterr().out
  assert "step 3 is not finite: loss nan" in out and "skipped, 1 of at most 1" in out
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  found = {x["step"]: x.get("skipped_steps") for x in lines if x["kind"] == "train"}
  assert found == {3: None, 6: 1.0, 8: None}
  assert all(np.isfinite(x["loss"]) for x in lines)


def test_of_an_update_that_overflows_the_state_after_it_is_kept(tiny, tmp_path):
  c = tiny(optim__lr=1e38, optim__weight_decay=1e6, schedule__warmup_steps=0)
  with pytest.raises(UserError, match=r"step 0 is not finite: .* the state after it"):
    train(c, tmp_path / "run")


def test_checkpoints_are_kept_by_number_and_by_period(tiny, tmp_path):
  train(tiny(checkpoint__every=1, checkpoint__keep=2, checkpoint__keep_every=3), tmp_path / "run")
  kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
  assert kept == [3, 6, 7, 8]


@pytest.mark.slow
def test_a_saved_state_is_not_touched_by_the_steps_that_go_on_meanwhile(tiny, tmp_path):
  """The save is asynchronous and the state is donated: on disk is still what was saved."""
  _, c = batches_lib.load_tokenizer_and_config(tiny(model__width=256, model__mlp_width=2048))
  mesh = mesh_lib.make(c.mesh)
  parts = build_lib.build(c, mesh)
  with jax.set_mesh(mesh):
    state = train_step.first_state(parts.model, parts.tx, 0, parts.state)
  # As the train step, it donates the state and writes the new one in its place.
  step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  want = jax.tree.map(lambda x: np.array(x, copy=True), state)
  checkpoints = checkpoints_lib.Checkpoints(tmp_path)
  checkpoints.save(state)
  for _ in range(5):
    state = step(state)
  checkpoints.wait()
  got, _ = checkpoints.restore(parts.state)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_weights_are_averaged_where_the_run_keeps_an_average(tiny, tmp_path):
  train(tiny(optim__ema=0.9), tmp_path / "run")
  run = load.load(tmp_path / "run")
  params = checkpoints_lib.Checkpoints(tmp_path / "run" / "checkpoints").restore(
    {"params": run.parts.state["params"], "ema": run.parts.state["ema"]}
  )[0]
  jax.tree.map(np.testing.assert_array_equal, run.params, params["ema"])
  assert not np.array_equal(params["ema"]["embed"], params["params"]["embed"])


@pytest.mark.parametrize(
  "change, words",
  [
    ({"optim.lr": 0.5}, "optim.lr was 0.01, is 0.5"),
    ({"model.width": 64}, "model.width was 32, is 64"),
  ],
)
def test_a_folder_with_a_run_of_another_config_is_refused(finished, change, words):
  c, folder = finished
  c = config.from_dict(c.to_dict())
  c.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=words):
    train(c, folder)


def test_a_run_whose_checkpoints_are_gone_keeps_its_metrics(finished, tmp_path, capsys):
  c, folder = finished
  shutil.copytree(folder, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  before = lines(folder)
  with pytest.raises(UserError, match="a run of 8 steps whose checkpoints are gone"):
    train(c, tmp_path / "run")
  assert lines(tmp_path / "run") == before
  assert len(run_folder.read_starts(tmp_path / "run")) == len(run_folder.read_starts(folder))


def test_a_folder_that_is_being_trained_is_refused_before_anything_is_written(tiny, tmp_path):
  with run_lock.RunLock(tmp_path / "run") as lock:
    lock.take()
    with pytest.raises(UserError, match=rf"process {os.getpid()} on host .* is training in"):
      train(tiny(), tmp_path / "run")
  assert [path.name for path in (tmp_path / "run").iterdir()] == [run_lock.NAME]


def test_a_folder_that_holds_something_else_is_refused(tiny, tmp_path):
  (tmp_path / "photo.jpg").write_text("")
  with pytest.raises(UserError, match="not empty and holds no run"):
    train(tiny(), tmp_path)


def test_a_batch_that_the_mesh_does_not_divide_is_refused(tiny, tmp_path):
  with pytest.raises(UserError, match="data.batch_size=12 is not a multiple of .*mesh.data=8"):
    train(tiny(data__batch_size=12), tmp_path / "run")


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(
  tiny, tmp_path, capsys
):
  c = tiny(checkpoint__every=4)
  train(c, tmp_path / "run")
  want = lines(tmp_path / "run")
  newest = tmp_path / "run" / "checkpoints" / "8"
  for path in newest.rglob("*"):
    if path.is_file() and path.stat().st_size > 1000:
      path.write_bytes(path.read_bytes()[:100])
  capsys.readouterr()
  train(c, tmp_path / "run")
  out = capsys.readouterr().out
  assert "checkpoints/8 can't be read" in out and "it is in " in out
  assert "goes on from step 4" in out and run_folder.read_starts(tmp_path / "run")[-1]["step"] == 4
  assert lines(tmp_path / "run") == want


def test_other_data_under_the_same_name_is_refused(finished, monkeypatch):
  c, folder = finished
  monkeypatch.setattr(run_folder, "read_starts", lambda _: [{"data_digest": "0" * 64}])
  with pytest.raises(UserError, match="other data"):
    train(c, folder)
