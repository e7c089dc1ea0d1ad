"""Text to tokens: speed next to Hugging Face tokenizers, and memory as the input grows.

  python tests/benchmarks/prepare.py [megabytes[,megabytes...]] [options of `jaxgpt data`]

The text is this machine's own (sources, documentation), repeated with other words, as JSON Lines.
A smaller corpus is the beginning of a larger one. Memory is the proportional share (PSS) of all
processes, sampled ten times a second. `jaxgpt data` does the whole job: it reads, hashes, splits,
trains a tokenizer, tokenizes, writes shards, digests and the card. Its peer trains a BPE of the
same size on a sample of the same length and then only calls `encode_batch`, on all cores, on
texts that are in memory already.
"""

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time

import tokenizers

VOCAB = 32_000
SAMPLE = 4_000_000
FILE_BYTES = 48_000_000
TEXT_BYTES = 200_000_000  # of this machine; a larger corpus repeats them with other words
SAMPLE_SECONDS = 0.1
BATCH_CHARS = 4_000_000
SUFFIXES = (".py", ".pyi", ".txt", ".md", ".rst", "METADATA")


def machine_texts(limit):
  """Yields texts of this machine, up to `limit` bytes."""
  total = 0
  roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc"]
  for root in roots:
    for path in sorted(pathlib.Path(root).rglob("*")):
      if not path.name.endswith(SUFFIXES) or not path.is_file():
        continue
      try:
        text = path.read_text(encoding="utf-8")
      except (OSError, UnicodeDecodeError):
        continue
      if 200 < len(text) < 100_000:
        yield text
        total += len(text)
      if total > limit:
        return


def write_corpus(folder, size):
  """Writes `size` bytes of JSON Lines. Repetitions have a tenth of the words changed."""
  texts = list(machine_texts(TEXT_BYTES))
  draw, written, number, out = random.Random(0), 0, 0, None
  draw.shuffle(texts)
  round_ = 0
  while written < size:
    for text in texts:
      if round_:
        text = re.sub(r"[a-z]{4,}", lambda m: m[0] if draw.random() > 0.1 else m[0][::-1], text)
      line = json.dumps({"text": text}) + "\n"
      if out is None or out.tell() > FILE_BYTES:
        out = (folder / f"{number:03}.jsonl").open("w", encoding="utf-8")
        number += 1
      out.write(line)
      written += len(line)
      if written > size:
        break
    round_ += 1
  out.close()


def run_ours(corpus, out, more):
  """Runs `jaxgpt data`: (manifest, seconds, `Memory`)."""
  start = time.perf_counter()
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "jaxgpt",
      "data",
      str(corpus),
      f"--out={out}",
      f"--tokenizer=sentencepiece:{VOCAB}",
      f"--sample-bytes={SAMPLE}",
      *more,
    ]
  )
  memory = Memory(process.pid)
  while process.poll() is None:
    memory.look()
    time.sleep(SAMPLE_SECONDS)
  assert process.returncode == 0
  seconds = time.perf_counter() - start
  return json.loads((out / "manifest.json").read_text()), seconds, memory


class Memory:
  """Peak memory of a process and its descendants. Shared pages count once (PSS).

  Attributes:
    peak: bytes of all of them together.
    by_kind: {kind: bytes of one process}; a worker is a child of the server that forks workers.
  """

  def __init__(self, pid):
    self._pid, self._kinds = pid, {pid: "command"}
    self.peak, self.by_kind = 0, {}

  def look(self):
    total, waiting = 0, [(self._pid, None)]
    while waiting:
      pid, parent = waiting.pop()
      try:
        kind = self._kinds.get(pid) or self._kind(pid, parent)
        rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
        size = int(re.search(r"^Pss: +([0-9]+) kB", rollup, re.M)[1]) * 1024
        waiting += [
          (int(child), pid)
          for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children")
          for child in path.read_text().split()
        ]
      except (OSError, TypeError):  # it has ended in the meantime
        continue
      total += size
      self.by_kind[kind] = max(self.by_kind.get(kind, 0), size)
    self.peak = max(self.peak, total)

  def _kind(self, pid, parent):
    command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    if parent != self._pid:
      kind = "worker"
    elif b"resource_tracker" in command:
      kind = "tracker"
    elif b"forkserver" in command:
      kind = "server"
    else:  # forked: holds the queue of datatrove's executor
      kind = "manager"
    self._kinds[pid] = kind
    return kind


def run_peer(corpus):
  """Runs Hugging Face tokenizers: (tokens, seconds to encode)."""
  paths = sorted(corpus.glob("*.jsonl"))

  def texts():
    for path in paths:
      with path.open(encoding="utf-8") as lines:
        for line in lines:
          yield json.loads(line)["text"]

  sample, held = [], 0
  for text in texts():
    sample.append(text)
    held += len(text)
    if held > SAMPLE:
      break
  peer = tokenizers.ByteLevelBPETokenizer()
  peer.train_from_iterator(sample, vocab_size=VOCAB, show_progress=False)
  tokens, seconds, batch, chars = 0, 0.0, [], 0

  def encode():
    start = time.perf_counter()
    count = sum(len(e.ids) for e in peer.encode_batch(batch))
    return count, time.perf_counter() - start

  for text in texts():
    batch.append(text)
    chars += len(text)
    if chars > BATCH_CHARS:
      count, spent = encode()
      tokens, seconds, batch, chars = tokens + count, seconds + spent, [], 0
  count, spent = encode()
  return tokens + count, seconds + spent


def megabytes(count):
  return f"{count / 1e6:,.0f} MB"


def main(sizes, more):
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    for size in sizes:
      corpus = folder / f"corpus{size}"
      corpus.mkdir()
      write_corpus(corpus, size * 1_000_000)
      manifest, seconds, memory = run_ours(corpus, folder / f"out{size}", more)
      total = manifest["total"]
      print(
        f"{size} MB: {seconds:.1f} s, {total['bytes'] / seconds / 1e6:.2f} MB/s of text; memory "
        f"of all processes peaked at {megabytes(memory.peak)}; of one "
        + ", ".join(f"{kind} {megabytes(most)}" for kind, most in memory.by_kind.items()),
        flush=True,
      )
    tokens, peer_seconds = run_peer(corpus)
  size = total["bytes"] / 1e6
  print(f"{size:,.0f} MB of text, {total['documents']:,} documents, {os.cpu_count()} cores")
  print(
    f"jaxgpt data, all of it:       {seconds:7.1f} s  {size / seconds:6.2f} MB/s  "
    f"{total['tokens'] / seconds:10,.0f} tokens/s"
  )
  print(
    f"tokenizers {tokenizers.__version__}, encode_batch: {peer_seconds:7.1f} s  "
    f"{size / peer_seconds:6.2f} MB/s  {tokens / peer_seconds:10,.0f} tokens/s"
  )
  print(
    f"ratio of MB/s: {peer_seconds / seconds:.2f}; of tokens/s: "
    f"{total['tokens'] / seconds / (tokens / peer_seconds):.2f}"
  )


if __name__ == "__main__":
  main(
    [int(size) for size in (sys.argv[1] if len(sys.argv) > 1 else "100,1000").split(",")],
    sys.argv[2:],
  )
