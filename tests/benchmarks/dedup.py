"""Recall and precision of deduplication on real documents with planted duplicates.

  python tests/benchmarks/dedup.py [documents]

The documents are English texts and Python sources of this machine: the standard library, the
installed packages (sources, METADATA), /usr/share/doc, manual pages and licences. Natural
duplicates are removed first. Then copies of random documents are planted, exact ones and ones
with 5 % of the words replaced. Prints the shares found, the number of other documents removed,
the true similarity of the natural duplicates, the speed of each stage on one core, and the shares
found with datatrove's default parameters (5-grams, 14 buckets of 8 hashes, one shared bucket is
enough).
"""

import gzip
import pathlib
import random
import re
import sys
import sysconfig
import tempfile
import time

import numpy as np

from jaxgpt.text.filters import dedup, words
from jaxgpt.text.readers import documents as documents_lib

LEAST_WORDS, MOST_CHARS = 50, 200_000
TASKS = 4


def corpus(limit):
  """Returns up to `limit` documents of this machine, the same in every call."""
  stdlib, packages = (pathlib.Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
  patterns = [
    (stdlib, "**/*.py"),
    (packages, "*/METADATA"),
    (packages, "*/*.py"),
    (packages, "*/*/*.py"),
    (pathlib.Path("/usr/share/doc"), "**/*"),
    (pathlib.Path("/usr/share/man"), "man*/*"),
    (pathlib.Path("/usr/share/common-licenses"), "*"),
  ]
  found = {}
  for root, pattern in patterns:
    for path in sorted(root.glob(pattern)):
      if path.is_file() and (root != stdlib or "site-packages" not in path.parts):
        found[path.resolve()] = str(path)
  paths = sorted(found, key=lambda path: random.Random(str(path)).random())
  documents = []
  for path in paths:
    try:
      text = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read().decode()
    except (OSError, UnicodeDecodeError, EOFError):
      continue
    if len(text) <= MOST_CHARS and len(words.plain_words(text)) >= LEAST_WORDS:
      documents.append(documents_lib.Document(found[path], text))
    if len(documents) == limit:
      break
  return documents


def change(text, share, random_, vocabulary):
  """Replaces a share of the words of a text, at least one."""
  parts = re.split(r"(\w+)", text)  # words at odd indices
  places = range(1, len(parts), 2)
  for i in random_.sample(places, max(round(share * len(places)), 1)):
    parts[i] = random_.choice(vocabulary)
  return "".join(parts)


def plant(documents, share, seed):
  """Plants copies among documents: [(document, index of its original or None, kind)].

  Args:
    documents: without duplicates.
    share: of the documents that get an exact copy, and of others that get a changed one.
    seed: for the draws.
  """
  random_ = random.Random(seed)
  vocabulary = sorted({w for d in documents[:200] for w in words.plain_words(d.text)})
  drawn = random_.sample(range(len(documents)), 2 * int(share * len(documents)))
  out = [(document, number, "base") for number, document in enumerate(documents)]
  for k, number in enumerate(drawn):
    document, kind = documents[number], ("exact", "changed")[k % 2]
    if kind == "changed":
      document = document._replace(text=change(document.text, 0.05, random_, vocabulary))
    out.append((document, number, kind))
  random_.shuffle(out)
  return out


def remove(documents, config, folder, seconds=None, tasks=TASKS):
  """Runs all stages: {index of a removed document: index of the one it resembles}."""
  bounds = np.linspace(0, len(documents), tasks + 1).astype(int)
  folder = pathlib.Path(folder)
  ends = [time.monotonic()]
  inputs = [folder / f"signatures-{rank}" for rank in range(tasks)]
  for rank, out in enumerate(inputs):
    out.mkdir(parents=True)
    dedup.signatures(documents[bounds[rank] : bounds[rank + 1]], rank, out, config)
  ends.append(time.monotonic())
  pairs = [folder / f"buckets-{rank}" for rank in range(dedup.bucket_tasks(config))]
  for rank, out in enumerate(pairs):
    out.mkdir()
    dedup.buckets(rank, inputs, out, config)
  ends.append(time.monotonic())
  (folder / "cluster").mkdir()
  dedup.cluster(inputs, pairs, folder / "cluster", config)
  ends.append(time.monotonic())
  if seconds is not None:
    seconds.update(zip(("signatures", "buckets", "cluster"), np.diff(ends)))
  return {
    int(bounds[rank] + row[0]): int(bounds[row[2]] + row[3])
    for rank in range(tasks)
    for row in dedup.removals(rank, folder / "cluster")
  }


def found(planted, removed):
  """Returns the share of planted pairs found, by kind, and of other documents removed."""
  pairs = {}
  for place, (_, number, kind) in enumerate(planted):
    entry = pairs.setdefault(number, {"places": [], "kind": None})
    entry["places"].append(place)
    entry["kind"] = entry["kind"] if kind == "base" else kind
  gone = [
    (entry["kind"], sum(place in removed for place in entry["places"])) for entry in pairs.values()
  ]
  share = {
    kind: np.mean([count > 0 for k, count in gone if k == kind]) for kind in ("exact", "changed")
  }
  false = sum(max(count - (kind is not None), 0) for kind, count in gone) / len(gone)
  return share, false


def similarity(a, b, n=3):
  """Returns the Jaccard similarity of the n-grams of two texts."""
  a, b = (np.unique(words.ngram_hashes(text, n)) for text in (a, b))
  both = len(np.intersect1d(a, b, assume_unique=True))
  return both / max(len(a) + len(b) - both, 1)


def main():
  limit = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
  natural = corpus(limit)
  megabytes = sum(len(d.text) for d in natural) / 1e6
  config, seconds = dedup.make(["exact", "near"]), {}
  with tempfile.TemporaryDirectory() as folder:
    gone = remove(natural, config, folder, seconds)
  like = np.array([similarity(natural[a].text, natural[b].text) for a, b in gone.items()])
  base = [d for i, d in enumerate(natural) if i not in gone]
  print(
    f"{len(natural)} documents, {megabytes:.0f} M characters; natural duplicates: {len(gone)}, "
    f"of which true similarity < 0.6: {np.mean(like < 0.6):.2%}, "
    f"< 0.5: {np.mean(like < 0.5):.2%}"
  )
  print("  ".join(f"{stage} {megabytes / s:.1f} M characters/s" for stage, s in seconds.items()))
  planted = plant(base, 0.2, seed=1)
  peer = "near:ngram=5,buckets=14,hashes=8,threshold=0.01"
  for name, specs in (("these defaults", ["exact", "near"]), ("datatrove's parameters", [peer])):
    with tempfile.TemporaryDirectory() as folder:
      gone = remove([d for d, *_ in planted], dedup.make(specs), folder)
    share, false = found(planted, gone)
    print(
      f"planted among {len(base)}, {name}: exact copies found {share['exact']:.2%} (bar 99 %), "
      f"with 5 % of the words changed {share['changed']:.2%} (bar 90 %), false removals "
      f"{false:.2%} (bar 0.5 %)"
    )


if __name__ == "__main__":
  main()
