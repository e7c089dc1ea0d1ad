"""Servers on this machine that stand for the web, S3 and Google Cloud Storage."""

import functools
import http.server
import os
import threading

import pytest


class _Web(http.server.SimpleHTTPRequestHandler):
  """Files of a folder, /WAY/NAME; the way is one or several words with '-' between them.

  'ranges': one may ask for parts of a file; 'cut': each connection breaks halfway; 'flaky': each
  other one; 'status': the answer to /status/N is N.
  """

  answers = 0

  def do_GET(self):
    parts = self.path.partition("?")[0].strip("/").split("/")
    way = parts[0].split("-")
    if "status" in way:
      self.send_error(int(parts[1]))
      return
    with open(os.path.join(self.directory, parts[-1]), "rb") as f:
      data = f.read()
    whole = len(data)
    asked = self.headers.get("Range", "") if "ranges" in way else ""
    if asked:
      start, end = asked.removeprefix("bytes=").split("-")
      start, end = int(start), min(int(end or whole - 1), whole - 1)
      data = data[start : end + 1]
      self.send_response(206)
      self.send_header("Content-Range", f"bytes {start}-{end}/{whole}")
    else:
      self.send_response(200)
    if "ranges" in way:
      self.send_header("Accept-Ranges", "bytes")
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    if self.command == "GET":
      _Web.answers += 1
      breaks = "cut" in way or ("flaky" in way and _Web.answers % 2)
      self.wfile.write(data[: len(data) // 2] if breaks else data)

  do_HEAD = do_GET

  def log_message(self, *args):
    pass


@pytest.fixture
def web(tmp_path):
  """(the address of a web server, the folder whose files it serves)."""
  pytest.importorskip("aiohttp")
  folder = tmp_path / "web"
  folder.mkdir()
  server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(_Web, directory=os.fspath(folder))
  )
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}", folder
  server.shutdown()
  server.server_close()


@pytest.fixture(scope="session")
def _s3_server():
  pytest.importorskip("s3fs")
  moto = pytest.importorskip("moto.server")
  server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
  server.start()
  host, port = server.get_host_and_port()
  yield f"http://{host}:{port}"
  server.stop()


@pytest.fixture
def s3(_s3_server, monkeypatch):
  """An empty bucket, found through the variables that a user sets: (its file system, address)."""
  import s3fs

  for key, value in (
    ("AWS_ACCESS_KEY_ID", "key"),
    ("AWS_SECRET_ACCESS_KEY", "secret"),
    ("AWS_DEFAULT_REGION", "us-east-1"),
    ("AWS_ENDPOINT_URL", _s3_server),
  ):
    monkeypatch.setenv(key, value)
  s3fs.S3FileSystem.clear_instance_cache()
  filesystem = s3fs.S3FileSystem()
  if filesystem.exists("bucket"):
    filesystem.rm("bucket", recursive=True)
  filesystem.mkdir("bucket")
  yield filesystem, "s3://bucket"
  s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def gcs(monkeypatch):
  """As `s3`, for Google Cloud Storage."""
  emulator = pytest.importorskip("gcp_storage_emulator.server")
  monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  gcsfs = pytest.importorskip("gcsfs")
  server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
  server.start()
  port = server._api._httpd.server_port
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
  gcsfs.GCSFileSystem.clear_instance_cache()
  yield gcsfs.GCSFileSystem(token="anon"), "gs://bucket"
  gcsfs.GCSFileSystem.clear_instance_cache()
  server.stop()
