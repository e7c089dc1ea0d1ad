"""The server with a real engine and a tiny model: in this process, and as the command runs it."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys

import jax
import openai
import pytest

from jaxgpt import config
from jaxgpt.commands import main
from jaxgpt.commands.actions import serve as serve_action
from jaxgpt.commands.serve import ServeOptions
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.engine import engine as engine_lib
from jaxgpt.inference.engine.requests import Request
from jaxgpt.inference.sampling import Sampling
from jaxgpt.inference.server import calls, fields, served
from jaxgpt.model import transformer
from jaxgpt.run import generation
from jaxgpt.tasks import api
from jaxgpt.text.tokenizers.base import ByteTokenizer
from tests.golden import cases
from tests.inference.server.conftest import Running


def tiny_config(**model):
  c = config.base()
  shape = dict(num_layers=1, width=32, num_heads=2, norm="rmsnorm", position="rotary", init_std=0.3)
  c.model.update(shape | model)
  c.data.update(dict(seq_len=96, batch_size=8))
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c


def run_of(c):
  """A run of random weights on one device, without a folder."""
  tokenizer = ByteTokenizer()
  c = config.resolve(c, tokenizer.vocab_size)
  mesh, parts = load.place(c, jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = jax.jit(lambda: transformer.init(parts.model, jax.random.key(0)))()
  ends = generation.Generation({"eos_token_id": [tokenizer.eos_id]}, "in the format", "simple")
  return load.Run(c, parts, mesh, params, 3, tokenizer, "", ends)


@pytest.fixture(scope="module")
def real():
  """(a running server, its run, an engine apart from the server's)."""
  run = run_of(tiny_config())
  engine = engine_lib.Engine(run, max_rows=3, block_size=8)
  model = served.writes(
    run, "tiny", served.Prompts(run), Sampling(temperature=0.7), engine.limits, 72
  )
  server = Running(engine, model=model)
  yield server, run, engine_lib.Engine(run, max_rows=3, block_size=8)
  server.end()


def alone(engine, request):
  """A request's text without company."""
  return "".join(piece.text for piece in engine.run([request]))


def test_many_clients_get_the_texts_that_each_gets_alone(real):
  server, run, engine = real
  client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
  prompts = [f"{'the cat ' * (i % 4)}{i}" for i in range(9)]
  encode = served.Prompts(run).text
  want = [
    alone(engine, Request(tuple(encode(p)), 12, Sampling(temperature=0.7), seed=i))
    for i, p in enumerate(prompts)
  ]

  def ask(i):
    options = dict(model="tiny", prompt=prompts[i], max_tokens=12, seed=i)
    if i % 2:
      return client.completions.create(**options).choices[0].text
    return "".join(
      c.choices[0].text for c in client.completions.create(**options, stream=True) if c.choices
    )

  with concurrent.futures.ThreadPoolExecutor(9) as pool:
    assert list(pool.map(ask, range(9))) == want
  assert len(set(want)) == 9


def test_a_chat_with_log_probabilities(real):
  server, run, engine = real
  client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
  message = {"role": "user", "content": "hi <|end|>"}
  out = client.chat.completions.create(
    model="tiny", messages=[message], temperature=0, max_tokens=10, logprobs=True, top_logprobs=3
  )
  (choice,) = out.choices
  prompt = tuple(served.Prompts(run).chat([message]))
  assert choice.message.content == alone(engine, Request(prompt, 10, Sampling(temperature=0.0)))
  assert out.usage.prompt_tokens == len(prompt)
  for entry in choice.logprobs.content:  # greedy: each token is the likeliest
    assert entry.top_logprobs[0].token == entry.token
    assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)
    assert entry.logprob >= entry.top_logprobs[1].logprob


def test_the_fingerprint_is_that_of_the_step_and_the_config(real):
  _, run, engine = real
  other = run._replace(step=4), run._replace(c=config.resolve(tiny_config(num_layers=2), 300))
  found = [
    served.writes(each, "tiny", served.Prompts(each), Sampling(), engine.limits, 72).fingerprint
    for each in (run, run, *other)
  ]
  assert found[0] == found[1] and len(set(found)) == 3


def test_a_cache_that_is_smaller_than_the_context_is_the_context(real):
  _, run, _ = real
  engine = engine_lib.Engine(run._replace(params=None), max_rows=3, block_size=8, cache_tokens=40)
  model = served.writes(run, "tiny", served.Prompts(run), Sampling(), engine.limits, 72)
  hi = [{"role": "user", "content": "hi"}]
  (request,) = calls.read_chat({"messages": hi}, model).requests
  assert len(request.prompt) + request.max_new == 41, "the last token does not enter the cache"
  (request,) = calls.read_completion({"prompt": "a", "max_tokens": 1000}, model).requests
  assert len(request.prompt) + request.max_new == 41
  with pytest.raises(fields.RequestError, match="the context here 41"):
    calls.read_completion({"prompt": "a" * 50}, model)


def test_an_answer_of_a_prescribed_form(real):
  pytest.importorskip("llguidance", reason="needs the extra [guided]")
  client = openai.OpenAI(base_url=f"{real[0].url}/v1", api_key="none")
  fields = {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}
  schema = {"type": "object", "properties": fields, "required": ["a", "b"]}
  ask = lambda schema: client.chat.completions.create(
    model="tiny",
    messages=[{"role": "user", "content": "hi"}],
    max_tokens=50,
    response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
  )
  (choice,) = ask(schema | {"additionalProperties": False}).choices
  value = json.loads(choice.message.content)
  assert choice.finish_reason == "stop" and value["a"] in (1, 2) and value["b"] in (True, False)
  with pytest.raises(openai.BadRequestError, match="strnig") as e:
    ask({"type": "strnig"})
  assert e.value.param == "response_format"


def test_the_text_of_a_token(real):
  text = served.token_text(ByteTokenizer())
  assert text(3 + ord("x")) == "x" and text(2) == "</s>" and text(3 + 0xC3) == "�"


def test_embeddings_are_those_of_predict(serve, monkeypatch):
  c = tiny_config(causal=False, head="none", pooling="mean")
  c.objective.name = "contrastive"
  run = run_of(c)
  monkeypatch.setattr(serve_action.run_folder, "read_config", lambda folder: run.c)
  monkeypatch.setattr(serve_action.load, "load", lambda *args: run)
  model, worker = serve_action.model_of(ServeOptions(workdir="anywhere"), "vectors")
  assert worker is None
  server = serve(model=model)
  client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
  out = client.embeddings.create(model="vectors", input=["a cat", "the mat"])
  want = api.Model(run).predict(["a cat", "the mat"])
  for got, row in zip(out.data, want, strict=True):
    assert got.embedding == pytest.approx(row["embedding"], abs=1e-6)
  assert out.usage.prompt_tokens == 12


def test_a_missing_extra_is_named(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  assert main.main(["serve", "--workdir=anywhere"]) == 2
  assert "needs uvicorn" in (message := capsys.readouterr().err)
  assert "pip install 'jaxgpt[serve]'" in message and message.count("\n") == 1


@pytest.fixture
def folder(tmp_path):
  """The folder of an old run, with the template of a chat."""
  cases.unpack("run_adamw", tmp_path)
  (found,) = (tmp_path / "runs").iterdir()
  template = generation.Generation({"eos_token_id": [2]}, "in the format", "simple")
  generation.write(found, template)
  return found.rename(tmp_path / "talk")


def environment():
  """One device, and the programs that earlier runs of the tests have compiled."""
  found = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  found["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
  flags = [flag for flag in found.pop("XLA_FLAGS").split() if "device_count" not in flag]
  return found | {"XLA_FLAGS": " ".join(flags)}


@pytest.mark.slow
def test_the_commands(folder):
  """The server and the terminal give the same greedy answer; SIGTERM ends the server well."""
  command = [sys.executable, "-m", "jaxgpt"]
  options = [f"--workdir={folder}", "--port=0", "--api-key=k"]
  server = subprocess.Popen(
    [*command, "serve", *options],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment(),
  )
  chat = subprocess.run(
    [*command, "chat", f"--workdir={folder}", "--temperature=0", "--max-new=8"],
    input="7\n/nothing\n",
    capture_output=True,
    text=True,
    env=environment(),
    timeout=300,
  )
  assert chat.returncode == 0, chat.stderr
  assert "there is no command /nothing" in chat.stderr and "[8 tokens" in chat.stderr
  try:
    line = server.stdout.readline()
    assert line.startswith("serving talk at http://127.0.0.1:"), line + server.stderr.read()
    client = openai.OpenAI(base_url=f"{line.split()[-1]}/v1", api_key="k", max_retries=0)
    out = client.chat.completions.create(
      model="talk", messages=[{"role": "user", "content": "7"}], temperature=0, max_tokens=8
    )
    assert f"{out.choices[0].message.content}\n" == chat.stdout
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
    assert "stopping" in server.stderr.read()
  finally:
    server.kill()


def test_the_key_of_the_command(tmp_path, monkeypatch):
  monkeypatch.delenv("JAXGPT_API_KEY", raising=False)
  (tmp_path / "key").write_text("s3cret\n")
  assert serve_action.api_key(f"@{tmp_path}/key") == "s3cret"
  assert serve_action.api_key("k") == "k" and serve_action.api_key("") == ""
  monkeypatch.setenv("JAXGPT_API_KEY", "env")
  assert serve_action.api_key("") == "env" and serve_action.api_key("k") == "k"
  (tmp_path / "empty").write_text("\n")
  for bad in (f"@{tmp_path}/none", f"@{tmp_path}/empty", "a b", "kéy"):
    with pytest.raises(UserError, match="--api-key"):
      serve_action.api_key(bad)


def test_names_of_hosts_and_of_the_model(monkeypatch, tmp_path):
  assert serve_action.hosts_of("127.0.0.1", ()) == ("localhost", "127.0.0.1", "::1")
  assert serve_action.hosts_of("0.0.0.0", ()) == ()
  assert "models.lan" in serve_action.hosts_of("127.0.0.1", ("Models.lan",))
  monkeypatch.chdir(tmp_path)
  assert serve_action.name_of("runs/chat/run") == serve_action.name_of("runs/chat/") == "chat"
