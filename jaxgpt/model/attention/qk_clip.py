"""QK-clip (`optim.qk_clip`): attention logits are kept below a threshold by their weights.

After the update of a step, the weights of queries and keys of each head are scaled down if the
largest logit S of that head in this step's batch was above the threshold (MuonClip,
arXiv:2507.20534, section 2.1):

  g = min(1, threshold / S)
  queries and keys with heads of their own   W_q *= g^(1/2), W_k *= g^(1/2)
  grouped queries                            W_q *= g, since other heads share the key head
  latent attention: parts without positions  W_q *= g^(1/2), W_k *= g^(1/2)
                    rotated part             W_q *= g, since all heads share the rotated key

A logit is bilinear in queries and keys: with the weights before the update and the same inputs of
the layer, the largest logit of the head would be the threshold. Biases are scaled along with their
weights. The state has no more arrays than without.

B batch, T query position, S key position, N heads, K key heads, H head size, L layers of a stack.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt import tree
from jaxgpt.config.remat import QKV
from jaxgpt.model.attention.masks import MASKED, Band
from jaxgpt.model.attention.spec import Spec
from jaxgpt.tree import PyTree

# Name of the variables in which attention layers leave their largest logits, and of these among the
# sums of an objective, where microbatches combine them by their maximum.
LARGEST = "largest_logits"
Largest: TypeAlias = Mapping[str, jax.Array]  # {path of an attention layer: [L, N]}
_ROWS = 128  # queries whose logits exist at a time


def largest_logits(
  q_BTNH: jax.Array, k_BSKH: jax.Array, segments_BT: jax.Array, spec: Spec
) -> jax.Array:
  """max over the rows and all visible pairs (t, s) of scale * q_t k_s, [N] in float32.

  Kernels of attention do not return it, so the products of queries and keys are formed once more,
  for some queries at a time and without those keys that the mask hides from all of them.

  Args:
    q_BTNH: Queries.
    k_BSKH: Keys of the same tokens.
    segments_BT: 1, 2, ... for the documents of a row, 0 for padding.
    spec: Scale and mask. A softcap would bound the logits, so there must be none.

  Returns:
    `masks.MASKED` for a batch without tokens.
  """
  assert spec.softcap is None
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q = q_BTNH.reshape(B, T, K, N // K, H)
  out = jnp.full((N,), MASKED, jnp.float32)
  for start in range(0, T, _ROWS):
    end = min(start + _ROWS, T)
    first, last = 0, T
    if spec.causal:
      last = end
    if spec.window is not None:
      first, last = max(0, start - spec.window + 1), min(last, end + spec.window - 1)
    logits = jnp.einsum(
      "BTKGH,BSKH->BKGTS",
      q[:, start:end],
      k_BSKH[:, first:last],
      preferred_element_type=jnp.float32,
    )
    queries, keys = segments_BT[:, start:end, None], segments_BT[:, None, first:last]
    band = Band(spec.causal, spec.window, start - first).array(end - start, last - first)
    mask = (queries == keys) & (keys > 0) & band
    logits = jnp.where(mask[:, None, None], logits * spec.scale, MASKED)
    out = jnp.maximum(out, logits.max((0, 3, 4)).reshape(N))
  return out


def split(sums: Mapping[str, Any]) -> tuple[dict[str, jax.Array], Largest]:
  """An objective's sums without the largest logits, and these: {} without QK-clip."""
  return {k: v for k, v in sums.items() if k != LARGEST}, sums.get(LARGEST, {})


def clip(
  params: PyTree,
  largest: Largest,
  cfg: ml_collections.FrozenConfigDict,
  limit: float,
) -> PyTree:
  """Parameters with the weights of queries and keys scaled down.

  Args:
    params: The parameters after the update.
    largest: {path of an attention layer: [L, N]}.
    cfg: The config's `model` section.
    limit: The threshold, above 0.
  """
  factors = {}
  for layer, largest_LN in largest.items():
    whole = jnp.where(largest_LN > limit, limit / largest_LN, 1.0)
    half, whole = (x[:, :, None] for x in (jnp.sqrt(whole), whole))  # [L, N, 1]
    if cfg.latent.kv_rank:
      plain = cfg.head_dim - cfg.latent.rope_dim
      q = jnp.where(jnp.arange(cfg.head_dim) < plain, half, whole)
      k = half
    elif cfg.num_kv_heads == cfg.num_heads:
      q = k = half
    else:
      q, k = whole, jnp.ones((), whole.dtype)
    for name, factor in zip(QKV[:2], (q, k), strict=True):
      factors[f"{layer}/{name}"] = factor if factor.ndim == 0 else factor[:, None]
      factors[f"{layer}/{name}_bias"] = factor
  return tree.map_named(lambda path, x: x * factors[path] if path in factors else x, params)


def metrics(largest: Largest, limit: float) -> dict[str, jax.Array]:
  """The largest logit of all heads and the number of heads above the threshold, as scalars.

  Args:
    largest: As in `clip`. Without layers there are no metrics.
    limit: The threshold.
  """
  if not largest:
    return {}
  heads = jnp.concatenate([x.ravel() for x in largest.values()])
  above = (heads > limit).sum(dtype=jnp.float32)
  return {"largest_logit": heads.max(), "clipped_heads": above}
