"""Explains what a run computes from one prompt: the numbers of the page of `jaxgpt explain`.

T position, N heads, L layers, K alternatives.
"""

import base64
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxgpt import tree
from jaxgpt.analysis.interpret import (
  attribution,
  gradients,
  heads,
  lens,
  lens_file,
  patching,
  taps,
  tuned_lens,
)
from jaxgpt.errors import UserError
from jaxgpt.inference.load import Run
from jaxgpt.inference.prompts import Prompts
from jaxgpt.model import transformer
from jaxgpt.text.tokenizers import base, token_bytes
from jaxgpt.tree import PyTree

_MOST_MAP_BYTES = 16_000_000  # of attention maps in a page
_REPEATS = (8, 24)  # rows and length of a copy that heads are scored on
_DIGITS = 4


class Model(NamedTuple):
  """A model as it is explained: in float32, with adapters merged."""

  model: transformer.Transformer
  params: PyTree
  c: ml_collections.ConfigDict
  tokenizer: base.Tokenizer

  @property
  def kind(self) -> str:
    """'causal', 'masked', 'rows' (a prediction per row), 'tokens' (a class per token) or 'none'."""
    m = self.c.model
    if m.head == "lm":
      return "causal" if m.causal else "masked"
    return {"classifier": "rows", "token_classifier": "tokens"}.get(m.head, "none")


class Explained(NamedTuple):
  """The answer that gradients and causal tracing explain.

  Attributes:
    position: Index of the token where the prediction is made, None for a prediction per row.
    right: The likeliest prediction.
    wrong: The second likeliest.
  """

  position: int | None
  right: int
  wrong: int

  def answer(self) -> patching.Answer:
    """The difference of the two logits."""
    at = None if self.position is None else np.asarray([self.position])
    return patching.Answer(at, np.asarray([self.right]), np.asarray([self.wrong]))


def of_run(run: Run) -> Model:
  """Prepares the model of a run, which `inference.load.load` read."""
  model, params = taps.merged(run.parts.model, run.params)
  fields = model.cfg.to_dict() | dict(dtype="float32")
  model = model.clone(cfg=ml_collections.FrozenConfigDict(fields))
  return Model(model, params, run.c, run.tokenizer)


def encode(run: Run, prompt: str, option: str = "--prompt") -> list[int]:
  """The token ids of a prompt, as the model read texts in training.

  Args:
    run: The run. For models that read both sides of a token, the name of the mask token in the
      prompt, such as [MASK], stands for it.
    prompt: The text.
    option: What the prompt is called in messages.

  Raises:
    UserError: The prompt is empty or longer than the context.
  """
  m, tokenizer = run.c.model, run.tokenizer
  if not prompt:
    raise UserError(f"{option}='': there is nothing to explain; give a text")
  if m.causal:
    ids = Prompts(run).text(prompt)
  else:
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt, specials=True), tokenizer.eos_id]
  tokenizer.check_rows(ids, m.vocab_size)
  if len(ids) > m.max_len:
    raise UserError(
      f"{option} has {len(ids)} tokens, the model's context {m.max_len} (model.max_len); shorten it"
    )
  size = m.num_layers * m.num_heads * len(ids) ** 2
  if size > _MOST_MAP_BYTES:
    most = int((_MOST_MAP_BYTES / m.num_layers / m.num_heads) ** 0.5)
    raise UserError(
      f"{option} has {len(ids)} tokens: the attention maps of {m.num_layers} layers of "
      f"{m.num_heads} heads would make a page of {size * 4 // 3_000_000} MB; shorten it to {most}"
    )
  return ids


def names_of(tokenizer: base.Tokenizer, size: int) -> Callable[[int], str]:
  """A function from token ids to their texts on a page, with the spaces of tokens.

  Args:
    tokenizer: The tokenizer.
    size: Rows of the model's embedding, of which some may be no token.
  """
  specials = {i: name for name, i in tokenizer.special_ids.items()}
  try:
    pieces: Sequence[bytes] | None = token_bytes.of(tokenizer)
  except UserError:  # such as WordPiece, whose tokens do not stand for bytes
    pieces = None

  def name(i: int) -> str:
    if i in specials:
      return specials[i]
    if i >= min(size, tokenizer.vocab_size):
      return f"<{i}>"
    if pieces is None:
      return tokenizer.decode([i], specials=True)
    try:
      text = pieces[i].decode()
    except UnicodeDecodeError:  # a part of a character
      return "".join(f"\\x{byte:02x}" for byte in pieces[i])
    return "".join(c if c.isprintable() or c in " \n\t" else f"\\x{ord(c):02x}" for c in text)

  return name


def explain(
  run: Run,
  prompt: str,
  corrupted: str | None = None,
  top: int = 8,
  tuned: lens_file.Found | None = None,
) -> dict[str, Any]:
  """Explains the predictions for a prompt.

  Args:
    run: From `load.load`, on one device.
    prompt: The prompt.
    corrupted: A second prompt with as many tokens, for causal tracing, or None.
    top: Number of alternatives to a prediction.
    tuned: A tuned lens of the run, to show next to the logit lens.

  Returns:
    A dict for JSON, which `page.render` shows. Entries that make no sense for the model are None,
    with the reason in 'left_out'.

  Raises:
    UserError: See `encode`; or the prompts differ in length, or in nothing.
  """
  m = of_run(run)
  ids = encode(run, prompt)
  other = None if corrupted is None else _encode_other(run, corrupted, ids)
  inputs = taps.Inputs(jnp.asarray([ids]))
  cfg, left_out = m.model.cfg, list[str]()
  why_not = attribution.obstacle(cfg)
  wanted = {"resid_pre", "resid_final", "pattern", "heads", *(() if why_not else attribution.READS)}
  if not taps.layers_with(cfg, "mlp_out"):
    wanted.discard("mlp_out")
  read = lambda inputs: taps.read(m.model, m.params, inputs, tuple(sorted(wanted)))
  reading = read(inputs)
  name = names_of(m.tokenizer, cfg.vocab_size)
  labels = list(m.c.model.label_names) if m.kind in ("rows", "tokens") else []
  choice = (
    (lambda i: labels[i] if i < len(labels) else f"class {i}")
    if m.kind in ("rows", "tokens")
    else name
  )
  page = _begun(m, run, prompt, [name(i) for i in ids])
  page["attention"] = _maps(reading.at["pattern"])
  page["left_out"] = left_out
  if m.kind == "none" or _is_regression(m.c):
    left_out.append(
      "Predictions, lens and attributions: this model gives no choice between tokens or classes."
    )
    return page
  page["predictions"] = _predictions(m.kind, reading.output.logits[0], ids, choice, top)
  streams = lens.streams(reading.at)
  page["lens"] = _lens(m, inputs, streams, choice)
  if tuned is not None:
    streams = tuned_lens.translated(streams, tuned.translators)
    page["tuned_lens"] = _lens(m, inputs, streams, choice) | {"file": str(tuned.path)}
  explained = _explained(m, ids, reading.output.logits[0])
  if why_not:
    left_out.append(f"Attribution to components: {why_not}.")
  else:
    page["components"] = _components(m, reading, name)
  if cfg.num_labels > 1 or m.kind in ("causal", "masked"):
    page["gradients"] = _gradients(m, inputs, ids, explained, choice)
  if m.kind == "causal":
    page["scores"] = _scores(m)
  else:
    left_out.append(
      "Induction and previous-token scores: they are for models that continue a text."
    )
  if other is not None:
    corrupted_inputs = taps.Inputs(jnp.asarray([other]))
    readings = reading, read(corrupted_inputs)
    page["trace"] = _trace(m, corrupted_inputs, readings, explained, name, choice)
    page["trace"]["differ"] = [t for t, (a, b) in enumerate(zip(ids, other, strict=True)) if a != b]
  return page


def _begun(m: Model, run: Run, prompt: str, tokens: list[str]) -> dict[str, Any]:
  """A page without its parts."""
  parts = (
    *("attention", "predictions", "lens", "tuned_lens"),
    *("components", "gradients", "scores", "trace", "left_out"),
  )
  about = {"model": _about(m, run), "prompt": prompt, "tokens": tokens, "kind": m.kind}
  return about | dict.fromkeys(parts)


def _is_regression(c: ml_collections.ConfigDict) -> bool:
  return c.model.head == "classifier" and c.model.num_labels == 1


def _about(m: Model, run: Run) -> dict[str, Any]:
  cfg = m.model.cfg
  return {
    "preset": cfg.preset,
    "layers": cfg.num_layers,
    "heads": cfg.num_heads,
    "width": cfg.width,
    "parameters": tree.count(m.params),
    "step": run.step,
    "imported": not run.data_digest,
  }


def _maps(pattern: jax.Array) -> dict[str, Any]:
  """Attention [L, 1, N, T, S] as bytes from 0 to 255, in base64."""
  a = np.asarray(pattern[:, 0], np.float32)
  data = np.round(a.clip(0, 1) * 255).astype(np.uint8)
  return {"shape": list(a.shape), "data": base64.b64encode(data.tobytes()).decode()}


def _top(probabilities: np.ndarray, k: int, choice: Callable[[int], str]) -> list[list[Any]]:
  order = np.argsort(-probabilities, kind="stable")[:k]
  return [[choice(int(i)), _short(probabilities[i])] for i in order]


def _short(x: Any) -> Any:
  """Numbers with as many digits as a page shows."""
  if np.ndim(x):
    return [_short(v) for v in x]
  return float(f"{float(x):.{_DIGITS}g}")


def _predictions(
  kind: str, logits: jax.Array, ids: list[int], choice: Callable[[int], str], top: int
) -> list[dict[str, Any]]:
  """For each position, or for the row: alternatives, and how likely the text's own token is."""
  p = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
  if kind == "rows":
    return [{"top": _top(p, top, choice), "own": None}]
  out = []
  for t, row in enumerate(p):
    own = None
    if kind == "causal" and t + 1 < len(ids):
      own = _short(row[ids[t + 1]])
    elif kind == "masked":
      own = _short(row[ids[t]])
    out.append({"top": _top(row, top, choice), "own": own})
  return out


def _lens(m: Model, inputs: taps.Inputs, streams: jax.Array, choice: Any) -> dict[str, Any]:
  found = lens.logit_lens(m.model, m.params, inputs, streams, k=3)
  names, p = np.asarray(found.ids[:, 0]), np.asarray(found.probabilities[:, 0])
  if m.kind == "rows":
    names, p = names[:, None], p[:, None]
  top = [
    [
      [[choice(int(i)), _short(x)] for i, x in zip(*at, strict=True)]
      for at in zip(*of, strict=True)
    ]
    for of in zip(names, p, strict=True)
  ]
  return {
    "top": top,
    "entropy": _short(np.atleast_2d(np.asarray(found.entropy[:, 0]).reshape(len(top), -1))),
  }


def _explained(m: Model, ids: list[int], logits: jax.Array) -> Explained:
  """What is explained: the last token's prediction, that of the first mask, or that of the row."""
  position: int | None = len(ids) - 1
  if m.kind == "rows":
    position = None
  elif m.kind != "causal":
    masks = [t for t, i in enumerate(ids) if i == m.tokenizer.mask_id]
    position = masks[0] if masks else len(ids) - 2
  row = np.asarray(logits if position is None else logits[position])
  right, wrong = np.argsort(-row, kind="stable")[:2]
  return Explained(position, int(right), int(wrong))


def _components(m: Model, reading: taps.Reading, name: Callable[[int], str]) -> dict[str, Any]:
  """Direct logit attribution of the likeliest token at each position."""
  target = reading.output.logits.argmax(-1)
  found = attribution.attribute(m.model, m.params, reading, target)
  heads_LNT = None if found.heads is None else _short(np.asarray(found.heads[:, :, 0]))
  return {
    "names": attribution.names(m.model.cfg),
    "values": _short(np.asarray(found.components[:, 0])),
    "heads": heads_LNT,
    "total": _short(np.asarray(found.total[0])),
    "target": [name(int(i)) for i in target[0]],
    "gap": float(f"{float(found.gap):.1e}"),
    "softcap": m.model.cfg.logit_softcap,
  }


def _baseline(m: Model, ids: list[int]) -> list[int]:
  """Ids that stand for no information: mask or padding, with the special tokens of the prompt."""
  t = m.tokenizer
  blank = next(
    i for i in (t.mask_id if m.kind != "causal" else None, t.pad_id, t.eos_id) if i is not None
  )
  blank = blank if blank < m.c.model.vocab_size else t.eos_id
  specials = {t.bos_id, t.eos_id}
  return [i if i in specials else blank for i in ids]


def _gradients(
  m: Model, inputs: taps.Inputs, ids: list[int], explained: Explained, choice: Callable[[int], str]
) -> dict[str, Any]:
  baseline = _baseline(m, ids)
  blank = taps.Inputs(jnp.asarray([baseline]))
  answer = explained.answer()
  found = gradients.integrated(m.model, m.params, inputs, blank, answer)
  changed = [b for b, i in zip(baseline, ids, strict=True) if b != i]
  return {
    "integrated": _short(np.asarray(found.tokens[0])),
    "value": _short(found.value[0]),
    "baseline": _short(found.baseline[0]),
    "blank": names_of(m.tokenizer, m.c.model.vocab_size)(changed[0]) if changed else "",
    "error": float(f"{found.error:.1e}"),
    "complete": found.error <= 1e-3,
    "points": found.points,
    "position": explained.position,
    "right": choice(explained.right),
    "wrong": choice(explained.wrong),
  }


def _scores(m: Model) -> dict[str, Any]:
  rows, half = _REPEATS
  half = min(half, m.c.model.max_len // 2)
  tokens = heads.repeated(
    jax.random.key(0), rows, half, min(m.tokenizer.vocab_size, m.c.model.vocab_size)
  )
  found = heads.scores(m.model, m.params, tokens)
  return {"half": half, "rows": rows} | {
    name: np.asarray(x).round(3).tolist() for name, x in found._asdict().items()
  }


def _encode_other(run: Run, corrupted: str, ids: list[int]) -> list[int]:
  """The ids of the corrupted prompt, checked against those of the prompt."""
  other = encode(run, corrupted, "--corrupted")
  if len(other) != len(ids):
    raise UserError(
      f"--corrupted has {len(other)} tokens, --prompt {len(ids)}; activations are patched position "
      "by position, so give prompts of equally many tokens"
    )
  if other == ids:
    raise UserError("--corrupted is the same text as --prompt; change a word")
  return other


def _trace(
  m: Model,
  inputs: taps.Inputs,
  readings: tuple[taps.Reading, taps.Reading],
  explained: Explained,
  name: Callable[[int], str],
  choice: Callable[[int], str],
) -> dict[str, Any]:
  """Causal tracing by position and, at all positions together, by head."""
  logits = readings[1].output.logits[0]
  theirs = np.asarray(logits if explained.position is None else logits[explained.position])
  wrong = next(int(i) for i in np.argsort(-theirs, kind="stable") if i != explained.right)
  answer = explained._replace(wrong=wrong).answer()
  restored = lambda tap, by: patching.restore(m.model, m.params, inputs, answer, tap, by, *readings)
  positions, by_head = restored("resid_pre", "position"), restored("heads", "head")
  return {
    "tokens": [name(i) for i in inputs.tokens[0].tolist()],
    "right": choice(explained.right),
    "wrong": choice(wrong),
    "clean": _short(positions.clean[0]),
    "corrupted": _short(positions.corrupted[0]),
    "positions": _short(np.asarray(positions.recovered[..., 0])),
    "heads": _short(np.asarray(by_head.recovered[..., 0])),
  }
