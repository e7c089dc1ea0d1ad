"""Golden data folders, runs and configs: how the kept files were made, and what they must give.

`golden_test.py` reads this table with the code of today; `make.py` read it with the code that
made the kept files. Every path in it is relative to a folder that holds `data/` and `runs/`.
"""

import hashlib
import json
import os
import pathlib
import platform
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

HERE = pathlib.Path(__file__).parent
STEPS, STOP = 8, 4  # steps of a golden run, and the step at which the kept one was stopped

WORDS = ("red", "blue", "cold", "warm", "old", "new")
MTIME = 1_700_000_000  # seconds; a prepare job identifies its input files by it

# Arguments of `jaxgpt data`, next to the paths of its input and output.
DATA = {
  "text": ("--tokenizer=bytes",),
  "pieces": ("--tokenizer=sentencepiece:300",),
  "classification": ("--tokenizer=bytes", "--kind=classification"),
  "seq2seq": ("--tokenizer=bytes", "--kind=seq2seq"),
  "chat": ("--tokenizer=bytes", "--kind=chat"),
  "preference": ("--tokenizer=bytes", "--kind=preference"),
}
SPLITS = ("--validation=0.2", "--test=0.1", "--cut-chars=0", "--executor=process")

# A job that was stopped after its stage `tokenizer`, in `data/job.unfinished`. `data/whole` is the
# same job, undisturbed.
JOB = "job"
JOB_ARGS = ("--tokenizer=bytes", "--clean=repeated_lines", "--dedup=exact", "--task-bytes=2000")

# Overrides of `tiny.py`.
RUNS = {
  "adamw": ("--config.optim.ema=0.9", "--config.optim.accumulate=2", "--config.data.batch_size=16"),
  "lora_preference": (
    "--config.data.path=data/preference",
    "--config.objective.name=preference",
    "--config.data.seq_len=64",
    "--config.model.lora.rank=2",
    "--config.model.lora.targets=('*',)",
    "--config.model.lora.dropout=0.1",
  ),
  "masked_lm": (
    "--config.objective.name=masked_lm",
    "--config.model.causal=False",
    "--config.data.packing=concat",
    "--config.optim.name=lion",
    "--config.mesh.fsdp=2",
  ),
  "muon_ema": ("--config.optim.name=muon", "--config.optim.ema=0.9", "--config.model.qk_norm=head"),
  "classification": (
    "--config.data.path=data/classification",
    "--config.objective.name=classification",
    "--config.model.causal=False",
    "--config.model.head=classifier",
    "--config.model.num_labels=6",
    "--config.model.pooling=mean",
    "--config.optim.name=adafactor",
  ),
  "moe_chat": (
    "--config.data.path=data/chat",
    "--config.data.seq_len=64",
    "--config.model.mlp_pattern=('dense','moe')",
    "--config.model.moe.experts=4",
    "--config.mesh.fsdp=4",
  ),
  "mixture": (
    "--config.data.path=data/text,data/whole",
    "--config.data.weights=(0.75,0.25)",
    "--config.data.weight_changes=((3,(0.25,0.75)),)",
    "--config.model.num_kv_heads=2",
    "--config.mesh.tensor=2",
  ),
  "stream": (
    "--config.data.stream=data/text.jsonl",
    "--config.data.stream_window=16",
    "--config.data.packing=concat",
  ),
}

_SMALL = (
  "--config.train.steps=4",
  "--config.schedule.warmup_steps=2",
  "--config.data.batch_size=8",
  "--config.log.every=1",
  "--config.eval.every=0",
  "--config.mesh.data=-1",
  "--config.mesh.fsdp=1",
)
_WIDTH = ("--config.model.num_layers=2", "--config.model.width=32", "--config.model.num_heads=4")
# What makes a config of configs/ small enough to train here.
CONFIGS = {
  "char_level.py": ("--config.data.path=data/text", *_SMALL, *_WIDTH),
  "classifier.py": (
    "--config.data.path=data/classification",
    "--config.model.num_labels=6",
    *_SMALL,
  ),
  "demo.py": ("--config.data.path=data/pieces", *_SMALL, *_WIDTH),
  "finetune.py:runs/adamw": ("--config.data.path=data/text", *_SMALL, "--config.data.seq_len=32"),
  "gpt2_124m.py": (
    "--config.data.path=data/pieces",
    *_SMALL,
    *_WIDTH,
    "--config.model.num_kv_heads=4",
    "--config.model.head_dim=8",
    "--config.model.mlp_width=64",
    "--config.model.vocab_size=384",
    "--config.data.seq_len=64",
    "--config.data.batch_size=16",
    "--config.optim.accumulate=2",
  ),
  "llama3_8b.py": (
    "--config.data.path=data/pieces",
    *_SMALL,
    *_WIDTH,
    "--config.model.num_kv_heads=2",
    "--config.model.head_dim=8",
    "--config.model.mlp_width=64",
    "--config.model.vocab_size=384",
    "--config.data.seq_len=64",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
  ),
}

GENERATE = ["generate", "--workdir=runs/adamw", "--prompt=7 red", "--temperature=0", "--max-new=8"]

_NUMBERS = ("loss", "grad_norm", "param_norm", "accuracy", "bits_per_byte")


def unpack(name: str, folder: pathlib.Path) -> None:
  """Unpacks an archive of this folder."""
  with tarfile.open(HERE / f"{name}.tar.xz") as tar:
    # Python 3.11 has no argument for it before 3.11.4.
    tar.extraction_filter = getattr(tarfile, "data_filter", None)
    tar.extractall(folder)


def records(kind: str) -> Iterator[dict]:
  """Yields the 60 records of a kind of data."""
  for i in range(60):
    word = WORDS[i % 6]
    text = f"{i % 20} {word} things"
    yield {
      "classification": {"text": f"{i} " + f"{word} " * (2 + i % 4), "label": word},
      "seq2seq": {"input": text, "target": word.upper()},
      "chat": {
        "messages": [
          {"role": "user", "content": text},
          {"role": "assistant", "content": word.upper()},
        ]
      },
      "preference": {"prompt": text + ": ", "chosen": word.upper(), "rejected": word},
    }.get(kind) or {"text": f"{text}, {word} as ever {WORDS[i % 5]}. " * (1 + i % 7)}


def write_inputs(folder: pathlib.Path) -> None:
  """Writes FOLDER/KIND.jsonl for every data folder."""
  for kind in (*DATA, JOB):
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(kind)))
    os.utime(path, (MTIME, MTIME))


def data_command(name: str) -> list[str]:
  """The `jaxgpt data` command of a data folder, or of the stopped job."""
  args = JOB_ARGS if name == JOB else DATA[name]
  return ["data", f"data/{name}.jsonl", f"--out=data/{name}", *args, *SPLITS]


def run_command(name: str) -> list[str]:
  """The `jaxgpt train` command of a golden run."""
  return ["train", "--config=tiny.py", f"--workdir=runs/{name}", *RUNS[name]]


def config_command(name: str) -> list[str]:
  """The `jaxgpt train` command of a config of configs/, which stands in the working folder."""
  return ["train", f"--config=configs/{name}", f"--workdir=configs_runs/{name[:8]}", *CONFIGS[name]]


def numbers(run: pathlib.Path) -> dict[str, dict[str, str]]:
  """The numbers that a run reported, in hexadecimal: {'train/5': {'loss': '0x1.6p+2', ...}}."""
  out = {}
  for line in (run / "metrics.jsonl").read_text().splitlines():
    metrics = json.loads(line)
    found = {name: float(metrics[name]).hex() for name in _NUMBERS if name in metrics}
    out[f"{metrics['kind']}/{metrics['step']}"] = found
  return out


def digest(batch: dict[str, Any]) -> str:
  """A digest of a batch: names, types, shapes and values of its arrays."""
  found = hashlib.sha256()
  for path, x in jax.tree_util.tree_flatten_with_path(batch)[0]:
    name = jax.tree_util.keystr(path)
    found.update(f"{name} {x.dtype} {x.shape}".encode() + np.ascontiguousarray(x).tobytes())
  return found.hexdigest()[:16]


def batches(c: ConfigDict, path: str, split_batches: Callable) -> dict[str, str]:
  """{'split step': digest of the batch} of a data folder, read with the base config `c`."""
  c.data.update(dict(path=path, seq_len=64, batch_size=8))
  kind = json.loads(pathlib.Path(path, "manifest.json").read_text())["kind"]
  c.objective.name = kind if kind in ("classification", "preference") else "causal_lm"
  c.model.num_labels = 6
  out = {}
  for split in ("train", "validation", "test"):
    data = split_batches(c, split)
    for step in (0, 1, 5):
      out[f"{split} {step}"] = digest(data.batch(step))
  return out


def identity() -> dict[str, str]:
  """Everything that losses to the bit depend on, except for the code of this repository."""
  lines = set()
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
      lines = {line for line in f if line.startswith(("model name", "flags", "Features"))}
  except OSError:
    pass
  processor = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]
  return {
    "jax": jax.__version__,
    "jaxlib": jax.lib.__version__,
    # Golden files are older than the flag, whose value here is that of jaxlib.
    "XLA_FLAGS": re.sub(r" \S+ynn_fusion_type=\+reduce", "", os.environ.get("XLA_FLAGS", "")),
    "processor": f"{platform.machine()} {processor}",
  }
