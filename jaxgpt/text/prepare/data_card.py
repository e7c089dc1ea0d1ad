"""The data card: what a prepared folder holds, what was left out and why, for people to read.

DIR/card.md      the card
DIR/lengths.svg  its picture: how long documents are
DIR/card.json    the same figures for programs
"""

import json
import pathlib

import numpy as np

from jaxgpt.text.prepare import best_fit, shards

_SEQ_LENS = (512, 2048, 8192)
_PACKED_DOCUMENTS = 1 << 20  # more than these are not packed for an estimate
_PART = 1 << 15  # documents that are looked at, or packed, at once
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def write(folder, manifest, dropped, dropped_bytes, changed, sources):
  """Writes the card of a folder that holds shards, sidecars and manifest.

  Args:
    folder: the prepared folder.
    manifest: its manifest.
    dropped: the `read.Dropped` of all stages.
    dropped_bytes: {rule: UTF-8 bytes of the texts that were dropped}, where these are known.
    changed: {cleaning step: [documents changed, characters taken away]}.
    sources: {group of sources: [documents, UTF-8 bytes]}.

  Returns:
    The card as a dict, as in `card.json`.
  """
  folder = pathlib.Path(folder)
  stored = {
    split: np.load(folder / f"{split}.tokens.npy", mmap_mode="r") for split in shards.SPLITS
  }
  total = manifest["total"]
  bytes_per_token = total["bytes"] / max(total["tokens"], 1)
  card = {
    "digest": manifest["digest"],
    "kind": manifest["kind"],
    "tokenizer": manifest["tokenizer"],
    "documents": {"read": manifest["read"], "kept": manifest["kept"]},
    "splits": {
      split: {key: entry[key] for key in ("documents", "tokens", "bytes")}
      for split, entry in manifest["splits"].items()
    },
    "bytes_per_token": round(bytes_per_token, 4),
    "dropped": {
      rule: {
        "documents": count,
        "bytes": dropped_bytes.get(rule, 0),
        "tokens (estimate)": round(dropped_bytes.get(rule, 0) / bytes_per_token),
        "examples": dropped.examples[rule],
      }
      for rule, count in sorted(dropped.counts.items())
    },
    "changed": {
      step: {"documents": documents, "characters": characters}
      for step, (documents, characters) in sorted(changed.items())
    },
    "languages dropped": {
      rule.removeprefix("language: "): count
      for rule, count in sorted(dropped.counts.items())
      if rule.startswith("language: ")
    },
    "lengths": _lengths(stored["train"]),
    "packing": _packing(stored["train"]),
    "labels": _labels(folder, manifest),
    "sources": {
      name: {"documents": documents, "bytes": size}
      for name, (documents, size) in sorted(
        sources.items(), key=lambda item: (-item[1][1], item[0])
      )
    },
  }
  (folder / "card.json").write_text(
    json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
  )
  (folder / "lengths.svg").write_text(histogram(card["lengths"]["histogram"]), encoding="utf-8")
  (folder / "card.md").write_text(markdown(card), encoding="utf-8")
  return card


def _lengths(stored):
  """Stored tokens of documents: quantiles, and a histogram whose bars end at powers of two."""
  if not len(stored):
    return {"histogram": []}
  counts = sum(
    np.bincount(np.ceil(np.log2(part)).astype(int), minlength=33) for part in _parts(stored)
  )
  low, high = np.flatnonzero(counts)[[0, -1]].tolist()
  return {
    "mean": round(float(np.mean(stored)), 1),
    "most": int(np.max(stored)),
    "quantiles": {
      str(q): int(x) for q, x in zip(_QUANTILES, np.quantile(stored, _QUANTILES, method="lower"))
    },
    "histogram": [[1 << end, int(counts[end])] for end in range(low, high + 1)],
  }


def _packing(stored):
  """Share of a row's places that predictions fill, by packing and length of the rows."""
  stored = stored[:_PACKED_DOCUMENTS]
  predictions = int(np.sum(stored, dtype=np.int64)) - len(stored)
  out = {}
  for seq_len in _SEQ_LENS if len(stored) else ():
    pieces = [best_fit.cut(part - 1, seq_len)[2] for part in _parts(stored)]
    rows = {
      "best_fit": sum(best_fit.pack(lengths, seq_len)[1] for lengths in pieces),
      "one_per_row": sum(map(len, pieces)),
    }
    out[str(seq_len)] = {
      name: round(predictions / (count * seq_len), 4) if count else 1.0
      for name, count in rows.items()
    }
  return out


def _parts(stored):
  """int64 arrays of so many documents that memory stays flat."""
  return (stored[start : start + _PART].astype(np.int64) for start in range(0, len(stored), _PART))


def _labels(folder, manifest):
  """Documents of each class in the training split."""
  names = manifest["label_names"]
  if not names:
    return {}
  labels = np.load(folder / "train.labels.npy").astype(np.int64)
  counts = np.bincount(labels, minlength=len(names)).tolist()
  return dict(zip(names, counts))


def histogram(bars, width=640, height=240):
  """An SVG picture of [[upper end, count], …], as bars side by side."""
  left, bottom, top = 10, 40, 24
  most = max([count for _, count in bars], default=1) or 1
  step = (width - 2 * left) / max(len(bars), 1)
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    f'font-family="sans-serif" font-size="11" text-anchor="middle">',
    f'<rect width="{width}" height="{height}" fill="white"/>',
  ]
  for i, (end, count) in enumerate(bars):
    tall = (height - bottom - top) * count / most
    x, y = left + i * step, height - bottom - tall
    parts += [
      f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" '
      f'fill="#4878a8"><title>up to {end} tokens: {count}</title></rect>',
      f'<text x="{x + step / 2:.1f}" y="{y - 4:.1f}">{_short(count)}</text>',
      f'<text x="{x + step / 2:.1f}" y="{height - bottom + 14}">{_short(end)}</text>',
    ]
  parts += [
    f'<text x="{width / 2}" y="{height - 8}">documents by length: up to so many tokens</text>',
    "</svg>\n",
  ]
  return "\n".join(parts)


def _short(number):
  for size, suffix in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
    if number >= size:
      return f"{number / (size if size > 10**4 else 1000):.3g}{suffix}"
  return str(number)


def markdown(card):
  """The card as Markdown."""
  lengths, documents = card["lengths"], card["documents"]
  lines = [
    "# Data card",
    "",
    f"{documents['read']:,} documents of kind {card['kind']} were read, {documents['kept']:,} "
    f"kept. A token is {card['bytes_per_token']:.2f} bytes of text on average, with the "
    f"{card['tokenizer']['kind']} tokenizer of {card['tokenizer']['vocab_size']:,} tokens. "
    f"Digest of the manifest: `{card['digest']}`.",
    "",
    *_table(
      ("split", "documents", "tokens", "bytes"),
      [(split, *entry.values()) for split, entry in card["splits"].items()],
    ),
    "## Left out",
    "",
    "Documents read = kept + dropped. Bytes are those of texts that could be read; tokens are "
    "estimated from them.",
    "",
    *_table(
      ("rule", "documents", "bytes", "tokens"),
      [
        (rule, x["documents"], x["bytes"], x["tokens (estimate)"])
        for rule, x in card["dropped"].items()
      ]
      or [("none", 0, 0, 0)],
    ),
  ]
  for rule, x in card["dropped"].items():
    lines += [f"{rule}, such as", "", *(f"    {_one_line(e)}" for e in x["examples"]), ""]
  if card["changed"]:
    lines += [
      "## Changed by cleaning",
      "",
      *_table(
        ("step", "documents", "characters taken away"),
        [(step, *x.values()) for step, x in card["changed"].items()],
      ),
    ]
  if card["languages dropped"]:
    lines += [
      "## Languages that were dropped",
      "",
      *_table(("language", "documents"), card["languages dropped"].items()),
    ]
  if lengths["histogram"]:
    lines += [
      "## Lengths of training documents",
      "",
      "![lengths](lengths.svg)",
      "",
      f"Mean {lengths['mean']:,} tokens, longest {lengths['most']:,}; quantiles: "
      + ", ".join(f"{q}: {x:,}" for q, x in lengths["quantiles"].items())
      + ".",
      "",
      "Share of a row's places that is filled:",
      "",
      *_table(
        ("data.seq_len", "best_fit", "one_per_row"),
        [
          (seq_len, *(f"{x:.2%}" for x in shares.values()))
          for seq_len, shares in card["packing"].items()
        ],
      ),
    ]
  if card["labels"]:
    lines += ["## Classes", "", *_table(("class", "training documents"), card["labels"].items())]
  lines += [
    "## Sources",
    "",
    *_table(
      ("source", "documents", "bytes"), [(name, *x.values()) for name, x in card["sources"].items()]
    ),
  ]
  return "\n".join(lines)


def _one_line(text):
  return " ".join(text.split())


def _table(head, rows):
  """Lines of a Markdown table, and an empty one."""
  cells = [
    [f"{x:,}" if isinstance(x, int) else _one_line(str(x)).replace("|", "\\|") for x in row]
    for row in rows
  ]
  return [
    " | ".join(("", *head, "")).strip(),
    "|---" * len(head) + "|",
    *(" | ".join(("", *row, "")).strip() for row in cells),
    "",
  ]
