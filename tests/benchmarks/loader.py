"""Tokens/s of the data loader, next to raw reading, plain Grain and PyTorch's DataLoader.

  python tests/benchmarks/loader.py [--tokens=20000000] [--seconds=5]

Documents have web-like lengths (log-normal, mean about 900 tokens) and lie in ArrayRecord files
on the local disk. Batches are 32 shuffled rows of 2,048 tokens. Padding is not counted. Each
contender runs in one process, except PyTorch with workers. Contenders take turns, and the best
round counts. PyTorch needs the extra [bench] and is left out without it.
"""

import argparse
import itertools
import pathlib
import tempfile
import time

import grain
import numpy as np
from array_record.python import array_record_module

from jaxgpt import config
from jaxgpt.data import masking, pipeline
from jaxgpt.data.batch_source import Batching
from jaxgpt.text.prepare import shards
from jaxgpt.text.readers import documents
from jaxgpt.text.tokenizers import examples, tokenizer

T, B, VOCABULARY = 2048, 32, 32_000


class Tokenizer(tokenizer.ByteTokenizer):
  """A byte tokenizer with a larger vocabulary, as far as shards and masks see it."""

  kind, vocab_size = "benchmark", VOCABULARY


def write(folder, tokens, seed):
  """Writes a prepared folder with about `tokens` tokens."""
  folder.mkdir()
  rng = np.random.default_rng(seed)
  writer = shards.SplitWriter(folder, "train", Tokenizer(), 1 << 24)
  written = 0
  while written < tokens:
    n = int(rng.lognormal(6.2, 1.1)) + 1
    ids = (300 + rng.zipf(1.2, n) % (VOCABULARY - 300)).astype(np.int32)  # compresses like text
    writer.add(examples.Encoded(np.concatenate(([1], ids, [2]))), 4 * n, "benchmark")
    written += n
  shards.write_manifest(
    folder, shards.make_manifest(Tokenizer(), {"train": writer.finish()}, documents.Dropped())
  )
  return folder


def rate(batches, count, seconds):
  """Measures tokens/s of an iterator after a warm-up of 20 batches."""
  for batch in itertools.islice(batches, 20):
    count(batch)
  total, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    total += count(next(batches))
  return total / (time.perf_counter() - start)


def ours(path, objective="causal_lm", weights=()):
  c = config.base()
  masked = masking.make(c.objective, Tokenizer(), 0) if objective == "masked_lm" else None
  batching = Batching(seq_len=T, batch_size=B)
  b = pipeline.make(path, "train", batching, weights=weights, layout=objective, masking=masked)
  return b.iterate(threads=c.data.threads, prefetch=c.data.prefetch)


def real_tokens(batch):
  return np.count_nonzero(batch["segment_ids"])


def raw(folder):
  """Reads records in random order, 64 per call, and does nothing with them."""
  readers = [
    array_record_module.ArrayRecordReader(
      str(p), options="readahead_buffer_size:0", file_reader_buffer_size=32_768
    )
    for p in sorted(folder.glob("*.arrayrecord"))
  ]
  rng = np.random.default_rng(0)
  while True:
    reader = readers[rng.integers(len(readers))]
    yield reader.read(rng.integers(reader.num_records(), size=64).tolist())


def plain_grain(folder):
  """One document per row, as a first pipeline would be written: source, shuffle, pad, batch."""

  def row(record):
    ids = np.frombuffer(record, "<u2")[: T + 1].astype(np.int32)
    return np.pad(ids, (0, T + 1 - len(ids)))

  source = grain.sources.ArrayRecordDataSource([str(p) for p in folder.glob("*.arrayrecord")])
  rows = grain.MapDataset.source(source).shuffle(seed=0).repeat().map(row).batch(B)
  return iter(rows.to_iter_dataset())


def torch_loader(folder, workers):
  """Slices of one memory-mapped file of tokens: no documents, no padding, no shuffling."""
  import torch

  class Rows(torch.utils.data.Dataset):
    def __init__(self):
      self.data = np.memmap(folder / "tokens.bin", np.uint16, "r")

    def __len__(self):
      return (len(self.data) - 1) // T

    def __getitem__(self, i):
      ids = torch.from_numpy(self.data[i * T : i * T + T + 1].astype(np.int64))
      return ids[:-1], ids[1:]

  loader = torch.utils.data.DataLoader(
    Rows(), B, shuffle=True, num_workers=workers, persistent_workers=workers > 0
  )
  return itertools.chain.from_iterable(itertools.repeat(loader))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tokens", type=int, default=20_000_000)
  parser.add_argument("--seconds", type=float, default=3)
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as tmp:
    folder = write(pathlib.Path(tmp, "one"), args.tokens, 0)
    three = ",".join(
      str(write(pathlib.Path(tmp, f"part{i}"), args.tokens // 3, i)) for i in range(3)
    )
    b = pipeline.make(folder, "train", Batching(seq_len=T, batch_size=B))
    print(f"padding {b.sources[0].pack.padding_share:.3%} of {b.len_rows:,} rows")
    stored = b.sources[0].split.lengths + 1
    split = b.sources[0].split
    np.concatenate(split.read_many(np.arange(len(stored)), 0 * stored, stored)).tofile(
      folder / "tokens.bin"
    )
    of_records = lambda records: sum(map(len, records)) // 2
    sides = {
      "raw records": (raw(folder), of_records),
      "jaxgpt packed": (ours(folder), real_tokens),
      "jaxgpt 3 sources": (ours(three, weights=(0.5, 0.3, 0.2)), real_tokens),
      "jaxgpt masked LM": (ours(folder, "masked_lm"), real_tokens),
      "plain Grain": (plain_grain(folder), np.count_nonzero),
    }
    try:
      for workers in (0, 1, 2):
        sides[f"PyTorch, {workers} workers"] = (
          torch_loader(folder, workers),
          lambda rows: rows[0].numel(),
        )
    except ImportError:
      print("PyTorch is not installed: pip install -e '.[bench]'")
    best = dict.fromkeys(sides, 0.0)
    for _ in range(args.rounds):
      for name, (batches, count) in sides.items():
        best[name] = max(best[name], rate(batches, count, args.seconds))
  for name, value in best.items():
    print(f"{name:<20} {value / 1e6:8.2f} M tokens/s")
  peer = max(v for name, v in best.items() if name.startswith(("PyTorch", "plain")))
  print(
    f"ratio to the fastest peer: {best['jaxgpt packed'] / peer:.2f}, to raw records: "
    f"{best['jaxgpt packed'] / best['raw records']:.2f}"
  )


if __name__ == "__main__":
  main()
