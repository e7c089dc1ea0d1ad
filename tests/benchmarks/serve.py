"""`jaxgpt serve` under clients that come, cancel, vanish and read slowly.

  python tests/benchmarks/serve.py [--seconds=300] [--clients=64] [--workdir=RUN]

Each client asks for one of a few texts, whose answers were drawn before, by a client alone. So an
answer that was lost, cut or mixed up with another is noticed. Of 20 answers, 14 are read to their
end, 2 are cancelled by OpenAI's client, 2 end with a connection that breaks off, 2 are read slowly.
At the end the server gets a SIGTERM while all clients wait, and has to finish their answers.

Server and clients share the machine. Without --workdir a small model of random weights is served.
"""

import argparse
import asyncio
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import openai

ROOT = pathlib.Path(__file__).parents[2]
WAYS = ("whole",) * 14 + ("cancelled",) * 2 + ("broken off",) * 2 + ("slow",) * 2
TEXTS = 24  # different requests
TOKENS = 32  # of a text
CONFIG = """from jaxgpt import config

def get_config():
  c = config.base()
  c.model.update(dict(num_layers=4, width=256, num_heads=4, norm="rmsnorm", position="rotary"))
  c.data.update(dict(seq_len=256, batch_size=4))
  c.train.steps = 1
  c.schedule.warmup_steps = 1
  return c
"""


def command(*words: str) -> list[str]:
  return [sys.executable, "-m", "jaxgpt", *words]


def make_run(folder: pathlib.Path) -> pathlib.Path:
  """A run of a small model after one step."""
  (folder / "c.py").write_text(CONFIG)
  data = f"{folder}/data"
  quiet = dict(check=True, capture_output=True, cwd=ROOT)
  subprocess.run(command("data", "docs", f"--out={data}", "--tokenizer=bytes"), **quiet)
  options = (f"--config={folder}/c.py", f"--config.data.path={data}", f"--workdir={folder}/run")
  subprocess.run(command("train", *options), **quiet)
  return folder / "run"


class Server:
  """A server as a process: its address, its memory and its threads."""

  def __init__(self, workdir: pathlib.Path, rows: int, queue: int):
    words = ("serve", f"--workdir={workdir}", "--port=0", f"--rows={rows}", f"--queue={queue}")
    self.process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    self.url = self.process.stdout.readline().split()[-1]
    self.port = int(self.url.rpartition(":")[2])

  def size(self) -> tuple[float, int]:
    """(MiB in memory, threads)."""
    status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    return int(found["VmRSS"].split()[0]) / 1024, int(found["Threads"])


class Load:
  """The clients and what they saw."""

  def __init__(self, server: Server):
    self.client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=8)
    self.server, self.want = server, dict[int, str]()
    self.counts = collections.Counter[str]()
    self.first, self.gaps, self.wrong = list[float](), list[float](), list[str]()
    self.sizes = list[tuple[float, int]]()

  def request(self, i: int) -> dict:
    model = getattr(self, "model", None)
    prompt = f"text {i}: " + "the config " * (i % 7)
    return dict(model=model, prompt=prompt, max_tokens=TOKENS, seed=i, temperature=0.9)

  async def prepare(self) -> None:
    """Draws each text alone."""
    self.model = (await self.client.models.list()).data[0].id
    for i in range(TEXTS):
      out = await self.client.completions.create(**self.request(i))
      self.want[i] = out.choices[0].text

  async def one(self, i: int, way: str) -> None:
    if way == "broken off":
      await self._break_off(i)
    else:
      begin = last = time.monotonic()
      text, finish, chunks = "", None, 0
      stream = await self.client.completions.create(**self.request(i), stream=True)
      async for chunk in stream:
        now = time.monotonic()
        if chunk.choices and chunk.choices[0].text:
          (self.gaps if chunks else self.first).append(now - (last if chunks else begin))
          last, chunks = now, chunks + 1
          text += chunk.choices[0].text
          if way == "slow":
            await asyncio.sleep(0.2)
            last = time.monotonic()
        finish = chunk.choices[0].finish_reason or finish
        if way == "cancelled" and chunks == 3:
          await stream.close()
          break
      self._check(i, way, text, finish)
    self.counts[way] += 1

  def _check(self, i: int, way: str, text: str, finish: str | None) -> None:
    want = self.want[i]
    whole = way != "cancelled" or finish
    if (text != want or not finish) if whole else not want.startswith(text):
      self.wrong.append(f"{way}: text {i} is {text!r} ({finish}), not {want!r}")

  async def _break_off(self, i: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
    body = json.dumps(self.request(i) | {"stream": True}).encode()
    writer.write(
      b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    await reader.read(random.choice((1, 400, 2000)))
    writer.transport.abort()

  async def run(self, seconds: float, clients: int) -> None:
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
      draw = random.Random(number)
      while time.monotonic() < end:
        await self.one(draw.randrange(TEXTS), draw.choice(WAYS))

    async def watch() -> None:
      while True:
        self.sizes.append(self.server.size())
        await asyncio.sleep(max(seconds / 60, 0.5))

    watching = asyncio.create_task(watch())
    await asyncio.gather(*map(client, range(clients)))
    watching.cancel()
    # The end: each client has an answer that has begun.
    begun = [
      await self.client.completions.create(**self.request(i % TEXTS), stream=True)
      for i in range(clients)
    ]
    self.server.process.send_signal(signal.SIGTERM)
    for i, stream in enumerate(begun):
      text, finish = "", None
      async for chunk in stream:
        text += chunk.choices[0].text
        finish = chunk.choices[0].finish_reason or finish
      self._check(i % TEXTS, "at the end", text, finish)


def percentiles(values: list[float]) -> str:
  return "  ".join(f"p{p} {1000 * np.percentile(values, p):,.0f} ms" for p in (50, 99))


async def main(server: Server, seconds: float, clients: int) -> int:
  load = Load(server)
  await load.prepare()
  begin = time.monotonic()
  await load.run(seconds, clients)
  elapsed = time.monotonic() - begin
  code = server.process.wait(60)
  counts = ", ".join(f"{n:,} {way}" for way, n in load.counts.most_common())
  print(f"{clients} clients, {elapsed:.0f} s: {counts}")
  print(f"first token: {percentiles(load.first)}   between tokens: {percentiles(load.gaps)}")
  print(f"{len(load.first + load.gaps) / elapsed:,.0f} chunks a second read by clients")
  early, late = load.sizes[len(load.sizes) // 4], load.sizes[-1]
  print(f"memory after a quarter {early[0]:,.0f} MiB, at the end {late[0]:,.0f} MiB")
  print(f"threads after a quarter {early[1]}, at the end {late[1]}")
  print(f"lost, cut or mixed-up answers: {len(load.wrong)}; exit code after SIGTERM: {code}")
  for line in load.wrong[:5]:
    print(f"  {line[:300]}")
  grown = late[0] > 1.05 * early[0] + 20 or late[1] > early[1]
  return int(bool(load.wrong) or code != 0 or grown)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--seconds", type=float, default=300.0)
  parser.add_argument("--clients", type=int, default=64)
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--workdir", type=pathlib.Path)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    run = args.workdir or make_run(pathlib.Path(folder))
    server = Server(run.absolute(), args.rows, 2 * args.clients)
    try:
      exit_code = asyncio.run(main(server, args.seconds, args.clients))
    finally:
      server.process.kill()
  sys.exit(exit_code)
