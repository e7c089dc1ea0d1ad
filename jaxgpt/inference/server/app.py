"""The routes of the server: OpenAI's protocol, the page, health and metrics."""

import asyncio
import base64
import concurrent.futures
import functools
import hashlib
import hmac
import importlib.resources
import logging
import re
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxgpt.inference.server import calls, fields, worker
from jaxgpt.inference.server.answers import Writer
from jaxgpt.inference.server.calls import Call, Served
from jaxgpt.inference.server.client import Disconnected, Inbox, Stream, collect, server_error
from jaxgpt.inference.server.fields import RequestError
from jaxgpt.inference.server.metrics import CONTENT_TYPE, Metrics
from jaxgpt.storage import strict_json

_log = logging.getLogger(__name__)
_BODY_SECONDS = 30.0  # for a client to send its request
_MOST_INPUTS = 2048  # texts in one request for embeddings, as in OpenAI's API
_GONE = 499  # status in the metrics of a client that left; never sent
LOOPBACK = ("localhost", "127.0.0.1", "::1")

Handler = Callable[[Request], Awaitable[Response]]


class Settings(NamedTuple):
  """Limits of the server.

  Attributes:
    seconds: Most time for a response, from its request on.
    most_bytes: Most bytes of a request's body.
    api_key: The key that requests must bring. '': none.
    hosts: Names under which clients may reach the server. (): any. A page of another site, whose
      name leads to this machine, is refused so.
  """

  seconds: float = 600.0
  most_bytes: int = 4 << 20
  api_key: str = ""
  hosts: tuple[str, ...] = ()


class App:
  """The application.

  Attributes:
    asgi: The ASGI application.
    draining: New requests are refused, because the server is about to stop.
  """

  def __init__(
    self,
    served: Served,
    engine: worker.Worker | None,
    metrics: Metrics,
    settings: Settings,
  ):
    """Prepares the routes.

    Args:
      served: The model.
      engine: Runs its engine. None: it writes no text.
      metrics: The metrics.
      settings: Limits.
    """
    self._served, self._worker, self._metrics, self._settings = served, engine, metrics, settings
    self._encoder = concurrent.futures.ThreadPoolExecutor(1, "encoder")
    self._active, self._embedding = 0, 0
    self._idle = asyncio.Event()
    self._idle.set()
    self.draining = False
    page = importlib.resources.files("jaxgpt.inference.server").joinpath("page.html").read_bytes()
    self._page = Response(page, media_type="text/html", headers=page_headers(page))
    routes = [
      Route("/", self._get_page),
      Route("/health", self._health),
      Route("/metrics", self._get_metrics),
      Route("/v1/models", self._models),
      Route("/v1/models/{name:path}", self._model),
      self._post("/v1/completions", self._completions),
      self._post("/v1/chat/completions", self._chat),
      self._post("/v1/embeddings", self._embeddings),
    ]
    handlers: Any = {
      RequestError: _error,
      HTTPException: _http_error,
      Exception: _bug,
    }
    inner = Starlette(routes=routes, exception_handlers=handlers)
    inner.router.redirect_slashes = False
    self.asgi: ASGIApp = _Guard(inner, settings)

  async def drain(self) -> None:
    """Refuses new requests from now on and returns when the last response has been sent."""
    self.draining = True
    await self._idle.wait()

  def close(self) -> None:
    """Ends the application's thread."""
    self._encoder.shutdown(cancel_futures=True)

  async def _get_page(self, request: Request) -> Response:
    return self._page

  async def _health(self, request: Request) -> Response:
    failed = self._worker is not None and self._worker.failed
    status = "failed" if failed else "draining" if self.draining else "ok"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)

  async def _get_metrics(self, request: Request) -> Response:
    return Response(self._metrics.text(), media_type=CONTENT_TYPE)

  async def _models(self, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [self._description()]})

  async def _model(self, request: Request) -> Response:
    calls.check_model({"model": request.path_params["name"]}, self._served)
    return JSONResponse(self._description())

  def _description(self) -> dict[str, Any]:
    s = self._served
    return {
      "id": s.name,
      "object": "model",
      "created": s.created,
      "owned_by": "jaxgpt",
      "jaxgpt": {  # for the page
        "context": s.context,
        "writes": s.prompts is not None,
        "chats": s.chats,
        "embeds": s.embed is not None,
        "sampling": s.defaults._asdict(),
        "fingerprint": s.fingerprint,
      },
    }

  def _post(self, path: str, handle: Callable[..., Awaitable[Response]]) -> Route:
    """A route whose responses are counted and waited for when the server stops."""

    async def endpoint(request: Request) -> Response:
      begin = time.monotonic()
      self._active += 1
      self._idle.clear()
      prompt_tokens = 0

      def done(status: int) -> None:
        self._active -= 1
        if not self._active:
          self._idle.set()
        self._metrics.responded(path, status, time.monotonic() - begin, prompt_tokens)

      status, streams = 500, False
      try:
        self._check_open()
        body = await _read(request, self._settings.most_bytes)

        def counted(tokens: int) -> None:
          nonlocal prompt_tokens
          prompt_tokens = tokens

        response = await handle(request, body, counted, done)
        status, streams = response.status_code, isinstance(response, Stream)
        return response
      except RequestError as e:
        status = e.status
        raise
      except (Disconnected, ClientDisconnect):
        status = _GONE
        return Response(status_code=_GONE)
      finally:
        if not streams:
          done(status)

    return Route(path, endpoint, methods=["POST"])

  def _check_open(self) -> None:
    if self.draining:
      raise RequestError(
        "the server is about to stop; ask again later",
        status=503,
        kind="server_error",
        code="stopping",
        headers={"retry-after": "5", "connection": "close"},
      )

  async def _encoded(self, function: Callable[..., Any], *args: Any) -> Any:
    """Runs a function in the thread for work that would hold up other clients."""
    return await asyncio.get_running_loop().run_in_executor(
      self._encoder, functools.partial(function, *args)
    )

  async def _completions(self, request: Request, body: bytes, *notes: Any) -> Response:
    return await self._generate(request, body, calls.read_completion, *notes)

  async def _chat(self, request: Request, body: bytes, *notes: Any) -> Response:
    return await self._generate(request, body, calls.read_chat, *notes)

  async def _generate(
    self,
    request: Request,
    body: bytes,
    read: Callable[[Any, Served], Call],
    counted: Callable[[int], None],
    done: Callable[[int], None],
  ) -> Response:
    try:
      if self._worker:
        self._worker.check_room()  # before work is done for a request that has to wait
      call = await self._encoded(lambda: read(fields.parse(body), self._served))
      assert self._worker is not None  # the model writes text
      counted(call.prompt_tokens)
      inbox = Inbox(call, self._worker, self._metrics, self._settings.seconds)
    except worker.Full as e:
      raise too_many(e.seconds) from None
    writer = Writer(call, self._served)
    if call.stream:
      return Stream(inbox, writer, done)
    found = await collect(inbox, writer, request.receive)
    text = strict_json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    return Response(text, media_type="application/json")

  async def _embeddings(
    self,
    request: Request,
    body: bytes,
    counted: Callable[[int], None],
    done: Callable[[int], None],
  ) -> Response:
    if self._embedding >= self._served.most_choices:
      raise too_many(1)
    self._embedding += 1
    try:
      found = await self._encoded(
        lambda: calls.read_embeddings(fields.parse(body), self._served, _MOST_INPUTS)
      )
      assert self._served.embed is not None
      try:
        vectors, tokens = await self._encoded(self._served.embed, found.texts)
      except calls.UserError as e:
        raise RequestError(f"input: {e}", param="input") from None
    finally:
      self._embedding -= 1
    counted(tokens)
    data = [
      {"object": "embedding", "index": i, "embedding": _packed(v) if found.base64 else v}
      for i, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse(
      {"object": "list", "data": data, "model": self._served.name, "usage": usage}
    )


def _packed(vector: list[float]) -> str:
  """A vector as base64 of little-endian float32, which OpenAI's client asks for by default."""
  return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def too_many(seconds: int) -> RequestError:
  """The error for a full queue."""
  return RequestError(
    f"the queue is full; ask again in {seconds} s, or start the server with a larger --queue",
    status=429,
    kind="rate_limit_error",
    code="queue_full",
    headers={"retry-after": str(seconds)},
  )


async def _read(request: Request, most: int) -> bytes:
  """The body of a request.

  Raises:
    RequestError: It is not called JSON, is too long, or takes too long to come.
    ClientDisconnect: The client left.
  """
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "application/json":
    raise RequestError(
      f"Content-Type is {kind[:60]!r}; send JSON with 'Content-Type: application/json'", status=415
    )
  too_long = RequestError(
    f"the body has more than {most:,} bytes; send less, or start the server with a larger "
    "--max-body",
    status=413,
  )
  length = request.headers.get("content-length", "0")
  if length.isdecimal() and int(length[:20]) > most:
    raise too_long
  body = bytearray()
  try:
    async with asyncio.timeout(_BODY_SECONDS):
      async for chunk in request.stream():
        body += chunk
        if len(body) > most:
          raise too_long
  except TimeoutError:
    raise RequestError(
      f"the body did not come within {_BODY_SECONDS:g} seconds; send it faster",
      status=408,
      headers={"connection": "close"},
    ) from None
  return bytes(body)


class _Guard:
  """Checks the host's name and the API key before anything else."""

  def __init__(self, inner: ASGIApp, settings: Settings):
    self._inner, self._settings = inner, settings
    self._open = {"/", "/health"}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http" and (error := self._problem(Request(scope))):
      await (await _error(Request(scope), error))(scope, receive, send)
      return
    await self._inner(scope, receive, send)

  def _problem(self, request: Request) -> RequestError | None:
    s = self._settings
    host = request.headers.get("host", "")
    name = re.sub(r":\d*$", "", host).strip("[]").lower()
    if s.hosts and name not in s.hosts:
      return RequestError(
        f"Host: {name[:80]!r} is not a name of this server ({', '.join(s.hosts)}); use one of "
        "them, or start the server with --allow-host",
        status=403,
        code="unknown_host",
      )
    if s.api_key and request.url.path not in self._open:
      scheme, _, given = request.headers.get("authorization", "").partition(" ")
      if scheme.lower() != "bearer" or not hmac.compare_digest(
        given.strip().encode(), s.api_key.encode()
      ):
        what = "wrong" if given else "missing"
        return RequestError(
          f"the API key is {what}; send the header 'Authorization: Bearer KEY'",
          status=401,
          code="invalid_api_key",
          headers={"www-authenticate": "Bearer"},
        )
    return None


async def _error(request: Request, error: Exception) -> Response:
  assert isinstance(error, RequestError)
  return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
  """No such path, or another method than the path takes."""
  assert isinstance(error, HTTPException)
  path, method = request.url.path[:80], request.method
  said = {
    404: f"there is nothing at {path!r}; the API is at /v1/chat/completions, /v1/completions, "
    "/v1/embeddings and /v1/models",
    405: f"{path!r} does not take {method}; use {(error.headers or {}).get('Allow', 'another')}",
  }
  message = said.get(error.status_code, str(error.detail))
  found = RequestError(message, status=error.status_code, headers=error.headers)
  return JSONResponse(found.body, found.status, found.headers)


async def _bug(request: Request, error: Exception) -> Response:
  """A bug: the server's log has the traceback."""
  found = server_error("the server failed; its log says why")
  return JSONResponse(found.body, found.status)


def page_headers(page: bytes) -> dict[str, str]:
  """Headers of the page: it may run its own script and styles, and connect to this server alone."""

  def hashes(tag: bytes) -> str:
    found = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), page, re.S)
    digests = [base64.b64encode(hashlib.sha256(each).digest()).decode() for each in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)

  policy = {
    "default-src": "'none'",
    "script-src": hashes(b"script"),
    "style-src": hashes(b"style"),
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
  }
  return {
    "content-security-policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
  }
