"""Bodies of requests to calls: the prompts as tokens, and how they are continued.

The fields are those of OpenAI's API, and as extensions top_k, min_p, repetition_penalty and
those of `formats`, which other servers have under the same names. A field that this server does not
support is refused.
"""

import dataclasses
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jaxgpt.errors import UserError
from jaxgpt.inference.engine.requests import Request
from jaxgpt.inference.sampling import Sampling
from jaxgpt.inference.server import fields, formats
from jaxgpt.inference.server.fields import Reader, RequestError
from jaxgpt.inference.server.messages import read_messages, read_tools

_SEEDS = 1 << 31
_MOST_STOPS = 16
_MOST_LOGPROBS = 20
_COMPLETION_TOKENS = 16  # OpenAI's default for completions


class Prompts(Protocol):
  """Encodes prompts: `jaxgpt.inference.prompts.Prompts`."""

  def text(self, prompt: str) -> list[int]:
    """The ids of a text to continue."""
    ...

  def chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
  ) -> list[int]:
    """The ids of a conversation up to where the assistant's answer begins."""
    ...


class Served(NamedTuple):
  """The model that is served.

  Attributes:
    name: Its name in the API.
    fingerprint: What the answers follow from besides the request: the run's step and the digest of
      its config.
    created: When the server started, in seconds since 1970.
    context: Most tokens of a prompt and its continuation together, for which the cache has room. 0:
      it writes no text.
    vocab_size: Token ids are below it.
    chats: Whether there is a chat template.
    prompts: Encodes prompts. None: the model writes no text.
    defaults: How tokens are drawn where a request does not say it.
    token_text: The text of a token.
    check: Raises a UserError for a request that the engine cannot run.
    most_choices: Most choices of one call.
    embed: Texts to (embeddings, number of tokens). None: the model gives no embeddings.
  """

  name: str
  fingerprint: str
  created: int
  context: int
  vocab_size: int
  chats: bool
  prompts: Prompts | None
  defaults: Sampling
  token_text: Callable[[int], str]
  check: Callable[[Request], None]
  most_choices: int
  embed: Callable[[Sequence[str]], tuple[list[list[float]], int]] | None = None


@dataclasses.dataclass(frozen=True)
class Call:
  """A request for text, checked and encoded.

  Attributes:
    chat: Whether the answer is a message, or a text otherwise.
    requests: One for each choice, those of the first prompt first.
    prompt_tokens: Tokens of all prompts.
    stream: Send the text as it comes.
    usage: End the stream with the numbers of tokens.
    logprobs: Return log-probabilities.
    prompts: Number of prompts.
    keep: Choices of each prompt to return: those with the highest mean log-probability if there
      are more.
  """

  chat: bool
  requests: tuple[Request, ...]
  prompt_tokens: int
  stream: bool
  usage: bool
  logprobs: bool
  prompts: int
  keep: int


def _stream_options(name: str, value: Any) -> bool:
  found = fields.read(
    fields.mapping(name, value),
    {
      "include_usage": fields.boolean,
      "include_obfuscation": fields.unsupported("chunks are not padded", False),
    },
  )
  return bool(found.get("include_usage"))


def _empty(why: str) -> Reader:
  return fields.unsupported(why, {}, [], False, "")


_COMMON: dict[str, Reader] = {
  "model": fields.text,
  "stream": fields.boolean,
  "stream_options": _stream_options,
  "n": fields.integer(least=1, most=128),
  "seed": fields.integer(least=-(1 << 63), most=(1 << 63) - 1),
  "stop": fields.strings(_MOST_STOPS),
  "max_tokens": fields.integer(least=1),
  "temperature": fields.number(least=0, most=2),
  "top_p": fields.number(above=0, most=1),
  "top_k": fields.integer(least=0),
  "min_p": fields.number(least=0, most=1),
  "repetition_penalty": fields.number(above=0, most=10),
  "presence_penalty": fields.number(least=-2, most=2),
  "frequency_penalty": fields.number(least=-2, most=2),
  "logit_bias": _empty("biases are not supported"),
  "user": fields.label,
  **formats.READERS,
}
_COMPLETION: dict[str, Reader] = {
  "prompt": lambda name, value: value,  # see `_prompts`
  **_COMMON,
  "logprobs": fields.integer(least=0, most=_MOST_LOGPROBS),
  "best_of": fields.integer(least=1, most=128),
  "echo": fields.unsupported("prompts are not repeated in the answer", False),
  "suffix": fields.unsupported("the model does not fill in text", ""),
}
_CHAT: dict[str, Reader] = {
  "messages": read_messages,
  **_COMMON,
  "max_completion_tokens": fields.integer(least=1),
  "logprobs": fields.boolean,
  "top_logprobs": fields.integer(least=0, most=_MOST_LOGPROBS),
  "tools": read_tools,
  "tool_choice": fields.choice("auto", "none"),
  "chat_template_kwargs": fields.mapping,  # variables of the template, a field of vLLM's
  "parallel_tool_calls": fields.unsupported("calls of tools are text", True),
  "functions": _empty("they are deprecated: describe tools in `tools`"),
  "function_call": fields.unsupported("it is deprecated: see `tool_choice`", "auto", "none"),
  "modalities": fields.unsupported("the model writes text alone", ["text"]),
  "audio": _empty("the model writes text alone"),
  "metadata": lambda name, value: fields.mapping(name, value) and None,
  "store": fields.unsupported("nothing is stored", False),
  "safety_identifier": fields.label,
  "prompt_cache_key": fields.label,
  "service_tier": fields.unsupported("there is one tier", "auto", "default"),
}


def read_completion(body: Mapping[str, Any], served: Served) -> Call:
  """The call in the body of a request for completions.

  Raises:
    RequestError: A field is unknown, has another form, or asks for something that is not supported.
  """
  found = fields.read(body, _COMPLETION)
  check_model(found, served)
  if served.prompts is None:
    raise _writes_nothing()
  if "prompt" not in found:
    raise RequestError("prompt: it is missing; give a string", param="prompt")
  prompts = _prompts("prompt", found["prompt"], served)
  n = found.get("n", 1)
  best_of = found.get("best_of", n)
  if best_of < n:
    raise fields.refuse("best_of", best_of, f"below n={n}; give at least n")
  if best_of > n and found.get("stream"):
    raise fields.refuse("best_of", best_of, "above n, which cannot be streamed; leave out stream")
  logprobs = found.get("logprobs", 0 if best_of > n else None)
  limit = found.get("max_tokens", _COMPLETION_TOKENS)
  return _call(False, prompts, found, served, logprobs, limit, best_of, "prompt")


def read_chat(body: Mapping[str, Any], served: Served) -> Call:
  """The call in the body of a request for an answer in a conversation.

  Raises:
    RequestError: See `read_completion`. Also raised if the model has no chat template, or it
      refuses the messages.
  """
  found = fields.read(body, _CHAT)
  check_model(found, served)
  if served.prompts is None:
    raise _writes_nothing()
  if "messages" not in found:
    raise RequestError(
      "messages: it is missing; give an array of {role, content}", param="messages"
    )
  if not served.chats:
    raise RequestError(
      "this model has no chat template: it was not trained on conversations; continue a text with "
      "/v1/completions",
      code="no_chat_template",
    )
  if "top_logprobs" in found and not found.get("logprobs"):
    raise fields.refuse("top_logprobs", found["top_logprobs"], "needs logprobs=true; add it")
  if found.get("tool_choice") and "tools" not in found:
    raise fields.refuse("tool_choice", found["tool_choice"], "there are no tools; leave it out")
  tools = found.get("tools") if found.get("tool_choice") != "none" else None
  try:
    prompt = served.prompts.chat(
      found["messages"], tools=tools or None, variables=found.get("chat_template_kwargs")
    )
  except UserError as e:
    raise RequestError(f"messages: {e}", param="messages") from None
  logprobs = found.get("top_logprobs", 0) if found.get("logprobs") else None
  if "max_completion_tokens" in found and "max_tokens" in found:
    raise RequestError(
      "max_tokens: it is the old name of max_completion_tokens; give one of them",
      param="max_tokens",
    )
  limit = found.get("max_completion_tokens", found.get("max_tokens", served.context))
  return _call(True, [prompt], found, served, logprobs, limit, found.get("n", 1), "messages")


def check_model(found: Mapping[str, Any], served: Served) -> None:
  """Raises a RequestError if a request names another model."""
  name = found.get("model", served.name)
  if name != served.name:
    raise RequestError(
      f"model={name[:80]!r}: there is no such model; the one served is {served.name!r}",
      param="model",
      status=404,
      code="model_not_found",
    )


def _writes_nothing() -> RequestError:
  return RequestError("this model writes no text: it gives embeddings; use /v1/embeddings")


def _prompts(name: str, value: Any, served: Served) -> list[list[int]]:
  """The prompts of a completion as ids: a string, ids, or an array of one of these."""
  assert served.prompts is not None
  several = value if isinstance(value, list) and value and _is_list_of(value) else [value]
  fields.items(name, several, 1, served.most_choices)
  out = []
  for i, one in enumerate(several):
    where = f"{name}[{i}]" if several is value else name
    if isinstance(one, list):
      ids = fields.items(where, one)
      for j, each in enumerate(ids):
        if isinstance(each, bool) or not isinstance(each, int):
          raise fields.refuse(f"{where}[{j}]", each, "not a token id; give integers, or a string")
        if not 0 <= each < served.vocab_size:
          raise fields.refuse(
            f"{where}[{j}]", each, f"token ids are from 0 to {served.vocab_size - 1:,}"
          )
      out.append(list(ids))
    else:
      try:
        out.append(served.prompts.text(fields.text(where, one)))
      except UserError as e:
        raise RequestError(f"{where}: {e}", param=name) from None
  return out


def _is_list_of(values: Sequence[Any]) -> bool:
  """Whether a list holds prompts, and is not one prompt of token ids."""
  return any(isinstance(value, str | list) for value in values)


def _call(
  chat: bool,
  prompts: Sequence[Sequence[int]],
  found: Mapping[str, Any],
  served: Served,
  logprobs: int | None,
  limit: int,
  choices: int,
  name: str,
) -> Call:
  if found.get("stream_options") is not None and not found.get("stream"):
    raise RequestError(
      "stream_options: there is no stream; add stream=true, or leave it out", param="stream_options"
    )
  if choices * len(prompts) > served.most_choices:
    raise RequestError(
      f"{choices} choices of {len(prompts)} prompts are more than the {served.most_choices} that "
      "this server queues; send fewer at once",
      param="n",
    )
  sampling = served.defaults._replace(
    **{key: found[key] for key in Sampling._fields if key in found}
  )
  sampling = sampling._replace(top_k=min(sampling.top_k, served.vocab_size))
  seed = found["seed"] if "seed" in found else secrets.randbelow(_SEEDS)
  form, constraint = formats.of(found)
  requests = []
  for i, prompt in enumerate(prompts):
    room = served.context - len(prompt)
    if room < 1:
      raise RequestError(
        f"{name}: it has {len(prompt):,} tokens, the context here {served.context:,}, and the "
        f"answer needs at least one; shorten it by {1 - room:,} or more",
        param=name,
        code="context_length_exceeded",
      )
    for j in range(choices):
      request = Request(
        prompt=tuple(prompt),
        max_new=min(limit, room),
        sampling=sampling,
        seed=_seed(seed, i * choices + j),
        stop=found.get("stop", ()),
        logprobs=logprobs,
        constraint=constraint,
      )
      requests.append(request)
    _check(served, dataclasses.replace(requests[-1], constraint=None), name)
    if form:
      _check(served, requests[-1], form)
  return Call(
    chat=chat,
    requests=tuple(requests),
    prompt_tokens=sum(map(len, prompts)),
    stream=bool(found.get("stream")),
    usage=bool(found.get("stream_options")),
    logprobs=found.get("logprobs", False) is not False,  # 0: those of the drawn tokens alone
    prompts=len(prompts),
    keep=found.get("n", 1),
  )


def _check(served: Served, request: Request, name: str) -> None:
  """Raises a RequestError that names a field if the engine cannot run a request."""
  try:
    served.check(request)
  except UserError as e:
    raise RequestError(f"{name}: {e}", param=name) from None


def _seed(seed: int, choice: int) -> int:
  """The seed of a choice. That of the first is the request's, so that it equals a single one."""
  if choice:
    return zlib.crc32(f"{seed}/{choice}".encode()) % _SEEDS
  return seed % _SEEDS


class Inputs(NamedTuple):
  """A request for embeddings: its texts, and whether they are sent as base64."""

  texts: tuple[str, ...]
  base64: bool


def read_embeddings(body: Mapping[str, Any], served: Served, most: int) -> Inputs:
  """The texts in the body of a request for embeddings, at most `most`.

  Raises:
    RequestError: See `read_completion`.
  """
  found = fields.read(
    body,
    {
      "input": lambda name, value: value,
      "model": fields.text,
      "encoding_format": fields.choice("float", "base64"),
      "dimensions": fields.unsupported("embeddings keep the model's width"),
      "user": fields.label,
    },
  )
  check_model(found, served)
  if served.embed is None:
    raise RequestError(
      "this model gives no embeddings: it writes text; serve a run trained with "
      "objective.name='contrastive', or an imported encoder"
    )
  if "input" not in found:
    raise RequestError("input: it is missing; give a string", param="input")
  value = found["input"]
  several = value if isinstance(value, list) else [value]
  fields.items("input", several, 1, most)
  texts = []
  for i, one in enumerate(several):
    where = f"input[{i}]" if several is value else "input"
    if not isinstance(one, str):
      raise fields.refuse(where, one, "not a string; token ids are not supported, give texts")
    if not fields.text(where, one).strip():
      raise fields.refuse(where, one, "no text but white space; leave it out")
    texts.append(one)
  return Inputs(tuple(texts), found.get("encoding_format") == "base64")
