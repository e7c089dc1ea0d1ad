"""Full queues, clients that leave or do not read, late answers, keys, names, and the end."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import pytest

from jaxgpt.errors import UserError
from jaxgpt.inference.engine.requests import Piece, Token
from jaxgpt.inference.server import app, calls, client, metrics, serving
from tests.inference.server import fake

JSON = {"Content-Type": "application/json"}


def ask(server, body, path="/v1/completions", headers=None, timeout=20):
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
  connection.request("POST", path, json.dumps(body), {**JSON, **(headers or {})})
  response = connection.getresponse()
  out = response.status, json.loads(response.read()), dict(response.getheaders())
  connection.close()
  return out


def get(server, path, headers=None):
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
  connection.request("GET", path, headers=headers or {})
  response = connection.getresponse()
  return response.status, response.read().decode()


def opened(server, body):
  """A socket that has sent a request and reads nothing."""
  data = json.dumps(body).encode()
  found = socket.create_connection(("127.0.0.1", server.port), timeout=20)
  found.sendall(
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
  )
  return found


def until(condition, seconds=10.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not happen"
    time.sleep(0.01)


def metric(server, name):
  lines = get(server, "/metrics")[1].splitlines()
  return {
    line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
    for line in lines
    if name in line and line[0] != "#"
  }


def want(prompt):
  return "".join(fake.script(prompt.encode()))


def test_a_full_queue_refuses_and_names_a_time(serve):
  server = serve(capacity=3)
  server.engine.paused.set()
  waiting = [opened(server, {"prompt": f"tokens=3 {i}", "stream": True}) for i in range(3)]
  until(lambda: server.worker.jobs == 3)
  status, body, headers = ask(server, {"prompt": "p"})
  assert status == 429 and body["error"]["code"] == "queue_full"
  assert 1 <= int(headers["retry-after"]) <= 60
  server.engine.paused.clear()
  until(lambda: server.worker.jobs == 0)
  assert ask(server, {"prompt": "p"})[0] == 200
  for each in waiting:
    each.close()


def test_the_official_client_waits_and_comes_again(serve):
  server = serve(capacity=1)
  server.engine.paused.set()
  first = opened(server, {"prompt": "first", "stream": True})
  until(lambda: server.worker.jobs == 1)
  threading.Timer(0.5, server.engine.paused.clear).start()
  openai_client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=3)
  assert openai_client.completions.create(model="fake", prompt="second").choices[0].text == want(
    "second"
  )
  first.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(serve, stream):
  server = serve(fake.FakeEngine(seconds=0.01), capacity=2)
  leaving = opened(server, {"prompt": "tokens=4000", "max_tokens": 4000, "stream": stream})
  other = opened(server, {"prompt": "tokens=30", "max_tokens": 99, "stream": True})
  until(lambda: len(server.engine.requests) == 2)
  leaving.close()
  until(lambda: server.engine.cancelled == [1])
  until(lambda: server.worker.jobs == 0)
  data = b""
  while b"[DONE]" not in data:
    data += other.recv(1 << 16)
  assert server.engine._steps < 1000, "the text of the client that left went on"
  until(
    lambda: (
      metric(server, "jaxgpt_requests_total").get(
        'jaxgpt_requests_total{endpoint="/v1/completions",status="499"}'
      )
      == 1
    )
  )


def test_a_client_that_reads_nothing_stalls_nobody(serve, monkeypatch):
  monkeypatch.setattr(client, "MOST_WAITING", 200_000)
  monkeypatch.setattr(client.Inbox.__init__, "__defaults__", (200_000,))
  server = serve(fake.FakeEngine(rows=8), capacity=8)
  body = {"prompt": "tokens=4000 slow", "max_tokens": 4000, "stream": True, "logprobs": 20, "n": 4}
  slow = socket.socket()
  slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
  slow.connect(("127.0.0.1", server.port))
  data = json.dumps(body).encode()
  slow.sendall(
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
  )
  until(lambda: len(server.engine.requests) == 4)
  begin = time.monotonic()
  for i in range(5):
    assert ask(server, {"prompt": f"quick {i}"})[1]["choices"][0]["text"] == want(f"quick {i}")
  assert time.monotonic() - begin < 5
  # It is ended, not kept in memory: the places are free at once, the rows after the engine's step.
  until(lambda: sorted(server.engine.cancelled) == [1, 2, 3, 4], 20)
  assert server.worker.jobs == 0
  slow.settimeout(20)
  rest = b""
  while part := slow.recv(1 << 20):
    rest += part
    if b"slow_reader" in rest:
      break
  assert b"slow_reader" in rest, "the client is told why"
  slow.close()


def test_a_stalled_connection_is_cut_off(serve, monkeypatch):
  monkeypatch.setattr(client.Stream.__init__, "__defaults__", (0.3,))
  server = serve(capacity=8)
  held = opened(
    server, {"prompt": "tokens=4000", "max_tokens": 4000, "stream": True, "n": 8, "logprobs": 20}
  )
  until(lambda: len(server.engine.requests) == 8)
  until(lambda: server.worker.jobs == 0, 20)
  assert server.end(10) == 0, "the connection does not keep the server from stopping"
  held.close()


def test_slow_text_comes_joined():
  """What waits for a client becomes one chunk a choice, not one a token."""

  class Idle:  # in place of a worker
    def submit(self, jobs):
      self.jobs = jobs

    def cancel(self, job):
      pass

  async def talk():
    engine, idle = fake.FakeEngine(), Idle()
    call = calls.read_completion({"prompt": "p", "n": 2, "logprobs": 0}, fake.served(engine))
    inbox = client.Inbox(call, idle, metrics.Metrics(), 60)
    for i in range(5):
      token = Token(66, f"{i} ", -1.0)
      for job in idle.jobs[: 1 + (i > 2)]:
        job.deliver(Piece(1, token.text, (token,), "length" if i == 4 else None))
    parts = await inbox.take(1)
    assert [(part.choice, part.text, len(part.tokens), part.finish) for part in parts] == [
      (0, "0 1 2 3 4 ", 5, "length"),
      (1, "3 4 ", 2, "length"),
    ]
    assert inbox.ended
    inbox.close()

  asyncio.run(talk())


@pytest.mark.parametrize("stream", [True, False])
def test_a_late_answer_ends(serve, stream):
  server = serve(settings=app.Settings(seconds=0.3))
  server.engine.paused.set()
  openai_client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
  with pytest.raises(openai.APIError, match="--timeout"):
    out = openai_client.completions.create(model="fake", prompt="p", stream=stream)
    list(out)
  server.engine.paused.clear()
  until(lambda: server.engine.cancelled == [1])
  assert ask(server, {"prompt": "p"})[0] == 200


def test_a_long_body_is_refused(serve):
  server = serve(settings=app.Settings(most_bytes=2000))
  status, body, _ = ask(server, {"prompt": "x" * 3000})
  assert status == 413 and "--max-body" in body["error"]["message"]
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
  parts = iter([b'{"prompt": "', b"x" * 3000, b'"}'])
  connection.request("POST", "/v1/completions", parts, JSON, encode_chunked=True)
  assert connection.getresponse().status == 413
  assert ask(server, {"prompt": "x" * 1000})[0] == 200


def test_a_stream_that_waits_says_so(serve, monkeypatch):
  monkeypatch.setattr(client, "KEEP_ALIVE", 0.05)
  server = serve()
  server.engine.paused.set()
  found = opened(server, {"prompt": "p", "stream": True})
  data = b""
  while data.count(b": waiting\n\n") < 3:
    data += found.recv(1 << 16)
  server.engine.paused.clear()
  while b"[DONE]" not in data:
    data += found.recv(1 << 16)
  found.close()


def test_clients_that_do_not_send_are_cut_off(serve, monkeypatch):
  monkeypatch.setattr(serving, "HEADER_SECONDS", 0.2)
  monkeypatch.setattr(app, "_BODY_SECONDS", 0.2)
  server = serve()
  for start in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: "):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as found:
      found.sendall(start)
      with contextlib.suppress(ConnectionResetError):
        assert found.recv(1) == b""
  with socket.create_connection(("127.0.0.1", server.port), timeout=20) as found:
    found.sendall(
      b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      b"Content-Length: 100\r\n\r\n{"
    )
    answer = found.makefile("rb").read()
  assert answer.startswith(b"HTTP/1.1 408") and b"send it faster" in answer


def test_clients_that_do_not_send_a_second_request_are_cut_off(serve, monkeypatch):
  monkeypatch.setattr(serving, "HEADER_SECONDS", 0.4)
  server = serve(fake.FakeEngine(seconds=0.1))
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
  for _ in range(2):  # a pause between requests is no head that does not come
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    time.sleep(0.6)
  begin = time.monotonic()
  connection.sock.settimeout(0.05)
  with contextlib.suppress(ConnectionError):
    while time.monotonic() < begin + 10:
      connection.sock.sendall(b"G")  # each byte in time, but never all
      with contextlib.suppress(TimeoutError):
        if connection.sock.recv(1) == b"":
          break
  connection.close()
  assert time.monotonic() < begin + 5
  status, out, _ = ask(server, {"prompt": "p"})
  assert status == 200 and out["choices"][0]["text"] == want("p"), "an answer may take longer"


def test_the_key(serve):
  server = serve(settings=app.Settings(api_key="s3cret"))
  for headers in (
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "s3cret"},
    {"Authorization": "Basic s3cret"},
  ):
    status, body, found = ask(server, {"prompt": "p"}, headers=headers)
    assert status == 401 and body["error"]["code"] == "invalid_api_key"
    assert found["www-authenticate"] == "Bearer"
    assert get(server, "/v1/models", headers)[0] == get(server, "/metrics", headers)[0] == 401
  assert get(server, "/health")[0] == get(server, "/")[0] == 200
  openai_client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0)
  assert openai_client.completions.create(model="fake", prompt="p").choices[0].text == want("p")


def test_a_name_of_another_site_is_refused(serve):
  """A page of another site, whose name was made to lead to this machine, gets nothing."""
  server = serve(settings=app.Settings(hosts=(*app.LOOPBACK, "models.lan")))
  for host in ("evil.example", "evil.example:80", ""):
    status, body = get(server, "/v1/models", {"Host": host})
    assert status == 403 and "--allow-host" in body
  for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "MODELS.lan:1"):
    assert get(server, "/v1/models", {"Host": host})[0] == 200


def test_a_step_that_fails_ends_its_requests_and_the_server_goes_on(serve):
  server = serve()
  for _ in range(4):
    status, body, _ = ask(server, {"prompt": "breaks"})
    assert status == 500 and "the device is gone" in body["error"]["message"]
    assert ask(server, {"prompt": "p"})[1]["choices"][0]["text"] == want("p")
  assert get(server, "/health") == (200, '{"status":"ok"}')


def test_an_engine_that_fails_again_and_again_ends_the_server(serve):
  server = serve()
  for _ in range(3):
    assert ask(server, {"prompt": "breaks"})[0] == 500
  server.thread.join(10)
  assert not server.thread.is_alive() and server.exit_code == 1


def test_the_metrics(serve):
  server = serve()
  ask(server, {"prompt": "tokens=5"})
  ask(server, {"prompt": "p", "n": 0})
  until(lambda: metric(server, "jaxgpt_engine_running")["jaxgpt_engine_running"] == 0)
  found = metric(server, "jaxgpt_")
  assert found['jaxgpt_requests_total{endpoint="/v1/completions",status="200"}'] == 1
  assert found['jaxgpt_requests_total{endpoint="/v1/completions",status="400"}'] == 1
  assert found["jaxgpt_generated_tokens_total"] == 5 and found["jaxgpt_prompt_tokens_total"] == 8
  assert found["jaxgpt_first_token_seconds_count"] == 1 and found["jaxgpt_token_seconds_count"] == 4
  assert found["jaxgpt_engine_running"] == 0 and found["jaxgpt_engine_blocks"] == 64


def test_one_thread_runs_the_engine_and_no_other_is_left(serve):
  before = threading.active_count()
  server = serve(fake.FakeEngine(seconds=0.001))
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    got = list(
      pool.map(lambda i: ask(server, {"prompt": f"p{i}"})[1]["choices"][0]["text"], range(32))
    )
  assert got == [want(f"p{i}") for i in range(32)]
  assert len(server.engine.threads) == 1
  assert server.end() == 0
  until(lambda: threading.active_count() <= before)


def test_the_end_finishes_what_runs_and_refuses_the_rest(serve):
  server = serve(fake.FakeEngine(seconds=0.02))
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = [
      pool.submit(ask, server, {"prompt": f"tokens=90 {i}", "max_tokens": 99}) for i in range(4)
    ]
    until(lambda: len(server.engine.requests) == 4)
    server.stop()
    until(lambda: server.app.draining)
    time.sleep(0.5)  # it still listens while the texts are written
    status, body, headers = ask(server, {"prompt": "late"})
    assert status == 503 and body["error"]["code"] == "stopping" and headers["retry-after"]
    assert get(server, "/health") == (503, '{"status":"draining"}')
    for i, future in enumerate(found):
      assert future.result()[1]["choices"][0]["text"] == want(f"tokens=90 {i}")
  assert server.end() == 0
  with pytest.raises(OSError):
    socket.create_connection(("127.0.0.1", server.port), timeout=1)


PROCESS = """
import sys
from jaxgpt.inference.server import app, metrics, serving, worker
from tests.inference.server import fake

engine = fake.FakeEngine(seconds=0.02)
w = worker.Worker(engine, 72)
listener = serving.bind("127.0.0.1", 0)
make = lambda: app.App(fake.served(engine), w, metrics.Metrics(), app.Settings())
started = lambda stop: print(listener.getsockname()[1], flush=True)
sys.exit(serving.run(make, w, listener, lambda line: print(line, flush=True), started))
"""


@pytest.fixture
def process():
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  found = subprocess.Popen(
    [sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, text=True, env=env
  )
  found.port = int(found.stdout.readline())
  yield found
  found.kill()
  found.wait()


def test_a_signal_loses_no_accepted_request(process):
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = [
      pool.submit(ask, process, {"prompt": f"tokens=50 {i}", "max_tokens": 99}) for i in range(8)
    ]
    until(
      lambda: metric(process, "first_token_seconds_count")["jaxgpt_first_token_seconds_count"] == 8
    )
    process.send_signal(signal.SIGTERM)
    for i, future in enumerate(found):
      assert future.result()[1]["choices"][0]["text"] == want(f"tokens=50 {i}")
  assert process.wait(10) == 0
  assert "first 8 texts are finished" in process.stdout.read()


def test_a_second_signal_ends_it_at_once(process):
  held = opened(process, {"prompt": "tokens=4000", "max_tokens": 4000, "stream": True})
  held.recv(1)
  process.send_signal(signal.SIGINT)
  assert "first 1 texts" in process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  assert process.wait(10) == 1
  held.close()


def test_an_address_that_is_taken():
  with serving.bind("127.0.0.1", 0) as listener:
    port = listener.getsockname()[1]
    with pytest.raises(UserError, match=f"--port={port}.*choose another port"):
      serving.bind("127.0.0.1", port)
  with pytest.raises(UserError, match="--host=203.0.113.7"):
    serving.bind("203.0.113.7", 0)
