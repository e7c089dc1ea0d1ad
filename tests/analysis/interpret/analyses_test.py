"""Lens, attribution, patching and gradients, on a model with transformers' own activations."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.analysis.interpret import attribution, gradients, heads, lens, patching, taps
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from tests.model.parity_test import D, L, N, T, V, gpt2, torch

NAMES = ("resid_pre", "pattern", *attribution.READS)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pair():
  """(model, params, inputs, reading, transformers' output of the same GPT-2)."""
  torch.manual_seed(0)
  theirs, params, fields = gpt2()
  theirs.set_attn_implementation("eager")
  c = config.base()
  c.model.update(fields | dict(vocab_size=V, max_len=T, num_layers=L, width=D, num_heads=N))
  c.data.seq_len = T
  model = transformer.Transformer(ml_collections.FrozenConfigDict(config.resolve(c).model))
  model = taps.readable(model)
  tokens = np.random.default_rng(0).integers(0, V, (2, T))
  with torch.no_grad():
    want = theirs(torch.from_numpy(tokens), output_attentions=True, output_hidden_states=True)
  want.lens = [
    theirs.lm_head(theirs.transformer.ln_f(h)).detach().numpy() for h in want.hidden_states[:-1]
  ]
  inputs = taps.Inputs(jnp.asarray(tokens))
  return model, params, inputs, taps.read(model, params, inputs, NAMES), want


def test_maps_and_lens_equal_those_of_transformers(pair):
  model, params, inputs, reading, want = pair
  for layer in range(L):
    np.testing.assert_allclose(
      reading.at["pattern"][layer], want.attentions[layer].numpy(), atol=TOLERANCE
    )
    np.testing.assert_allclose(
      reading.at["resid_pre"][layer], want.hidden_states[layer].numpy(), atol=TOLERANCE
    )
  # The last of transformers' hidden states is after the final norm.
  np.testing.assert_allclose(reading.output.hidden, want.hidden_states[-1].numpy(), atol=TOLERANCE)
  found = lens.logit_lens(model, params, inputs, lens.streams(reading.at), k=V)
  every = np.stack([*want.lens, want.logits.numpy()])
  log_p = np.asarray(jax.nn.log_softmax(every))
  got = np.take_along_axis(np.exp(log_p), np.asarray(found.ids), -1)
  np.testing.assert_allclose(found.probabilities, got, atol=TOLERANCE)
  np.testing.assert_allclose(found.entropy, -(np.exp(log_p) * log_p).sum(-1), atol=1e-3)
  assert (np.diff(found.probabilities, axis=-1) <= 0).all()


@pytest.mark.parametrize("scale", [1.0, 0.22])
def test_a_logit_is_the_sum_of_its_components(pair, scale):
  model, params, inputs, _, _ = pair
  fields = model.cfg.to_dict() | {"residual_scale": scale}
  model = model.clone(cfg=ml_collections.FrozenConfigDict(fields))
  reading = taps.read(model, params, inputs, NAMES)
  target = reading.output.logits.argmax(-1)
  contrast = (target + 1) % V
  at = lambda ids: jnp.take_along_axis(reading.output.logits, ids[..., None], -1)[..., 0]
  found = attribution.attribute(model, params, reading, target, contrast)
  assert len(attribution.names(model.cfg)) == len(found.components) == 2 * L + 2
  np.testing.assert_allclose(found.components.sum(0), at(target) - at(contrast), atol=1e-3)
  assert found.gap < 1e-3
  # Heads and the bias of their projection make up the attention of a layer.
  bias = params["layers"]["attn"]["o_bias"]
  without = jax.tree.map(jnp.array, params)
  without["layers"]["attn"]["o_bias"] = bias * 0
  rest = reading.at["attn_out"] - scale * bias[:, None, None]
  plain = reading._replace(at=reading.at | {"attn_out": rest})
  attn = attribution.attribute(model, without, plain, target, contrast).components[1 : L + 1]
  np.testing.assert_allclose(found.heads.sum(1), attn, atol=1e-3)


def test_models_whose_logits_are_no_sum_say_so():
  cfg = lambda **fields: ml_collections.FrozenConfigDict(
    dict(head="lm", norm_placement="pre", head_transform="none") | fields
  )
  assert attribution.obstacle(cfg()) == ""
  for fields in (dict(head="none"), dict(norm_placement="post"), dict(head_transform="norm")):
    (name,) = fields
    assert f"model.{name}=" in attribution.obstacle(cfg(**fields))


@pytest.fixture(scope="module")
def answer(pair):
  logits = pair[3].output.logits[:, -1]
  return patching.Answer(np.full(2, T - 1), logits.argmax(-1), logits.argmin(-1))


def test_integrated_gradients_are_complete(pair, answer):
  model, params, inputs, reading, _ = pair
  baseline = inputs._replace(tokens=inputs.tokens.at[:, 3:].set(0))
  found = gradients.integrated(model, params, inputs, baseline, answer)
  np.testing.assert_allclose(found.value, answer(reading.output.logits), atol=1e-4)
  assert np.abs(found.value - found.baseline).min() > 0.1
  np.testing.assert_allclose(found.tokens.sum(-1), found.value - found.baseline, atol=1e-3)
  assert found.error <= 1e-3
  assert (found.tokens[:, :3] == 0).all()  # these tokens are those of the baseline


def test_saliency_is_the_slope_along_an_embedding(pair, answer):
  model, params, inputs, reading, _ = pair
  norm, times_embedding = gradients.saliency(model, params, inputs, answer)
  assert norm.shape == (2, T) and (norm > 0).all()

  def moved(by):
    embed = reading.at["embed"].at[:, 5].multiply(1 + by)
    edits = {"embed": taps.Edit(True, embed)}
    return answer(taps.read(model, params, inputs, (), edits).output.logits)

  np.testing.assert_allclose(
    times_embedding[:, 5], (moved(0.01) - moved(-0.01)) / 0.02, rtol=0.05, atol=1e-3
  )


def test_patching_every_site_of_the_corrupted_position_restores_the_answer(pair, answer):
  model, params, clean, _, _ = pair
  where = np.asarray([5, 17])
  rows = np.arange(2)
  corrupted = clean._replace(
    tokens=clean.tokens.at[rows, where].set((clean.tokens[rows, where] + 7) % V)
  )
  found = patching.trace(model, params, clean, corrupted, answer)
  assert found.patched.shape == (L, T, 2)
  first = np.asarray(found.patched[0])  # of the embeddings
  np.testing.assert_allclose(first[where, rows], found.clean, atol=1e-4)
  for row, position in enumerate(where):
    others = np.delete(first[:, row], position)
    np.testing.assert_allclose(others, found.corrupted[row], atol=1e-4)
  np.testing.assert_array_equal(found.recovered[0].argmax(0), where)


def test_sites_that_do_not_exist_are_refused(pair):
  cfg = pair[0].cfg
  assert patching.sites(cfg, "heads", "head", T).shape == (L, N, L, 1, 1, N, 1)
  assert patching.sites(cfg, "mlp_out", "layer", T).shape == (L, 1, L, 1, 1, 1)
  with pytest.raises(UserError, match="'mlp_out' has no axis by head"):
    patching.sites(cfg, "mlp_out", "head", T)
  with pytest.raises(UserError, match="'embed' is of no layer"):
    patching.sites(cfg, "embed", "position", T)
  with pytest.raises(UserError, match="head 9 of layer 0 does not exist"):
    patching.ablate_heads(cfg, [(0, 9)])
  with pytest.raises(UserError, match="one length"):
    patching.trace(*pair[:3], taps.Inputs(np.zeros((2, 3), int)), None)


def test_repeated_tokens_and_the_heads_that_read_them():
  tokens = np.asarray(heads.repeated(jax.random.key(0), 3, 8, 40))
  np.testing.assert_array_equal(tokens[:, :8], tokens[:, 8:])
  assert all(len(set(row)) == 8 for row in tokens.tolist())
  assert len({tuple(row) for row in tokens.tolist()}) == 3
