"""Many short documents: CPU time of `jaxgpt data` next to a plain SentencePiece loop.

  python tests/benchmarks/short_documents.py [documents] [options of `jaxgpt data`]

The corpus is one JSON Lines file of this machine's own lines of text (sources, documentation), 20
to 600 characters each. Both sides use one tokenizer, which is trained before. The plain loop parses
each line, encodes its text and appends the ids to a file. `jaxgpt data` also hashes, splits, stores
and digests, and starts Python. Both run in one process, so CPU seconds (user + system) compare.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

from prepare import machine_texts  # the file next to this one

DOCUMENTS = 424_145
VOCAB = 8_000
LOOP = """
import json, sys
import numpy as np, sentencepiece
processor = sentencepiece.SentencePieceProcessor(model_file=sys.argv[2])
tokens = 0
with open(sys.argv[1], encoding="utf-8") as lines, open(sys.argv[3], "wb") as out:
  for line in lines:
    ids = processor.encode(json.loads(line)["text"])
    tokens += len(ids)
    out.write(np.array(ids, np.uint16).tobytes())
print(tokens)
"""


def write_corpus(path, count):
  """Writes `count` short documents as JSON Lines. A repeated line gets another number."""
  lines = [
    line.strip()
    for text in machine_texts(60_000_000)
    for line in text.splitlines()
    if 20 <= len(line.strip()) <= 600
  ]
  random.Random(0).shuffle(lines)
  with path.open("w", encoding="utf-8") as out:
    for number in range(count):
      text = lines[number % len(lines)]
      if number >= len(lines):
        text += f" {number // len(lines)}"
      out.write(json.dumps({"text": text}) + "\n")


def cpu_seconds(command, **options):
  """(user + system seconds of a command and the processes it waited for, its output)."""
  before = os.times()
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options)
  after = os.times()
  used = sum(after[i] - before[i] for i in (2, 3))
  return used, done.stdout


def prepare(corpus, out, tokenizer, *more):
  """CPU seconds of `jaxgpt data`, and its manifest."""
  command = [sys.executable, "-m", "jaxgpt", "data", str(corpus), f"--out={out}"]
  command += [f"--tokenizer={tokenizer}", "--executor=process", *more]
  seconds, _ = cpu_seconds(command, env={**os.environ, "JAXGPT_THREADS": "1"})
  return seconds, json.loads((out / "manifest.json").read_text())


def main(count, more):
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    corpus, small = folder / "corpus.jsonl", folder / "small.jsonl"
    write_corpus(corpus, count)
    write_corpus(small, 20_000)
    prepare(small, folder / "small", f"sentencepiece:{VOCAB}")
    model = folder / "small" / "tokenizer" / "tokenizer.model"
    loop, tokens = cpu_seconds(
      [sys.executable, "-c", LOOP, str(corpus), str(model), str(folder / "ids")]
    )
    ours, manifest = prepare(corpus, folder / "out", folder / "small", *more)
  size = corpus_size = manifest["total"]["bytes"]
  print(f"{count:,} documents, {size / count:.0f} bytes each, {int(tokens):,} tokens")
  print(
    f"plain SentencePiece loop: {loop:6.1f} s of CPU time  {corpus_size / loop / 1e6:5.2f} MB/s"
  )
  print(f"jaxgpt data:              {ours:6.1f} s of CPU time  {size / ours / 1e6:5.2f} MB/s")
  print(f"ratio: {ours / loop:.2f}")


if __name__ == "__main__":
  main(int(sys.argv[1]) if len(sys.argv) > 1 else DOCUMENTS, sys.argv[2:])
