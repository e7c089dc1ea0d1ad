"""The data card: contents of a prepared folder, and the documents left out with the reasons.

DIR/card.md      the card, for people
DIR/lengths.svg  its histogram of document lengths
DIR/card.json    the same figures for programs
"""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxgpt.errors import printable
from jaxgpt.storage import strict_json
from jaxgpt.text.prepare import best_fit, shards
from jaxgpt.text.readers.documents import Dropped

_SEQ_LENS = (512, 2048, 8192)
_PACKED_DOCUMENTS = 1 << 20  # the packing is an estimate from the first documents
_CHUNK = 1 << 15  # documents in memory at a time
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def write(
  folder: pathlib.Path,
  manifest: Mapping[str, Any],
  dropped: Dropped,
  dropped_bytes: Mapping[str, int],
  changed: Mapping[str, Sequence[int]],
  sources: Mapping[str, Sequence[int]],
  shared: int | None = None,
) -> dict[str, Any]:
  """Writes the card of a folder that holds shards, sidecars and manifest.

  Args:
    folder: The prepared folder.
    manifest: Its manifest.
    dropped: The account of dropped documents of all jobs.
    dropped_bytes: {rule: UTF-8 bytes of the dropped texts}, as far as they are known.
    changed: {cleaning step: [documents changed, characters removed]}.
    sources: {group of sources: [documents, UTF-8 bytes]}.
    shared: Training documents whose text is held out too. None: the splits exclude it.

  Returns:
    The content of `card.json`.
  """
  folder = pathlib.Path(folder)
  stored = np.load(folder / "train.tokens.npy", mmap_mode="r")
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
    "dropped": _dropped(dropped, dropped_bytes, bytes_per_token),
    "passed over": manifest.get("passed_over", {}),
    "notes": {
      what: {"files": count, "examples": names} for what, (count, names) in dropped.notes.items()
    },
    "unknown tokens": manifest.get("unknown_tokens", 0),
    "changed": {
      step: {"documents": documents, "characters": characters}
      for step, (documents, characters) in sorted(changed.items())
    },
    "languages dropped": {
      rule.removeprefix("language: "): count
      for rule, count in sorted(dropped.counts.items())
      if rule.startswith("language: ")
    },
    "lengths": _lengths(stored),
    "packing": _packing(stored),
    "labels": _labels(folder, manifest),
    "sources": {
      name: {"documents": documents, "bytes": size}
      for name, (documents, size) in sorted(
        sources.items(), key=lambda item: (-item[1][1], item[0])
      )
    },
  }
  if shared is not None:
    card["training documents with held-out text"] = shared
  (folder / "card.json").write_text(
    strict_json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
  )
  (folder / "lengths.svg").write_text(histogram(card["lengths"]["histogram"]), encoding="utf-8")
  (folder / "card.md").write_text(markdown(card), encoding="utf-8")
  return card


def _dropped(
  dropped: Dropped, dropped_bytes: Mapping[str, int], bytes_per_token: float
) -> dict[str, Any]:
  """{rule: counts and examples of the documents that it dropped}."""
  return {
    rule: {
      "documents": count,
      "bytes": dropped_bytes.get(rule, 0),
      "tokens (estimate)": round(dropped_bytes.get(rule, 0) / bytes_per_token),
      "examples": dropped.examples[rule],
    }
    for rule, count in sorted(dropped.counts.items())
  }


def _lengths(stored: np.ndarray) -> dict[str, Any]:
  """Statistics of stored tokens per document. The bars of the histogram end at powers of two."""
  if not len(stored):
    return {"histogram": []}
  counts = np.zeros(33, np.int64)
  for chunk in _chunks(stored):
    counts += np.bincount(np.ceil(np.log2(chunk)).astype(int), minlength=33)
  low, high = np.flatnonzero(counts)[[0, -1]].tolist()
  return {
    "mean": round(float(np.mean(stored)), 1),
    "most": int(np.max(stored)),
    "quantiles": {
      str(q): int(x) for q, x in zip(_QUANTILES, np.quantile(stored, _QUANTILES, method="lower"))
    },
    "histogram": [[1 << end, int(counts[end])] for end in range(low, high + 1)],
  }


def _packing(stored: np.ndarray) -> dict[str, dict[str, float]]:
  """{row length: {packing: share of the rows' positions that predictions fill}}."""
  stored = stored[:_PACKED_DOCUMENTS]
  predictions = int(np.sum(stored, dtype=np.int64)) - len(stored)
  out: dict[str, dict[str, float]] = {}
  for seq_len in _SEQ_LENS if len(stored) else ():
    pieces = [best_fit.cut(chunk - 1, seq_len)[2] for chunk in _chunks(stored)]
    rows = {
      "best_fit": sum(best_fit.pack(lengths, seq_len)[1] for lengths in pieces),
      "one_per_row": sum(map(len, pieces)),
    }
    out[str(seq_len)] = {
      name: round(predictions / (count * seq_len), 4) if count else 1.0
      for name, count in rows.items()
    }
  return out


def _chunks(stored: np.ndarray) -> Iterator[np.ndarray]:
  """The array in pieces of type int64, so that memory stays flat."""
  for start in range(0, len(stored), _CHUNK):
    yield stored[start : start + _CHUNK].astype(np.int64)


def _labels(folder: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, int]:
  """{class: documents in the training split, or words with this tag}."""
  names = manifest["label_names"]
  if not names:
    return {}
  name = shards.ENTRIES.get(manifest["kind"], "labels")
  labels = np.load(folder / f"train.{name}.npy").astype(np.int64)
  counts = np.bincount(labels if labels.ndim == 1 else labels[:, -1], minlength=len(names)).tolist()
  return dict(zip(names, counts))


def histogram(bars: Sequence[Sequence[int]], width: int = 640, height: int = 240) -> str:
  """Draws a bar chart.

  Args:
    bars: [[upper end in tokens, number of documents], …].
    width, height: Size of the picture in pixels.

  Returns:
    An SVG document.
  """
  left, bottom, top = 10, 40, 24
  most = max([count for _, count in bars], default=1) or 1
  step = (width - 2 * left) / max(len(bars), 1)
  elements = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    f'font-family="sans-serif" font-size="11" text-anchor="middle">',
    f'<rect width="{width}" height="{height}" fill="white"/>',
  ]
  for i, (end, count) in enumerate(bars):
    tall = (height - bottom - top) * count / most
    x, y = left + i * step, height - bottom - tall
    elements += [
      f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" '
      f'fill="#4878a8"><title>up to {end} tokens: {count}</title></rect>',
      f'<text x="{x + step / 2:.1f}" y="{y - 4:.1f}">{_short(count)}</text>',
      f'<text x="{x + step / 2:.1f}" y="{height - bottom + 14}">{_short(end)}</text>',
    ]
  elements += [
    f'<text x="{width / 2}" y="{height - 8}">documents by length in tokens '
    "(upper end of each bar)</text>",
    "</svg>\n",
  ]
  return "\n".join(elements)


def _short(number: int) -> str:
  for size, suffix in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
    if number >= size:
      return f"{number / (size if size > 10**4 else 1000):.3g}{suffix}"
  return str(number)


def markdown(card: Mapping[str, Any]) -> str:
  """Formats the card as Markdown."""
  documents = card["documents"]
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
    *_shared_lines(card),
    "## Left out",
    "",
    "Documents read = kept + dropped. Bytes count the texts that could be read; tokens are "
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
  lines += _remark_lines(card)
  if card["changed"]:
    lines += [
      "## Changed by cleaning",
      "",
      *_table(
        ("step", "documents", "characters removed"),
        [(step, *x.values()) for step, x in card["changed"].items()],
      ),
    ]
  if card["languages dropped"]:
    lines += [
      "## Languages that were dropped",
      "",
      *_table(("language", "documents"), card["languages dropped"].items()),
    ]
  lines += _length_lines(card)
  if card["labels"]:
    what = "training words" if card["kind"] == "tagging" else "training documents"
    lines += ["## Classes", "", *_table(("class", what), card["labels"].items())]
  lines += [
    "## Sources",
    "",
    *_table(
      ("source", "documents", "bytes"), [(name, *x.values()) for name, x in card["sources"].items()]
    ),
  ]
  return "\n".join(lines)


def _shared_lines(card: Mapping[str, Any]) -> list[str]:
  shared = card.get("training documents with held-out text")
  if shared is None:
    return []
  return [f"{shared:,} training documents have the text of a held-out document.", ""]


def _remark_lines(card: Mapping[str, Any]) -> list[str]:
  """Sections on files that were not read as documents, and on unknown tokens, if there are any."""
  lines: list[str] = []
  if card["passed over"]:
    rows = [
      (why, entry["count"], ", ".join(entry["examples"]))
      for why, entry in card["passed over"].items()
    ]
    head = ("reason", "files or folders", "such as")
    lines += ["## Passed over", "", *_table(head, rows)]
  if card["notes"]:
    rows = [(what, x["files"], ", ".join(x["examples"])) for what, x in card["notes"].items()]
    lines += ["## Remarks", "", *_table(("about", "files", "such as"), rows)]
  if unknown := card["unknown tokens"]:
    total = sum(entry["tokens"] for entry in card["splits"].values())
    lines += [f"{unknown:,} of {total:,} tokens ({unknown / max(total, 1):.1%}) are unknown.", ""]
  return lines


def _length_lines(card: Mapping[str, Any]) -> list[str]:
  """The section on lengths and packing, if there are training documents."""
  lengths = card["lengths"]
  if not lengths["histogram"]:
    return []
  return [
    "## Lengths of training documents",
    "",
    "![lengths](lengths.svg)",
    "",
    f"Mean {lengths['mean']:,} tokens, longest {lengths['most']:,}; quantiles: "
    + ", ".join(f"{q}: {x:,}" for q, x in lengths["quantiles"].items())
    + ".",
    "",
    "Share of the positions in packed rows that predictions fill:",
    "",
    *_table(
      ("data.seq_len", "best_fit", "one_per_row"),
      [
        (seq_len, *(f"{x:.2%}" for x in shares.values()))
        for seq_len, shares in card["packing"].items()
      ],
    ),
  ]


def _one_line(text: str) -> str:
  return printable(" ".join(text.split()))


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
  """Lines of a Markdown table, with an empty one at the end."""
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
