"""Buckets: text in, prepared data, training, resuming and using a run, as a user types it."""

import http.server
import json
import logging
import os
import pathlib
import signal
import socket
import threading

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from etils.epath import backend

from jaxgpt.commands import main
from jaxgpt.data import source
from jaxgpt.errors import UserError
from jaxgpt.run import best as best_lib
from jaxgpt.run import bucket_checkpoints, run_folder
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.storage import buckets
from jaxgpt.text.prepare import shards

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module", params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def bucket(request, tmp_path_factory):
  """The address of an empty bucket of a server on this machine."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
    server = {"s3": _s3_server, "gs": _gs_server}[request.param](patch)
    _forget_servers()
    yield f"{request.param}://bucket"
    _forget_servers()
    server.stop()


def _s3_server(patch):
  pytest.importorskip("s3fs")
  moto = pytest.importorskip("moto.server")
  boto3 = pytest.importorskip("boto3")
  logging.getLogger("werkzeug").setLevel(logging.WARNING)
  # A free port: another process of the suite may run the same server.
  server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
  server.start()
  for name, value in {
    "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AWS_DEFAULT_REGION": "us-east-1",
  }.items():
    patch.setenv(name, value)
  boto3.client("s3").create_bucket(Bucket="bucket")
  return server


def _gs_server(patch):
  pytest.importorskip("gcsfs")
  emulator = pytest.importorskip("gcp_storage_emulator.server")
  with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
  url = f"http://localhost:{port}"
  for name, value in {
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a",
    "FSSPEC_GS_TOKEN": "anon",
    "FSSPEC_GCS_TOKEN": "anon",
  }.items():
    patch.setenv(name, value)
  from gcp_storage_emulator.handlers import objects

  download = objects.download

  def with_generation(request, response, storage, *args):
    """TensorStore wants a header that the emulator leaves out."""
    download(request, response, storage, *args)
    if response.status in (200, 206):
      found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
      response["x-goog-generation"] = found["generation"]

  patch.setattr(objects, "download", with_generation)
  patch.setattr("http.server.BaseHTTPRequestHandler.log_message", lambda *_: None)
  # One thread would wait for ever for a connection that its client keeps in reserve.
  patch.setattr("http.server.HTTPServer", http.server.ThreadingHTTPServer)
  server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
  server.start()
  return server


def _forget_servers():
  """fsspec and epath keep the connections they once made."""
  for protocol in ("s3", "gcs"):
    fsspec.get_filesystem_class(protocol).clear_instance_cache()
  backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture(scope="module")
def web(tmp_path_factory):
  """The address of a text file on a web server."""
  folder = tmp_path_factory.mktemp("web")
  lines = [
    json.dumps({"text": f"the cat number {i} sat on mat {i * 7 % 60}. " * 4}) for i in range(200)
  ]
  (folder / "cats.jsonl").write_text("\n".join(lines) + "\n")

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=str(folder))

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("localhost", 0), Quiet)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://localhost:{server.server_port}/cats.jsonl"
  server.shutdown()


def run(capsys, *args):
  """(exit code, standard output, standard error) of a command."""
  code = main.main([str(arg) for arg in args])
  out, err = capsys.readouterr()
  return code, out, err


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "c.py"
  path.write_text("""from jaxgpt import config

def get_config():
  c = config.base()
  c.model.update(dict(num_layers=1, width=16, num_heads=2, mlp_width=32))
  c.data.update(dict(seq_len=32, batch_size=8))
  c.train.steps = 6
  c.schedule.warmup_steps = 1
  c.log.every = 1
  c.checkpoint.every = 2
  c.checkpoint.keep = 2
  return c
""")
  return path


@pytest.fixture(scope="module")
def data(bucket, web):
  """Prepared data in the bucket."""
  assert (
    main.main(["data", web, f"--out={bucket}/data", "--tokenizer=bytes", "--shard-tokens=9000"])
    == 0
  )
  return f"{bucket}/data"


def steps_and_losses(folder):
  """(step, kind, loss) of each line of a run's metrics."""
  lines = (epath.Path(folder) / "metrics.jsonl").read_text().splitlines()
  return [(r["step"], r["kind"], r.get("loss", 0)) for r in map(json.loads, lines)]


@pytest.mark.slow
def test_the_whole_way(bucket, data, config, tmp_path, capsys, monkeypatch):
  train = ("train", f"--config={config}", f"--config.data.path={data}")
  assert run(capsys, *train, f"--workdir={tmp_path}/local")[0] == 0

  original, calls = checkpoints_lib.Checkpoints.save, []

  def interrupted(*args):
    calls.append(1)
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints_lib.Checkpoints, "save", interrupted)
    assert run(capsys, *train, f"--workdir={bucket}/run")[0] == 128 + signal.SIGTERM
  assert run(capsys, *train, f"--workdir={bucket}/run")[0] == 0

  assert steps_and_losses(f"{bucket}/run") == steps_and_losses(tmp_path / "local")
  checkpoints = checkpoints_lib.Checkpoints(f"{bucket}/run/checkpoints", read_only=True)
  assert checkpoints.latest() == 6
  assert {
    p.name for p in epath.Path(f"{bucket}/run/checkpoints").iterdir() if p.name.isdecimal()
  } == {"4", "6"}

  _, there, _ = run(capsys, "evaluate", f"--workdir={bucket}/run")
  _, here, _ = run(capsys, "evaluate", f"--workdir={tmp_path}/local")
  assert "bits" in here and there.replace(f"{bucket}", f"{tmp_path}") == here
  said = [
    run(capsys, "generate", f"--workdir={folder}", "--prompt=the cat", "--max-new=8")
    for folder in (f"{bucket}/run", tmp_path / "local")
  ]
  assert said[0][0] == 0 and said[0][1] == said[1][1]


@pytest.mark.slow
def test_a_run_goes_back_from_a_spike(bucket, data, config, tmp_path, capsys):
  # Step 7 destroys the weights, so the loss of step 8 is high. The checkpoint of step 6 is whole.
  (config.parent / "broken.py").write_text("""import jax.numpy as jnp

from jaxgpt.training.schedules import Schedule

Broken = Schedule(lambda c_schedule, steps: lambda step: jnp.where(step == 7, 1e3, 1.0))
""")
  spike = ("factor=50.0", "window=4", "rewinds=1")
  keys = ("schedule.name=broken.py:Broken", "schedule.warmup_steps=0", "train.steps=10")
  flags = [f"--config.{key}" for key in (*keys, *(f"train.spike.{key}" for key in spike))]
  train = ("train", f"--config={config}", f"--config.data.path={data}", *flags)
  for folder in (f"{bucket}/spike", tmp_path / "local"):
    code, out, err = run(capsys, *train, f"--workdir={folder}")
    assert code == 0, err
    assert "leaves out the batches of steps 7 to 8 " in out and "resumes at step 6 of 10" in out
  assert steps_and_losses(f"{bucket}/spike") == steps_and_losses(tmp_path / "local")
  assert all(loss < 6 for _, _, loss in steps_and_losses(f"{bucket}/spike"))
  # The server that stands for gs:// sometimes fails in a save, which the run then repeats.
  assert max(checkpoints_lib.complete_steps(f"{bucket}/spike/checkpoints")) == 10


def test_a_best_checkpoint_of_a_step_to_come_is_replaced(bucket, monkeypatch, tmp_path):
  monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path))
  folder = f"{bucket}/best"
  saved = lambda step: {"step": step, "nonfinite_step": -1, "params": {"a": jnp.full(2, step)}}
  with best_lib.keeper(folder, 0) as kept:
    kept.save(saved(30))
  # Killed, and the run goes on from step 20. A mark alone is what an earlier version left.
  (epath.Path(folder) / best_lib.FOLDER / "40.complete").write_text("a mark")
  with best_lib.keeper(folder, 20) as kept:
    assert kept.latest() is None
    kept.save(saved(25))
  assert checkpoints_lib.complete_steps(f"{folder}/{best_lib.FOLDER}") == [25]
  there = checkpoints_lib.Checkpoints(best_lib.check(folder), read_only=True)
  abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
                          {"params": saved(25)["params"]})  # fmt: skip
  assert there.restore(abstract)[0]["params"]["a"][0] == 25


def test_shards_are_fetched_when_they_are_needed_and_checked(data, tmp_path, monkeypatch):
  monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path))
  split = source.open_split(data, "train")
  names = [shard["name"] for shard in split.manifest["splits"]["train"]["shards"]]
  assert len(names) > 2
  assert not list(tmp_path.rglob("*.arrayrecord"))
  first = split.read(0, 0, 5)
  assert [path.name for path in tmp_path.rglob("*.arrayrecord")] == names[:1]
  assert split.source_name(0).startswith("cats.jsonl")
  [copy] = tmp_path.rglob("*.arrayrecord")
  copy.unlink()
  copy.write_bytes(b"cut short")
  assert (source.open_split(data, "train").read(0, 0, 5) == first).all()
  assert copy.stat().st_size > 100

  entry = split.manifest["splits"]["train"]["shards"][1]
  files = buckets.Files(data, "other")
  with pytest.raises(UserError, match=r"is not what the manifest says: its sha256"):
    files.get({**entry, "sha256": "0" * 64})
  assert not (files.folder / entry["name"]).exists()


def test_a_damaged_folder_is_told(bucket, data):
  folder = epath.Path(data)
  copy = epath.Path(f"{bucket}/damaged")
  for path in folder.iterdir():
    if path.is_file():
      (copy / path.name).write_bytes(path.read_bytes())
  (copy / "train.tokens.npy").write_bytes(b"x")
  with pytest.raises(UserError, match=r"train\.tokens\.npy has 1 bytes instead of"):
    source.open_split(str(copy), "train")
  with pytest.raises(UserError, match=r"nowhere'? is not a prepared data folder"):
    shards.read_manifest(f"{bucket}/nowhere")


def test_what_is_in_the_bucket_is_replaced_only_on_demand(bucket, web, tmp_path, capsys):
  (tmp_path / "a.txt").write_text("some text\n" * 200)
  data = ("data", tmp_path / "a.txt", f"--out={bucket}/again", "--tokenizer=bytes")
  assert run(capsys, *data)[0] == 0
  before = shards.read_manifest(f"{bucket}/again")["digest"]
  code, _, err = run(capsys, *data)
  assert code == 2 and "--overwrite" in err
  (tmp_path / "a.txt").write_text("other text\n" * 200)
  assert run(capsys, *data, "--overwrite")[0] == 0
  assert shards.read_manifest(f"{bucket}/again")["digest"] != before
  (epath.Path(bucket) / "mine" / "x.txt").write_text("precious")
  code, _, err = run(capsys, *data[:2], f"--out={bucket}/mine", "--overwrite")
  assert code == 2 and "not a prepared data folder" in err
  assert (epath.Path(bucket) / "mine" / "x.txt").read_text() == "precious"


def test_copying_goes_on_where_it_was_killed(bucket, tmp_path, capsys, monkeypatch):
  (tmp_path / "a.txt").write_text("some text\n" * 200)
  data = ("data", tmp_path / "a.txt", f"--out={bucket}/killed", "--tokenizer=bytes")
  real = buckets.upload

  def killed(folder, address, last):
    real(folder, address, "no such file")
    epath.Path(f"{address}/{buckets.UNFINISHED}").write_text("")
    epath.Path(f"{address}/{shards.MANIFEST}").unlink()
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(buckets, "upload", killed)
    assert run(capsys, *data)[0] == 130
  with pytest.raises(UserError, match="not a prepared data folder"):
    shards.read_manifest(f"{bucket}/killed")
  code, out, _ = run(capsys, *data)
  assert code == 0 and "tokenize" not in out
  assert shards.read_manifest(f"{bucket}/killed")
  assert not list((buckets.cache_folder() / "out").rglob("*.arrayrecord"))


def test_a_bucket_that_cannot_be_reached_is_named(bucket):
  address = bucket.replace("bucket", "no-such-bucket")
  for call in (
    lambda: run_folder.read_config(f"{address}/run"),
    lambda: shards.read_manifest(f"{address}/data"),
    lambda: checkpoints_lib.Checkpoints(f"{address}/run/checkpoints", read_only=True),
  ):
    with pytest.raises(UserError, match="no-such-bucket"):
      call()


@pytest.mark.parametrize(
  "keep, keep_every, old", [(None, 0, []), (2, 0, [2, 4]), (1, 4, [2, 6]), (9, 0, [])]
)
def test_checkpoints_that_are_deleted(keep, keep_every, old):
  assert bucket_checkpoints.old_steps([2, 4, 6, 8], keep, keep_every) == old


def test_local_paths_are_no_addresses():
  for path in ("a/b", "/a", pathlib.Path("a"), "C:/x", "data,s"):
    assert not buckets.is_remote(path)
  assert buckets.is_remote("s3://bucket/x") and buckets.is_remote(epath.Path("gs://bucket/x"))
