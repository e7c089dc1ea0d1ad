"""A server with the fake engine, in threads of this process."""

import contextlib
import threading

import pytest

from jaxgpt.inference.server import app, metrics, serving, worker
from tests.inference.server import fake


class Running:
  """A server.

  Attributes:
    url: Its address.
    port: Its port.
    engine: Its engine.
    lines: What it has reported.
    stop: Begins to stop it, as a signal does.
  """

  def __init__(self, engine, capacity=72, settings=None, model=None, **served):
    self.engine, self.lines = engine, []
    model = model or fake.served(engine, capacity, **served)
    self.worker = worker.Worker(engine, capacity) if model.prompts else None
    listener = serving.bind("127.0.0.1", 0)
    self.port = listener.getsockname()[1]
    self.url = f"http://127.0.0.1:{self.port}"
    numbers = metrics.Metrics((lambda: self.worker.stats) if self.worker else None)
    started = threading.Event()

    def begun(stop):
      self.stop = stop
      started.set()

    def make():
      self.app = app.App(model, self.worker, numbers, settings or app.Settings())
      return self.app

    def run():
      self.exit_code = serving.run(make, self.worker, listener, self.lines.append, begun)

    self.thread = threading.Thread(target=run, name="server", daemon=True)
    self.thread.start()
    assert started.wait(10)

  def end(self, seconds=20):
    """Stops it and returns its exit code."""
    if self.thread.is_alive():
      with contextlib.suppress(RuntimeError):
        self.stop()
    self.thread.join(seconds)
    assert not self.thread.is_alive(), "the server does not stop"
    return self.exit_code


@pytest.fixture
def serve():
  """A function (engine, capacity, settings, …) -> a running server."""
  running = []

  def start(engine=None, **options):
    running.append(Running(engine or fake.FakeEngine(), **options))
    return running[-1]

  yield start
  for each in running:
    if isinstance(each.engine, fake.FakeEngine):
      each.engine.paused.clear()
    each.end()


@pytest.fixture(scope="module")
def server():
  """A server that the tests of a module share."""
  found = Running(fake.FakeEngine())
  yield found
  found.end()
