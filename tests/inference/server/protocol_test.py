"""OpenAI's client against the server: texts, streams, choices, log-probabilities, embeddings."""

import base64
import json
import struct

import openai
import pytest

from jaxgpt.inference.engine.requests import Constraint
from tests.inference.server import fake


@pytest.fixture(scope="module")
def client(server):
  return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def said(text, role="user"):
  return [{"role": role, "content": text}]


def want(prompt, seed=0):
  return "".join(fake.script(prompt.encode(), seed))


def last(server):
  return server.engine.requests[-1]


def test_models(client, server):
  (model,) = client.models.list().data
  assert model.id == "fake" and client.models.retrieve("fake").id == "fake"
  assert model.jaxgpt["chats"] and model.jaxgpt["sampling"]["temperature"] == 0.8
  with pytest.raises(openai.NotFoundError, match="the one served is 'fake'"):
    client.models.retrieve("gpt-4")


def test_a_whole_answer(client):
  out = client.chat.completions.create(model="fake", messages=said("hello"))
  assert out.choices[0].message.content == want("user: hello")
  assert out.choices[0].message.role == "assistant"
  assert out.choices[0].finish_reason == "stop" and out.object == "chat.completion"
  assert (out.usage.prompt_tokens, out.usage.completion_tokens) == (len("user: hello"), 8)


def test_a_streamed_answer(client):
  stream = client.chat.completions.create(
    model="fake", messages=said("hello"), stream=True, stream_options={"include_usage": True}
  )
  chunks = list(stream)
  assert len({chunk.id for chunk in chunks}) == 1
  assert chunks[0].choices[0].delta.role == "assistant"
  deltas = [c.choices[0].delta.content or "" for c in chunks[:-1]]
  assert "".join(deltas) == want("user: hello")
  assert chunks[-2].choices[0].finish_reason == "stop"
  assert [c.choices[0].finish_reason for c in chunks[:-2]] == [None] * (len(chunks) - 2)
  assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
  assert all(chunk.usage is None for chunk in chunks[:-1])


def test_without_usage_a_stream_has_none(client):
  stream = client.chat.completions.create(model="fake", messages=said("hello"), stream=True)
  assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_completions_of_several_prompts(client):
  out = client.completions.create(model="fake", prompt=["one", [116, 119, 111]], n=2, max_tokens=99)
  assert [c.text for c in out.choices] == [want("one"), want("one"), want("two"), want("two")]
  assert [c.index for c in out.choices] == [0, 1, 2, 3]
  assert out.usage.prompt_tokens == 6 and out.usage.completion_tokens == 32


def test_choices_of_a_stream_keep_apart(client):
  texts = ["", "", "", ""]
  finish = [None] * 4
  for chunk in client.completions.create(model="fake", prompt=["one", "two"], n=2, stream=True):
    for choice in chunk.choices:
      texts[choice.index] += choice.text
      finish[choice.index] = choice.finish_reason or finish[choice.index]
  assert texts == [want("one"), want("one"), want("two"), want("two")]
  assert finish == ["stop"] * 4


def test_seeds(client, server):
  def draw(**options):
    out = client.completions.create(model="fake", prompt="seeded", **options)
    return [choice.text for choice in out.choices]

  assert draw(seed=5) == draw(seed=5) == [want("seeded", 5)]
  two = draw(seed=5, n=2)
  assert two[0] == want("seeded", 5) and two[1] not in (two[0], want("seeded", 6))
  assert two == draw(seed=5, n=2), "choices of the same request have the same seeds again"
  assert draw() != draw(), "without a seed each request draws differently"
  assert draw(seed=-1) == draw(seed=2**31 - 1)


def test_sampling_settings_reach_the_engine(client, server):
  extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
  client.completions.create(
    model="fake",
    prompt="p",
    temperature=0.3,
    top_p=0.9,
    max_tokens=5,
    stop=["zzz", "yyy"],
    extra_body=extra,
  )
  request = last(server)
  found = request.sampling
  assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.3, 0.9, 7, 0.1)
  assert found.repetition_penalty == 1.2
  assert request.stop == ("zzz", "yyy") and request.max_new == 5 and request.logprobs is None


def test_defaults(client, server):
  client.completions.create(model="fake", prompt="p")
  assert last(server).max_new == 16 and last(server).sampling.temperature == 0.8
  client.chat.completions.create(model="fake", messages=said("p"))
  assert last(server).max_new == fake.CONTEXT - len("user: p"), "an answer may fill the context"
  client.chat.completions.create(model="fake", messages=said("p"), max_tokens=10**6)
  assert last(server).max_new == fake.CONTEXT - len("user: p")


def test_a_stop_string_and_a_limit_end_a_text(client):
  (choice,) = client.completions.create(model="fake", prompt="one", stop=".3").choices
  assert choice.text == want("one")[: want("one").index(".3")] and choice.finish_reason == "stop"
  (choice,) = client.completions.create(model="fake", prompt="one", max_tokens=2).choices
  assert choice.text == "".join(fake.script(b"one")[:2]) and choice.finish_reason == "length"


def test_log_probabilities_of_a_chat(client):
  out = client.chat.completions.create(
    model="fake", messages=said("hello"), logprobs=True, top_logprobs=2
  )
  found = out.choices[0].logprobs.content
  assert [entry.token for entry in found] == fake.script(b"user: hello")
  assert bytes(b for entry in found for b in entry.bytes).decode() == want("user: hello")
  assert found[1].logprob == -0.51 and [t.token for t in found[1].top_logprobs] == [
    "<65>",
    found[1].token,
  ]
  plain = client.chat.completions.create(model="fake", messages=said("hello"))
  assert plain.choices[0].logprobs is None


def test_log_probabilities_of_a_streamed_completion(client):
  parts = [
    chunk.choices[0]
    for chunk in client.completions.create(model="fake", prompt="one", logprobs=2, stream=True)
  ]
  found = [part.logprobs for part in parts if part.logprobs]
  text = "".join(part.text for part in parts)
  for part in found:
    for token, offset in zip(part.tokens, part.text_offset, strict=True):
      assert text[offset:].startswith(token)
  assert sum(len(part.tokens) for part in found) == 8


@pytest.mark.parametrize("most", [0, 1, 2])
def test_log_probabilities_of_a_completion_are_those_of_the_drawn_token_too(client, most):
  out = client.completions.create(model="fake", prompt="one", logprobs=most, max_tokens=2)
  found = out.choices[0].logprobs
  assert found.tokens == fake.script(b"one")[:2] and found.token_logprobs == [-0.5, -0.51]
  others = {"<65>": -0.5} if most else {}  # the second of two is the drawn one
  assert found.top_logprobs[0] == {**others, found.tokens[0]: -0.5}
  (streamed,) = [
    chunk.choices[0].logprobs
    for chunk in client.completions.create(
      model="fake", prompt="one", logprobs=most, max_tokens=1, stream=True
    )
  ]
  assert streamed.top_logprobs == found.top_logprobs[:1]


class Impossible(fake.FakeEngine):
  """Draws tokens of probability 0."""

  def _piece(self, *row):
    found = super()._piece(*row)
    return found._replace(tokens=tuple(t._replace(logprob=float("-inf")) for t in found.tokens))


def test_a_log_probability_that_is_no_number_of_json_is_null(serve):
  server = serve(Impossible())
  client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
  ask = dict(model="fake", prompt="é", logprobs=0, max_tokens=1)
  whole = client.completions.create(**ask).choices[0]
  (streamed,) = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
  assert whole.text == streamed.text == fake.script("é".encode())[0]
  assert whole.logprobs.token_logprobs == streamed.logprobs.token_logprobs == [None]


def test_the_best_of_several(client, server):
  out = client.completions.create(model="fake", prompt="seeded", best_of=3, n=2, seed=1)
  drawn = sorted((request.seed % 7, request.seed) for request in server.engine.requests[-3:])
  assert len({least for least, _ in drawn}) == 3, "choose another seed: the choices must differ"
  assert [c.text for c in out.choices] == [want("seeded", seed) for _, seed in drawn[:2]]
  assert [c.index for c in out.choices] == [0, 1] and out.usage.completion_tokens == 24
  assert out.choices[0].logprobs is None


def test_messages_reach_the_template(client, server):
  messages = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {
      "role": "assistant",
      "content": None,
      "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
      ],
    },
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
  ]
  tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
  client.chat.completions.create(model="fake", messages=messages, tools=[tool], tool_choice="auto")
  got = bytes(last(server).prompt).decode()
  assert got == "system: be brief\nuser: ab\nassistant: None\ntool: 2\ntools: 1"
  client.chat.completions.create(model="fake", messages=messages, tools=[tool], tool_choice="none")
  assert "tools" not in bytes(last(server).prompt).decode()
  more = {"chat_template_kwargs": {"enable_thinking": False}}
  client.chat.completions.create(model="fake", messages=messages, extra_body=more)
  assert "variables: [('enable_thinking', False)]" in bytes(last(server).prompt).decode()


FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}


@pytest.mark.parametrize(
  "fields, want",
  [
    (dict(response_format={"type": "text"}), None),
    (dict(response_format={"type": "json_object"}), Constraint.of_schema({"type": "object"})),
    (dict(response_format=FORM), Constraint.of_schema({"type": "null"})),
    (dict(extra_body={"guided_json": {"type": "null"}}), Constraint.of_schema({"type": "null"})),
    (dict(extra_body={"guided_regex": "[ab]+"}), Constraint.of_regex("[ab]+")),
    (dict(extra_body={"guided_choice": ["a", "b"]}), Constraint.of_choices(["a", "b"])),
  ],
)
def test_the_form_of_an_answer_reaches_the_engine(client, server, fields, want):
  client.chat.completions.create(model="fake", messages=said("p"), **fields)
  assert last(server).constraint == want


def test_fields_without_an_effect_and_nulls_are_taken(client):
  body = {"top_k": None, "logit_bias": {}, "store": False, "metadata": {"a": "b"}}
  client.chat.completions.create(
    model="fake", messages=said("p"), user="me", n=1, stop=None, extra_body=body
  )


def test_errors_of_the_engine(client):
  with pytest.raises(openai.BadRequestError, match="the engine refuses this request"):
    client.completions.create(model="fake", prompt="forbidden")
  for prompt, why in (("fails", "no block is free"), ("refused late", "after all")):
    with pytest.raises(openai.InternalServerError, match=why):
      client.completions.create(model="fake", prompt=prompt)
    with pytest.raises(openai.APIError, match=why):
      list(client.completions.create(model="fake", prompt=prompt, stream=True))


def test_embeddings(serve):
  def embed(texts):
    return [[float(len(text)), 0.25] for text in texts], sum(map(len, texts))

  server = serve(writes=False, embed=embed)
  client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
  out = client.embeddings.create(model="fake", input=["a", "bcd"])  # base64 by the client's default
  assert [e.embedding for e in out.data] == [[1.0, 0.25], [3.0, 0.25]]
  assert [e.index for e in out.data] == [0, 1] and out.usage.prompt_tokens == 4
  plain = client.embeddings.create(model="fake", input="a", encoding_format="float")
  assert plain.data[0].embedding == [1.0, 0.25]
  raw = client.embeddings.with_raw_response.create(
    model="fake", input="a", encoding_format="base64"
  )
  packed = json.loads(raw.text)["data"][0]["embedding"]
  assert struct.unpack("<2f", base64.b64decode(packed)) == (1.0, 0.25)
  with pytest.raises(openai.BadRequestError, match="writes no text"):
    client.completions.create(model="fake", prompt="a")


def test_a_model_without_a_template_says_where_to_go(serve):
  server = serve(chats=False)
  client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
  with pytest.raises(openai.BadRequestError, match="/v1/completions"):
    client.chat.completions.create(model="fake", messages=said("hello"))
