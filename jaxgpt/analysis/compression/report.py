"""One table of a model and its compressed variants: bytes, speed, bits per byte."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxgpt import tree
from jaxgpt.analysis import token_rows
from jaxgpt.analysis.compression import compressed_run, methods, prune, quantize
from jaxgpt.analysis.compression.masks import parse
from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError
from jaxgpt.inference import load, prompts
from jaxgpt.inference.engine.engine import Engine
from jaxgpt.inference.engine.requests import Request
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import run_folder
from jaxgpt.run.compression import quantized_weights
from jaxgpt.run.compression import record as record_lib
from jaxgpt.training import evaluation

# f(run folder, folder to make, calibration text)
Make = Callable[[epath.PathLike, epath.PathLike, compressed_run.Calibration], Any]
VARIANTS: Registry[Make] = Registry("variants")


class Row(NamedTuple):
  """A run in the table.

  Attributes:
    name: Its name: that of the variant, or its folder.
    stored: Bytes of the weights as they are stored.
    zeros: Share of zeros in the weights.
    loss: Nats per token of the split.
    bits_per_byte: Bits per byte of the split, or None if it does not predict all text.
    evaluated: Tokens per second of the evaluation.
    generated: Tokens per second of the generation of one text that no token ends, or None for no
      language model.
  """

  name: str
  stored: int
  zeros: float
  loss: float
  bits_per_byte: float | None
  evaluated: float
  generated: float | None


def _sparse(method: str, sparsity: str, scope: str | None = None) -> Make:
  settings = prune.Settings(method, parse(sparsity), scope)
  calibrated = method != "magnitude"
  return lambda source, folder, text: compressed_run.pruned(
    source, folder, settings, text if calibrated else None
  )


def _coarse(method: str, bits: int, group: int = 0, outside: int = 0) -> Make:
  settings = quantize.Settings(method, bits, group, (), outside)
  return lambda source, folder, text: compressed_run.quantized(
    source, folder, settings, text if method in methods.CALIBRATED else None
  )


for _method in methods.PRUNING:
  VARIANTS.add(f"{_method}-50", _sparse(_method, "0.5"))
  VARIANTS.add(f"{_method}-2:4", _sparse(_method, "2:4"))
for _method, (_, *_others) in methods.SCOPES.items():  # the usual scope is in the names above
  for _other in _others:
    VARIANTS.add(f"{_method}-{_other}-50", _sparse(_method, "0.5", _other))
VARIANTS.add("int8", _coarse("nearest", 8))
VARIANTS.add("int8-all", _coarse("nearest", 8, outside=8))
for _method in methods.ROUNDING:
  VARIANTS.add(f"int4-{_method}", _coarse(_method, 4))
  VARIANTS.add(f"int4-{_method}-32", _coarse(_method, 4, 32))
VARIANTS.add("int4-gptq-32-all", _coarse("gptq", 4, 32, outside=8))


def make(
  source: epath.PathLike,
  folder: epath.PathLike,
  names: Sequence[str] | None,
  text: compressed_run.Calibration,
  tell: Callable[[str], None],
) -> list[epath.Path]:
  """Makes variants of a run, each in a run folder of its own. Those that are there are kept.

  Args:
    source: The run folder.
    folder: The folder of the variants.
    names: Entries of `VARIANTS`. None: all that suit the model.
    text: Calibration text.
    tell: Reports each variant, and each that does not suit the model.

  Returns:
    The run folders.

  Raises:
    UserError: A name is unknown, or a variant does not suit the model, or the run has no
      checkpoint, or a folder holds another run, a variant of another step or an unfinished one.
  """
  entries = {name: VARIANTS.find(name) for name in (VARIANTS if names is None else names)}
  newest = _newest(epath.Path(source))
  if newest is None:
    raise UserError(f"no checkpoint in {source}; train first, or name another run")
  made = []
  for name, entry in entries.items():
    target = epath.Path(folder) / name.replace(":", "of")
    if target.exists():
      found = record_lib.read(target)
      if found is None or found["source"] != str(source):
        raise UserError(
          f"{target} exists and was not made from {source}; choose another --to, or remove it if a "
          "start left it that was killed"
        )
      if _newest(target) is None:
        raise UserError(
          f"{target} is unfinished: it was made from {source}, but its weights are not saved; "
          "remove it, and run the same command again"
        )
      if found["source_step"] != newest:
        raise UserError(
          f"{target} was made from step {found['source_step']} of {source}, which is at step "
          f"{newest} now; remove it, or choose another --to"
        )
      used = found.get("calibration")
      tell(
        f"{target} is there already"
        + (f", made with {used['rows']} rows of {used['data']}, {used['split']}" if used else "")
      )
    else:
      try:
        entry(source, target, text)
      except methods.UnsuitableError as e:
        if names is not None:
          raise UserError(f"--variants={name}: {e.reason}; leave it out of --variants") from e
        tell(f"left out {name}: {e.reason}")
        continue
      except UserError as e:
        which = f"variant {name}" if names is None else f"--variants={name}"
        raise UserError(f"{which}: {e}") from e
      tell(f"made {target}")
    made.append(target)
  return made


def _newest(folder: epath.Path) -> int | None:
  """The step of a run's newest complete checkpoint, or None."""
  return max(checkpoints_lib.complete_steps(folder / run_folder.CHECKPOINTS), default=None)


def measure(
  folder: epath.PathLike, name: str, split: str, data: str | None, tokens: int, batches: int = 0
) -> Row:
  """Measures a run.

  Args:
    folder: The run folder.
    name: Its name in the table.
    split: The split to evaluate on.
    data: A prepared folder. None: the run's own.
    tokens: Number of tokens to generate. 0: none.
    batches: Batches to evaluate. 0: the whole split.

  Raises:
    UserError: See `load.load` and `token_rows.open_data`.
  """
  run = token_rows.reading(load.load(folder, use="evaluate"), data)
  c, text = token_rows.open_data(run, split, data=data)
  step = evaluation.make_step(run.parts.objective, run.mesh)
  with jax.set_mesh(run.mesh):
    score = lambda limit: evaluation.evaluate_on(text, run.mesh, c.data, step, run.weights, limit)
    score(1)  # compiles
    start = time.perf_counter()
    result = score(batches)
  seconds = time.perf_counter() - start
  named = {path: np.asarray(x) for path, x in tree.flatten(run.params).items()}
  zeros = sum(int((x == 0).sum()) for x in named.values())
  return Row(
    name=name,
    stored=stored_bytes(folder, named),
    zeros=zeros / sum(x.size for x in named.values()),
    loss=result["loss"],
    bits_per_byte=result.get("bits_per_byte"),
    evaluated=result["tokens"] / seconds,
    generated=_speed(run, tokens) if tokens else None,
  )


def stored_bytes(folder: epath.PathLike, weights: dict[str, np.ndarray]) -> int:
  """Bytes of a run's weights in its checkpoint.

  Args:
    folder: The run folder.
    weights: {path: array}, dequantized.
  """
  forms = quantized_weights.of_run(folder)
  size = sum(x.nbytes for path, x in weights.items() if path not in forms)
  for form in forms.values():
    for shape, dtype in form.shapes().values():
      size += int(np.prod(shape)) * np.dtype(dtype).itemsize
  return size


def _speed(run: load.Run, tokens: int) -> float | None:
  """Tokens per second of one greedy text, after one that compiles.

  No token ends it, so that all runs of a table generate as many.
  """
  if run.c.model.head != "lm" or not run.c.model.causal:
    return None
  run = run._replace(generation=run.generation.without_ends())
  engine = Engine(run, max_rows=1)
  prompt = tuple(prompts.Prompts(run).text(""))
  request = Request(prompt, tokens, load.Sampling(temperature=0.0))
  speeds = []
  for _ in range(2):
    before, start = engine.stats().decoded, time.perf_counter()
    engine.texts([request])
    speeds.append((engine.stats().decoded - before) / (time.perf_counter() - start))
  return speeds[-1]


def names_of(folders: Sequence[epath.PathLike]) -> list[str]:
  """Short names of run folders: the last parts of their paths that tell them apart."""
  parts = [epath.Path(folder).parts for folder in folders]
  depth = 1
  while len({p[-depth:] for p in parts}) < len(set(parts)):
    depth += 1
  return ["/".join(p[-depth:]) for p in parts]


def head(first: Row, split: str) -> list[str]:
  """The head of the table in Markdown.

  Args:
    first: The original.
    split: The split of the scores.
  """
  score = "loss" if first.bits_per_byte is None else "bits per byte"
  return [
    f"| run | bytes | zeros | {split} {score} | change | evaluated tokens/s | generated tokens/s |",
    "|---|---|---|---|---|---|---|",
  ]


def line_of(row: Row, first: Row) -> str:
  """A row of the table in Markdown, with its change relative to the first row."""
  before = first.loss if first.bits_per_byte is None else first.bits_per_byte
  value = row.loss if row.bits_per_byte is None else row.bits_per_byte
  change = "" if row is first else f"{value / before - 1:+.2%}"
  generated = f"{row.generated:,.0f}" if row.generated else ""
  return (
    f"| {row.name} | {row.stored:,} | {row.zeros:.1%} | {value:.4f} | {change} | "
    f"{row.evaluated:,.0f} | {generated} |"
  )


def check_runs(folders: Sequence[epath.PathLike]) -> None:
  """Raises a UserError for a folder that holds no run."""
  for folder in folders:
    run_folder.require_run(folder)


def device() -> str:
  """The device that the speeds are of."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
