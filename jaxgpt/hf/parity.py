"""The parity certificate: outputs of transformers and of jaxgpt on the same prompts.

It belongs to an export or to an import. Both sides run in float32 from the weights in the files, so
a difference comes from the format or the mathematics and not from rounding to the files' dtype.

Legend: L layers, N prompts, T tokens, V vocabulary (or labels), D width.
"""

import json
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from jaxgpt import __version__, config
from jaxgpt.config import installed
from jaxgpt.errors import UserError, first_line
from jaxgpt.hf import labels
from jaxgpt.inference import load, sampling
from jaxgpt.inference.engine.engine import Engine
from jaxgpt.inference.engine.requests import Request
from jaxgpt.model import transformer
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import generation
from jaxgpt.storage import strict_json
from jaxgpt.storage.paths import sha256
from jaxgpt.text.tokenizers import base
from jaxgpt.training import build
from jaxgpt.tree import PyTree

JSON, TEXT = "parity.json", "parity.md"
PROMPTS = (
  "The quick brown fox jumps over the lazy dog, and",
  "def fibonacci(n):\n  return n if n < 2 else",
  "In 1905 Albert Einstein published four papers; the third, on the electrodynamics of",
)
LENGTH, NEW = 48, 16  # tokens: longest prompt; generated
_BLOCK = 16  # tokens of a block of the cache
# Largest difference of float32 outputs, as a fraction of the largest output. Deep models come to a
# quarter of it by rounding alone. The wrong one of two similar activations exceeds it.
NEAR = 1e-4
_PACKAGES = ("jax", "torch", "transformers")

Certificate = dict[str, Any]  # JSON values, see `certify`
Distance = dict[str, float]  # max_abs, mean_abs: of the difference; scale: max_abs of theirs


def certify(
  folder: epath.Path,
  c_model: ml_collections.ConfigDict,
  params: PyTree,
  tokenizer: base.Tokenizer,
  dtype: str,
  compare: bool = True,
) -> Certificate:
  """Compares a folder in Hugging Face's format with our model, on fixed prompts.

  Args:
    folder: The folder, exported or to be imported.
    c_model: The resolved `model` section.
    params: The weights as they are in the files: rounded, then cast to float32.
    tokenizer: The run's tokenizer.
    dtype: Dtype of the files.
    compare: False: record versions and digests, but compare nothing.

  Returns:
    'checked': whether outputs were compared. If not, 'why_not', and 'failed' if the reason is that
    transformers raised an exception. If so, 'logits', 'layers' and 'greedy' (see `_compare`).
    'tokenizer': {'equal': whether AutoTokenizer gives the same ids for the prompts, None if
    unknown}. 'dtypes', 'versions', 'files': {name: sha256}.
  """
  out: Certificate = {
    "checked": False,
    "tokenizer": {"equal": None, "why_not": ""},
    "dtypes": {"files": dtype, "compared_in": "float32"},
    "versions": {
      "python": platform.python_version(),
      "jaxgpt": __version__,
      **{name: installed.version(name) for name in (*_PACKAGES, *_quantization(folder))},
    },
    "files": {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.is_file()},
  }
  if not compare:
    return out | {"why_not": "--no-check was given"}
  if missing := _missing(folder):
    return out | {"why_not": f"{' and '.join(missing)} not installed; pip install 'jaxgpt[bench]'"}
  prompts = encode(tokenizer, max(1, min(LENGTH, c_model.max_len - NEW)))
  try:
    out["tokenizer"]["equal"] = _same_tokens(folder, tokenizer)
    theirs = _load_theirs(folder, c_model)
    answers = [_run_theirs(theirs, c_model, ids) for ids in prompts]
  except Exception as e:  # whatever transformers raises
    why = f"transformers raised {type(e).__name__}: {first_line(e, 200)}"
    return out | {"failed": True, "why_not": why}
  return out | {"checked": True, **_compare(theirs, answers, c_model, params, prompts)}


def need() -> None:
  """Raises a UserError if a package that a comparison needs is not installed."""
  if missing := _missing(None):
    raise UserError(
      f"--check needs {' and '.join(missing)}, not installed here: pip install 'jaxgpt[bench]'"
    )


def _missing(folder: epath.Path | None) -> list[str]:
  """Packages that are needed to load a folder, or any folder, and are not installed."""
  packages = ["torch", "transformers", *(_quantization(folder) if folder else ())]
  return [name for name in packages if installed.version(name) is None]


def _quantization(folder: epath.Path) -> list[str]:
  """The package that reads a folder's quantized weights, if it has any."""
  found = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
  return [found["quant_method"]] if found else []


def problems(c: Certificate) -> list[str]:
  """Lists what a certificate says is wrong, in sentences. [] means equal, or not checked."""
  if c.get("failed"):
    return [c["why_not"]]
  found = []
  if c["checked"]:
    off = [i for i, layer in enumerate(c["layers"]) if not _near(layer)]
    if not _near(c["logits"]):
      found.append(
        f"outputs differ from transformers' by {c['logits']['max_abs']:.1e} of "
        f"{c['logits']['scale']:.3g}" + (f", from layer {off[0]} on" if off else "")
      )
    if not c.get("greedy", {"equal": True})["equal"]:
      found.append("greedy continuations differ from transformers'")
  if c["tokenizer"]["equal"] is False:
    found.append("AutoTokenizer gives other token ids than the run's tokenizer")
  return found


def _near(figure: Distance) -> bool:
  return figure["max_abs"] <= NEAR * max(1.0, figure["scale"])  # False for NaN


def encode(tokenizer: base.Tokenizer, length: int) -> list[list[int]]:
  """Encodes the fixed prompts, each with bos and at most `length` tokens."""
  return [[tokenizer.bos_id, *tokenizer.encode(text)][:length] for text in PROMPTS]


def _same_tokens(folder: epath.Path, tokenizer: base.Tokenizer) -> bool | None:
  """Returns whether AutoTokenizer gives our token ids, or None if the export has no tokenizer."""
  import transformers

  if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
    return None
  theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
  return all(
    theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text) for text in PROMPTS
  )


class _Answer(NamedTuple):
  """The results of transformers for a prompt."""

  logits: np.ndarray
  layers: list[np.ndarray]
  greedy: list[int] | None  # None if the model is not causal


def _load_theirs(folder: epath.Path, c_model: ml_collections.ConfigDict) -> Any:
  import torch
  import transformers

  auto = getattr(transformers, AUTO[auto_class(c_model)])
  # Eager attention is the one implementation that all of their models follow to the letter.
  return auto.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager").eval()


def _run_theirs(model: Any, c_model: ml_collections.ConfigDict, ids: Sequence[int]) -> _Answer:
  import torch

  tokens, greedy = torch.tensor([ids]), None
  with torch.no_grad():
    out = model(tokens, output_hidden_states=True)
    if auto_class(c_model) == "causal":
      # Lists of end tokens and sampling defaults of the folder do not apply here.
      made = model.generate(
        tokens, do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
      )
      greedy = made[0, len(ids) :].tolist()
  layers = [h[0].numpy() for h in out.hidden_states[1:]]
  return _Answer(answer(out, c_model.head)[0].numpy(), layers, greedy)


def _compare(
  theirs: Any,
  answers: Sequence[_Answer],
  c_model: ml_collections.ConfigDict,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
) -> Certificate:
  """Compares logits, outputs of each layer and, for causal models, greedy continuations."""
  # Eight-bit products round more than the files differ, and transformers has none of them.
  exact = dict(dtype="float32", remat="none", quantize="none", quantize_gradients=False)
  ours = transformer.Transformer(ml_collections.FrozenConfigDict(c_model.to_dict() | exact))
  logits, layers = forward(ours, params, prompts)
  figures, by_layer, greedy = [], [], list[dict[str, Any]]()
  for i, (ids, want) in enumerate(zip(prompts, answers, strict=True)):
    mine = logits[i] if c_model.head in POOLED else logits[i, : len(ids)]
    figures.append(_distance(mine, want.logits))
    by_layer.append(
      [_distance(a[i, : len(ids)], b) for a, b in zip(layers, want.layers, strict=True)]
    )
    if want.greedy is not None:
      greedy.append({"prompt": PROMPTS[i], "theirs": want.greedy})
  out = {
    "architecture": type(theirs).__name__,
    "logits": _worst(figures),
    "layers": [_worst(x) for x in zip(*by_layer)],
  }
  if greedy:
    for one, mine in zip(greedy, continuations(ours, params, prompts), strict=True):
      one.update(ours=mine, equal=mine == one["theirs"])
    out["greedy"] = {"equal": all(g["equal"] for g in greedy), "continuations": greedy}
  return out


AUTO = {
  "causal": "AutoModelForCausalLM",
  "masked": "AutoModelForMaskedLM",
  "classifier": "AutoModelForSequenceClassification",
  "tags": "AutoModelForTokenClassification",
  "answers": "AutoModelForQuestionAnswering",
  "bare": "AutoModel",
}
POOLED = ("classifier", "pooler")  # heads with one output per prompt instead of one per token


def auto_class(c_model: ml_collections.ConfigDict) -> str:
  """Returns the key in `AUTO` of the class of transformers that loads the model."""
  if c_model.head == "lm":
    return "causal" if c_model.causal else "masked"
  if c_model.head == "token_classifier":
    return "answers" if labels.finds_answers(c_model) else "tags"
  return "classifier" if c_model.head == "classifier" else "bare"


def answer(out: Any, head: str) -> Any:
  """Returns the field of transformers' output that corresponds to our logits."""
  if head == "pooler":
    return out.pooler_output
  if hasattr(out, "start_logits"):
    import torch

    return torch.stack((out.start_logits, out.end_logits), -1)
  return out.last_hidden_state if head == "none" else out.logits


def forward(
  model: transformer.Transformer, params: PyTree, prompts: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
  """Computes our outputs for padded prompts.

  Args:
    model: The model.
    params: Its parameters.
    prompts: Token ids of each prompt.

  Returns:
    Logits NTV (NV with a pooled head), and the outputs of the layers LNTD. The last layer's are
    taken after the final norm, as in transformers' `hidden_states`.
  """
  length = max(map(len, prompts))
  tokens = np.zeros((len(prompts), length), np.int32)
  segments = np.zeros_like(tokens)
  for row, ids in enumerate(prompts):
    tokens[row, : len(ids)] = ids
    segments[row, : len(ids)] = 1
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  return apply(model, params, tokens, positions, segments)


def apply(
  model: transformer.Transformer, params: PyTree, *batch: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Computes logits and outputs of the layers, as `forward` does, for a batch of arrays."""
  run = jax.jit(lambda p, *args: model.apply({"params": p}, *args, layer_outputs=True))
  out = run(params, *batch)
  return np.asarray(out.logits), np.concatenate([out.layers[:-1], out.hidden[None]])


def continuations(
  model: transformer.Transformer,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  new: int = NEW,
) -> list[list[int]]:
  """Generates `new` tokens after each prompt, greedily, all prompts in a batch of the engine."""
  run = _without_folder(model, params, min(LENGTH + new, model.cfg.max_len))
  greedy = sampling.Sampling(temperature=0.0)
  found: dict[int, list[int]] = {}
  # Small blocks, so that prompts come in several chunks, as long ones do in use.
  engine = Engine(run, max_rows=len(prompts), block_size=_BLOCK)
  for piece in engine.run(Request(tuple(ids), new, greedy) for ids in prompts):
    found.setdefault(piece.request, []).extend(token.id for token in piece.tokens)
  return [found[number] for number in sorted(found)]


class _Ids(base.ByteTokenizer):
  """Stands for a model's tokenizer where only token ids count."""

  def __init__(self, vocab_size: int):
    super().__init__()
    self.vocab_size = vocab_size

  def decode(self, ids: Any, specials: bool = False) -> str:
    return ""


def _without_folder(model: transformer.Transformer, params: PyTree, context: int) -> load.Run:
  """A model as a run whose texts do not end."""
  c = config.base()
  c.model = ml_collections.ConfigDict(model.cfg.to_dict())
  c.data.seq_len = context
  shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
  own = [s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
  mesh: Any = own[0] if own else mesh_lib.make(c.mesh, jax.devices()[:1])
  nothing: Any = None
  parts = build.Parts(model, nothing, nothing, nothing, nothing)
  ends = generation.Generation({"eos_token_id": []})
  return load.Run(c, parts, mesh, params, 0, _Ids(model.cfg.vocab_size), "", ends)


def _distance(a: Any, b: Any) -> Distance:
  difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
  return {
    "max_abs": float(difference.max()),
    "mean_abs": float(difference.mean()),
    "scale": float(np.abs(b).max()),
  }


def _worst(figures: Sequence[Distance]) -> Distance:
  return {
    "max_abs": max(f["max_abs"] for f in figures),
    "mean_abs": float(np.mean([f["mean_abs"] for f in figures])),
    "scale": max(f["scale"] for f in figures),
  }


def write(folder: epath.Path, certificate: Certificate) -> None:
  """Writes the certificate as JSON and as Markdown."""
  (folder / JSON).write_text(strict_json.dumps(certificate, indent=2) + "\n")
  (folder / TEXT).write_text("\n".join(describe(certificate)) + "\n")


def describe(c: Certificate) -> list[str]:
  """Formats the certificate as lines of Markdown."""
  lines = ["# Parity certificate", ""]
  if not c["checked"]:
    lines.append(f"Not checked against transformers: {c['why_not']}.")
  else:
    figure = lambda f: f"{f['max_abs']:.2e} | {f['mean_abs']:.2e} | {f['scale']:.3g}"
    lines += [
      f"`{c['architecture']}.from_pretrained` with this folder and jaxgpt, both in float32, "
      f"on {len(PROMPTS)} fixed prompts:",
      "",
      "| | largest difference | mean difference | largest value |",
      "|---|---|---|---|",
      f"| logits | {figure(c['logits'])} |",
    ]
    lines += [f"| layer {i} | {figure(f)} |" for i, f in enumerate(c["layers"])]
  if greedy := c.get("greedy"):
    lines += [
      "",
      f"Greedy continuations of {NEW} tokens: " + ("equal." if greedy["equal"] else "NOT equal."),
    ]
    lines += [
      f"- {g['prompt']!r}: "
      + ("equal" if g["equal"] else f"ours {g['ours']}, theirs {g['theirs']}")
      for g in greedy["continuations"]
    ]
  of_tokenizer = c["tokenizer"]
  if of_tokenizer["why_not"]:
    lines += ["", f"No tokenizer: {of_tokenizer['why_not']}."]
  elif of_tokenizer["equal"] is not None:
    lines += [
      "",
      "AutoTokenizer gives the same token ids for the prompts."
      if of_tokenizer["equal"]
      else "AutoTokenizer gives OTHER token ids for the prompts.",
    ]
  lines += [
    "",
    f"Files are in {c['dtypes']['files']}. "
    + ", ".join(f"{k} {v or 'not installed'}" for k, v in c["versions"].items())
    + ".",
    "",
    "| file | sha256 |",
    "|---|---|",
  ]
  return lines + [f"| {name} | {digest} |" for name, digest in c["files"].items()]
