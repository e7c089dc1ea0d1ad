"""Features of a run's layer: activations to train a sparse autoencoder on, its reconstruction, and
the places of the text where each feature is most active.

The first token of each span is left out: models write large activations there that are about no
text (attention sinks, arXiv:2309.17453), and they would make up most of the variance.

B batch, T position, D dimensions, F features, M activations, E examples of a feature.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.analysis.interpret import explain, sparse_autoencoder, taps
from jaxgpt.analysis.interpret.sparse_autoencoder import Autoencoder
from jaxgpt.data import pipeline, source
from jaxgpt.data.layouts import layout
from jaxgpt.errors import UserError
from jaxgpt.tree import PyTree


class Place(NamedTuple):
  """The activations that are read.

  Attributes:
    tap: A tap of layers with one vector for each token: not `pattern` or `heads`.
    layer: Number of the layer, from 0.
  """

  tap: str
  layer: int


class Rows(NamedTuple):
  """A batch, with the origin of its rows.

  Attributes:
    batch: Arrays [B, T].
    spans: For each row (source, document, first stored token, length) of its spans, in order.
  """

  batch: PyTree
  spans: list[list[tuple[int, int, int, int]]]


class Scores(NamedTuple):
  """How good a reconstruction is.

  Attributes:
    explained: Share of the variance of the activations that the reconstruction explains.
    loss: Mean loss of the model as it is, in nats per prediction.
    replaced: The same if the reconstruction replaces the activations.
    zero: The same if zeros do.
    dead: Number of features that are active nowhere.
    density: [F], the share of the tokens where each feature is active.
    tokens: Number of tokens that this was measured on.
  """

  explained: float
  loss: float
  replaced: float
  zero: float
  dead: int
  density: np.ndarray
  tokens: int

  @property
  def recovered(self) -> float:
    """Share of the loss that zeros cost and the reconstruction does not."""
    return (self.zero - self.replaced) / (self.zero - self.loss)


class Example(NamedTuple):
  """A place where a feature is active.

  Attributes:
    activation: Its coefficient there.
    source: Index of the source of the data.
    doc: The document.
    token: Index of the stored token in the document.
  """

  activation: float
  source: int
  doc: int
  token: int


def check(m: explain.Model, place: Place) -> None:
  """Checks that a model has a place, and predicts tokens.

  Raises:
    UserError: It has not, or does not.
  """
  if m.c.model.head != "lm":
    raise UserError(f"model.head={m.c.model.head!r}: features are for models that predict tokens")
  taps.check(m.model.cfg, [place.tap])
  layers = taps.layers_with(m.model.cfg, place.tap)
  if place.layer not in layers:
    raise UserError(
      f"--layer={place.layer}: {place.tap} is in layers {', '.join(map(str, layers))} of this model"
    )


def rows(data: pipeline.Batches, count: int) -> Iterator[Rows]:
  """Batches of a split, shuffled, or all of it in order if it is no larger than asked for.

  Args:
    data: From `token_rows.open_split`.
    count: Number of rows, rounded up to whole batches.
  """
  limit = -(-count // data.batch_size)
  if limit < data.steps_per_epoch:
    for step in range(limit):
      origin = [(row.source, row.row) for row in data.rows(step)]
      yield Rows(data.batch(step), _spans(data, origin))
  else:
    for step, batch in enumerate(data.epoch_batches(threads=0, prefetch=0)):
      yield Rows(batch, _spans(data, data.epoch_rows(step)))


def _spans(
  data: pipeline.Batches, origin: Sequence[tuple[int, int]]
) -> list[list[tuple[int, int, int, int]]]:
  return [
    [
      (number, int(span[0]), int(span[1]), int(span[2]))
      for span in layout.each(data.sources[number].pack.spans(row))
    ]
    for number, row in origin
  ]


def _used(batch: PyTree) -> jax.Array:
  """[B, T]: the tokens that are looked at."""
  return (batch["segment_ids"] > 0) & (batch["positions"] > 0)


def _forward(
  m: explain.Model, params: PyTree, batch: PyTree, place: Place, value: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """([B, T, D] activations at a place, summed loss), with a value in place of them if given."""
  layers = taps.layers_with(m.model.cfg, place.tap)
  edits = {}
  if value is not None:
    here = jnp.asarray([i == place.layer for i in layers])[:, None, None, None]
    edits = {place.tap: taps.Edit(here & _used(batch)[..., None], value[None])}
  inputs = taps.Inputs(batch["tokens"], batch["segment_ids"], batch["positions"])
  reading = taps.forward(m.model, params, inputs, (place.tap,), edits)
  log_p = jax.nn.log_softmax(reading.output.logits)
  of_targets = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
  return reading.at[place.tap][layers.index(place.layer)], -(
    of_targets * batch["loss_weights"]
  ).sum()


def activations(m: explain.Model, batches: Sequence[Rows], place: Place) -> np.ndarray:
  """The activations [M, D] at a place, in float32 on the host.

  Args:
    m: From `explain.of_run`.
    batches: From `rows`.
    place: The place, see `check`.
  """
  read = jax.jit(lambda params, batch: _forward(m, params, batch, place)[0])
  return np.concatenate(
    [np.asarray(read(m.params, b.batch), np.float32)[np.asarray(_used(b.batch))] for b in batches]
  )


def measure(
  m: explain.Model, autoencoder: Autoencoder, batches: Sequence[Rows], place: Place
) -> Scores:
  """Measures a reconstruction on text.

  Args:
    m: From `explain.of_run`.
    autoencoder: From `sparse_autoencoder.fit`.
    batches: From `rows`; other ones than it was trained on.
    place: The place, see `check`.
  """

  @jax.jit
  def one(params: PyTree, batch: PyTree) -> dict[str, jax.Array]:
    used_BT1 = _used(batch)[..., None]
    x_BTD, loss = _forward(m, params, batch, place)
    z_BTF = sparse_autoencoder.encode(autoencoder, x_BTD)
    again_BTD = sparse_autoencoder.decode(autoencoder, z_BTF)
    total = lambda x: (x * used_BT1).sum((0, 1))
    return {
      "tokens": used_BT1.sum(),
      "predictions": batch["loss_weights"].sum(),
      "sum": total(x_BTD),
      "squares": total(jnp.square(x_BTD)),
      "rest": total(jnp.square(x_BTD - again_BTD)),
      "active": total(z_BTF > 0),
      "loss": loss,
      "replaced": _forward(m, params, batch, place, again_BTD)[1],
      "zero": _forward(m, params, batch, place, jnp.zeros_like(x_BTD))[1],
    }

  parts = [jax.device_get(one(m.params, b.batch)) for b in batches]
  t = {key: np.sum([np.asarray(p[key], np.float64) for p in parts], 0) for key in parts[0]}
  variance = (t["squares"] - np.square(t["sum"]) / t["tokens"]).sum()
  loss, replaced, zero = (float(t[k] / t["predictions"]) for k in ("loss", "replaced", "zero"))
  return Scores(
    float(1 - t["rest"].sum() / variance),
    loss,
    replaced,
    zero,
    dead=int((t["active"] == 0).sum()),
    density=t["active"] / t["tokens"],
    tokens=int(t["tokens"]),
  )


def examples(
  m: explain.Model,
  autoencoder: Autoencoder,
  batches: Sequence[Rows],
  place: Place,
  top: int,
  tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Example]]:
  """The places of a text where each feature is most active, at most one in each span.

  Args:
    m: From `explain.of_run`.
    autoencoder: From `sparse_autoencoder.fit`.
    batches: From `rows`.
    place: The place, see `check`.
    top: E.
    tell: Called with (batches done, all batches) after each.

  Returns:
    For each feature at most E examples with an activation above 0, the largest first.
  """

  @jax.jit
  def coefficients(params: PyTree, batch: PyTree) -> jax.Array:
    x_BTD, _ = _forward(m, params, batch, place)
    return sparse_autoencoder.encode(autoencoder, x_BTD) * _used(batch)[..., None]

  F = autoencoder.decoder.shape[0]
  best_EF = np.zeros((top, F), np.float32)
  where_EF = np.zeros((top, F, 3), np.int64)
  for done, (batch, spans) in enumerate(batches, 1):
    z_BTF = np.asarray(coefficients(m.params, batch))
    values, places = [best_EF], [where_EF]
    for z_TF, of_row in zip(z_BTF, spans):
      at = 0
      for number, doc, start, length in of_row:
        here_TF = z_TF[at : at + length]
        first_F = here_TF.argmax(0)
        values.append(here_TF.max(0)[None])
        origin = np.broadcast_to((number, doc), (F, 2))
        places.append(np.concatenate([origin, (start + first_F)[:, None]], 1)[None])
        at += length
    all_values, all_places = np.concatenate(values), np.concatenate(places)
    order_EF = np.argsort(-all_values, axis=0, kind="stable")[:top]
    best_EF = np.take_along_axis(all_values, order_EF, 0)
    where_EF = np.take_along_axis(all_places, order_EF[..., None], 0)
    tell(done, len(batches))
  return [
    [
      Example(float(best_EF[e, f]), *map(int, where_EF[e, f]))
      for e in range(top)
      if best_EF[e, f] > 0
    ]
    for f in range(F)
  ]


def passage(
  split: source.Split, example: Example, before: int, after: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Token ids (before, at, after) an example.

  Args:
    split: The split of the example's source.
    example: The example.
    before: Most tokens before it.
    after: Most tokens after it.
  """
  first = max(example.token - before, 0)
  last = min(example.token + 1 + after, int(split.lengths[example.doc]) + 1)
  ids = split.read(example.doc, first, last - first)
  at = example.token - first
  return ids[:at], ids[at : at + 1], ids[at + 1 :]


def record(
  feature: int, density: float, found: Sequence[Example], lines: Sequence[tuple[str, str]]
) -> dict[str, Any]:
  """A feature as plain JSON.

  Args:
    feature: Its number.
    density: Share of the tokens where it is active.
    found: Its examples.
    lines: (name of the document, passage) of each.
  """
  return {
    "feature": feature,
    "density": density,
    "examples": [
      {
        "activation": example.activation,
        "name": name,
        "document": example.doc,
        "token": example.token,
        "text": text,
      }
      for example, (name, text) in zip(found, lines, strict=True)
    ],
  }
