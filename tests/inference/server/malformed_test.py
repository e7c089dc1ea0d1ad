"""Malformed requests get a 4xx in OpenAI's form, which names the field and the way out."""

import http.client
import json
import socket

import pytest

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HI = [{"role": "user", "content": "hi"}]


def ask(server, path, body=None, method="POST", headers=None):
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
  data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
  connection.request(method, path, data, headers or {"Content-Type": "application/json"})
  response = connection.getresponse()
  out = response.status, response.read(), dict(response.getheaders())
  connection.close()
  return out


def chat(**fields):
  return CHAT, {"model": "fake", "messages": HI, **fields}


def text(**fields):
  return TEXT, {"model": "fake", "prompt": "p", **fields}


def message(**fields):
  return CHAT, {"messages": [{"role": "user", "content": "hi", **fields}]}


def deep(levels):
  """A body with an array of so many levels in it."""
  return b'{"prompt": "p", "guided_json": ' + b"[" * levels + b"]" * levels + b"}"


NAMELESS = {"type": "json_schema", "json_schema": {"name": "a"}}
# (path, body, field, a word of the message)
CASES = [
  (TEXT, b"", None, "not JSON"),
  (TEXT, b"{", None, "not JSON"),
  (TEXT, b"\xff\xfe{}", None, "not JSON in UTF-8"),
  (TEXT, b"[]", None, "array, not an object"),
  (TEXT, b'"p"', None, "string, not an object"),
  (TEXT, b"[" * 100_000, None, "too deeply"),
  *((TEXT, deep(n), None, "too deeply") for n in (100, 600, 950, 990)),
  (TEXT, deep(99), "guided_json", "give an object"),
  (TEXT, b'{"prompt": "p", "temperature": NaN}', None, "NaN is not a JSON number"),
  (TEXT, b'{"prompt": "p", "prompt": "q"}', None, "'prompt' stands twice"),
  (TEXT, b'{"prompt": "\\ud800"}', "prompt", "surrogate"),
  (TEXT, b'{"prompt": "p", "seed": ' + b"9" * 5000 + b"}", None, "JSON"),
  (TEXT, {}, "prompt", "it is missing"),
  (*text(prompt=3), "prompt", "give a string"),
  (*text(prompt=[]), "prompt", "at least 1"),
  (*text(prompt=[1, "a"]), "prompt[0]", "string"),
  (*text(prompt=[-1]), "prompt[0]", "from 0 to 255"),
  (*text(prompt=[256]), "prompt[0]", "from 0 to 255"),
  (*text(prompt=[1.5]), "prompt[0]", "not a token id"),
  (*text(prompt=[True]), "prompt[0]", "not a token id"),
  (*text(prompt="x" * 5000), "prompt", "shorten it by 905 or more"),
  (*text(promt="p"), "promt", "did you mean 'prompt'"),
  (*text(temperature="hot"), "temperature", "give a number from 0 to 2"),
  (*text(temperature=-0.1), "temperature", "out of range"),
  (*text(temperature=True), "temperature", "a boolean"),
  (*text(temperature=1e999), None, "JSON"),
  (*text(top_p=0), "top_p", "above 0 to 1"),
  (*text(top_k=1.5), "top_k", "not an integer"),
  (*text(max_tokens=0), "max_tokens", "from 1"),
  (*text(n=0), "n", "from 1"),
  (*text(n=73), "n", "send fewer at once"),
  (*text(prompt=["p"] * 40, n=2), "n", "2 choices of 40 prompts"),
  (*text(presence_penalty=3), "presence_penalty", "from -2 to 2"),
  (*text(seed="a"), "seed", "not an integer"),
  (*text(stop=""), "stop", "empty"),
  (*text(stop=["a"] * 17), "stop", "at most 16"),
  (*text(stop=[1]), "stop", "give a string"),
  (*text(stream="yes"), "stream", "true or false"),
  (*text(stream_options={"include_usage": True}), "stream_options", "add stream=true"),
  (*text(stream=True, stream_options={"usage": True}), "usage", "no such field"),
  (*text(logprobs=21), "logprobs", "to 20"),
  (*text(echo=True), "echo", "leave it out"),
  (*text(suffix="s"), "suffix", "leave it out"),
  (*text(best_of=1, n=2), "best_of", "below n=2"),
  (*text(best_of=2, stream=True), "best_of", "cannot be streamed"),
  (*text(logit_bias={"5": 100}), "logit_bias", "not supported"),
  (*text(model="gpt-4"), "model", "the one served is 'fake'"),
  (*text(model=7), "model", "give a string"),
  (CHAT, {"model": "fake"}, "messages", "it is missing"),
  (*chat(messages=[]), "messages", "at least 1"),
  (*chat(messages="hi"), "messages", "give an array"),
  (*chat(messages=["hi"]), "messages[0]", "not an object"),
  (*message(role="boss"), "messages[0].role", "choose one of system"),
  (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role", "it is missing"),
  (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "it is missing"),
  (*message(content=5), "messages[0].content", "give an array"),
  (*message(content=[{"type": "image_url"}]), "messages[0].content[0].type", "text alone"),
  (*message(weight=1), "messages[0].weight", "no such field"),
  (*message(tool_calls=[{"id": "a"}]), "messages[0].tool_calls[0]", "not a call"),
  (*message(content="refuse"), "messages", "template refuses"),
  (*chat(tools=[{"type": "retrieval"}]), "tools[0]", "not a function"),
  (*chat(tool_choice="auto"), "tool_choice", "no tools"),
  (*chat(chat_template_kwargs="x"), "chat_template_kwargs", "give an object"),
  (*chat(tool_choice={"type": "function"}), "tool_choice", "choose one of auto, none"),
  (*chat(response_format={"type": "xml"}), "type", "choose one of text, json_object"),
  (*chat(response_format={}), "response_format", "it is missing"),
  (*chat(response_format={"type": "json_schema"}), "response_format", "do not go together"),
  (*chat(response_format=NAMELESS), "json_schema", "schema: it is missing"),
  (*text(guided_json=[]), "guided_json", "give an object"),
  (*text(guided_regex=""), "guided_regex", "an empty string"),
  (*text(guided_choice=[]), "guided_choice", "at least 1"),
  (*text(guided_choice=["a", ""]), "guided_choice", "none that is empty"),
  (*text(guided_regex="a", guided_choice=["b"]), "guided_choice", "asks for a form too"),
  (*chat(top_logprobs=2), "top_logprobs", "needs logprobs=true"),
  (*chat(logprobs=2), "logprobs", "true or false"),
  (*chat(functions=[{"name": "f"}]), "functions", "deprecated"),
  (*chat(max_tokens=1, max_completion_tokens=1), "max_tokens", "one of them"),
  (*chat(reasoning_effort="high"), "reasoning_effort", "no such field"),
  (EMBED, {"input": "a"}, None, "gives no embeddings"),
]


@pytest.mark.parametrize("path, body, field, words", CASES)
def test_a_malformed_request_is_refused(server, path, body, field, words):
  before = len(server.engine.requests)
  status, data, headers = ask(server, path, body)
  assert 400 <= status < 500, data
  assert headers["content-type"] == "application/json"
  error = json.loads(data)["error"]
  assert set(error) == {"message", "type", "param", "code"}
  assert error["type"] == "invalid_request_error" and error["param"] == field, error
  assert words in error["message"] and len(error["message"]) < 400, error
  assert len(server.engine.requests) == before, "the engine has seen it"


@pytest.mark.parametrize(
  "method, path, status, words",
  [
    ("GET", "/v1/chat/completions", 405, "use POST"),
    ("POST", "/v1/models", 405, "GET"),
    ("GET", "/v1/engines", 404, "nothing at '/v1/engines'"),
    ("POST", "/v1/completions/", 404, "nothing at"),
    ("GET", "/..%2f..%2fetc/passwd", 404, "nothing at"),
    ("DELETE", "/v1/models/fake", 405, "does not take DELETE"),
  ],
)
def test_a_path_or_method_that_does_not_exist(server, method, path, status, words):
  got, data, _ = ask(server, path, b"{}", method)
  assert got == status and words in json.loads(data)["error"]["message"]


def test_a_body_that_is_not_called_json(server):
  """A page of another site may send such a request without asking first."""
  for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
    status, data, _ = ask(server, TEXT, b'{"prompt": "p"}', headers={"Content-Type": kind})
    assert status == 415 and "application/json" in json.loads(data)["error"]["message"]
  assert (
    ask(server, TEXT, {"prompt": "p"}, headers={"Content-Type": "application/json; charset=utf-8"})[
      0
    ]
    == 200
  )


def test_what_is_not_http(server):
  with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
    connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
    answer = connection.makefile("rb").read()
  head, _, body = answer.partition(b"\r\n\r\n")
  assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["message"]


def test_the_table_is_long_enough():
  assert len(CASES) >= 40
