"""What Prometheus reads at /metrics."""

import functools
from collections.abc import Callable

import prometheus_client as prometheus

from jaxgpt.inference.engine.requests import Stats

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
  """The server's metrics, in a registry of their own."""

  def __init__(self, stats: Callable[[], Stats] | None = None):
    """Prepares the metrics. `stats` gives the engine's state. None: there is no engine."""
    self._registry = prometheus.CollectorRegistry()
    prometheus.ProcessCollector(registry=self._registry)
    self._requests = prometheus.Counter(
      "jaxgpt_requests",
      "Responses by endpoint and status; 499: the client left before the end",
      ["endpoint", "status"],
      registry=self._registry,
    )
    self._seconds = self._histogram("jaxgpt_request_seconds", "From a request to its response")
    self._first = self._histogram("jaxgpt_first_token_seconds", "From the queue to the first token")
    self._each = self._histogram("jaxgpt_token_seconds", "Between two tokens of one text")
    self._prompt = self._counter("jaxgpt_prompt_tokens", "Tokens of prompts")
    self._drawn = self._counter("jaxgpt_generated_tokens", "Tokens of texts")
    if stats:
      for name, help_text in (
        ("running", "Requests that the engine works on"),
        ("waiting", "Requests in the engine's queue"),
        ("blocks", "Blocks of the cache"),
        ("blocks_used", "Blocks of the cache that requests hold"),
        ("prefilled", "Tokens of prompts computed since the start"),
        ("reused", "Tokens of prompts found in the cache since the start"),
        ("drafted", "Tokens drafted since the start"),
        ("accepted", "Drafted tokens that the model took since the start"),
      ):
        gauge = prometheus.Gauge(f"jaxgpt_engine_{name}", help_text, registry=self._registry)
        gauge.set_function(functools.partial(_read, stats, name))

  def _histogram(self, name: str, help_text: str) -> prometheus.Histogram:
    return prometheus.Histogram(name, help_text, buckets=_SECONDS, registry=self._registry)

  def _counter(self, name: str, help_text: str) -> prometheus.Counter:
    return prometheus.Counter(name, help_text, registry=self._registry)

  def responded(self, endpoint: str, status: int, seconds: float, prompt_tokens: int) -> None:
    """Notes a response at its end."""
    self._requests.labels(endpoint, str(status)).inc()
    self._seconds.observe(seconds)
    self._prompt.inc(prompt_tokens)

  def drawn(self, tokens: int, now: float, begin: float, last: float | None) -> None:
    """Notes new tokens of a text.

    Args:
      tokens: Their number.
      now: The time, in seconds.
      begin: When the text was asked for.
      last: When the text's last tokens came, or None if these are the first.
    """
    self._drawn.inc(tokens)
    if last is None:
      self._first.observe(now - begin)
    else:
      self._each.observe((now - last) / tokens)

  def text(self) -> bytes:
    """All metrics, in Prometheus's text format."""
    return prometheus.generate_latest(self._registry)


def _read(stats: Callable[[], Stats], name: str) -> float:
  return float(getattr(stats(), name))
