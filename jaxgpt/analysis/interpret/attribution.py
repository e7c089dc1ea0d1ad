"""Direct logit attribution: a logit as a sum of the outputs of components to the residual stream.

The residual stream before the final norm is a sum: embeddings, and the outputs of each layer's
attention and MLP. With the statistics of the norm held at their values, norm and head are affine.
So a logit is a sum with one term per component, and a constant from the biases of norm and head
(Elhage et al., 2021, "A Mathematical Framework for Transformer Circuits").

B batch, T position, D model, N heads, H head size, L layers, C components.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.analysis.interpret import taps
from jaxgpt.model import stacks, transformer
from jaxgpt.tree import PyTree

READS = ("embed", "heads", "attn_out", "mlp_out", "resid_final")


class Attribution(NamedTuple):
  """The terms of a logit, float32.

  Attributes:
    components: [C, B, T], in the order of `names`. Their sum is `total`.
    heads: [L, N, B, T], each head's share of its layer's attention, which in addition has the bias
      of its projection. None if a norm stands between heads and residual stream.
    total: The logit [B, T], before `model.logit_softcap`.
    gap: Largest difference between `total` and the model's own logit, from rounding.
  """

  components: jax.Array
  heads: jax.Array | None
  total: jax.Array
  gap: jax.Array


def obstacle(cfg: ml_collections.FrozenConfigDict) -> str:
  """The reason why a model's logits are no such sum, or ''. `cfg` is the `model` section."""
  if cfg.head != "lm":
    return f"model.head={cfg.head!r}: attribution to components is for logits over a vocabulary"
  if cfg.norm_placement == "post":
    return (
      "model.norm_placement='post': each layer normalizes the residual stream, so it is no sum of "
      "components"
    )
  if cfg.head_transform != "none":
    return f"model.head_transform={cfg.head_transform!r}: the head is not linear"
  return ""


def names(cfg: ml_collections.FrozenConfigDict) -> list[str]:
  """Names of the components: 'embed', 'attn 0', ..., 'mlp 0', ..., 'bias'."""
  return [
    "embed",
    *(f"attn {i}" for i in taps.layers_with(cfg, "attn_out")),
    *(f"mlp {i}" for i in taps.layers_with(cfg, "mlp_out")),
    "bias",
  ]


def of_layers(cfg: ml_collections.FrozenConfigDict, params: PyTree, *path: str) -> jax.Array:
  """A parameter of every layer, in the order of the layers: [L, ...].

  Args:
    cfg: The config's `model` section.
    params: All parameters.
    *path: Keys of the parameter within a layer, such as 'attn', 'o'.
  """
  found = []
  for stack in stacks.of(cfg):
    period = len(stack.kinds)
    blocks = (
      [params[stack.name]] if period == 1 else [params[stack.name][str(i)] for i in range(period)]
    )
    leaves = [functools.reduce(lambda node, key: node[key], path, block) for block in blocks]
    found.append(jnp.stack(leaves, 1).reshape(stack.num_layers, *leaves[0].shape[1:]))
  return jnp.concatenate(found)


@functools.partial(jax.jit, static_argnames="model")
def attribute(
  model: transformer.Transformer,
  params: PyTree,
  reading: taps.Reading,
  target_BT: jax.Array,
  contrast_BT: jax.Array | None = None,
) -> Attribution:
  """Attributes the logit of a token at each position, or the difference of two logits.

  Args:
    model: From `taps.merged`, one without an `obstacle`.
    params: All its parameters.
    reading: Readings of the taps `READS`.
    target_BT: Token ids.
    contrast_BT: Token ids whose logits are subtracted, or None.
  """
  cfg, at = model.cfg, jax.tree.map(lambda x: x.astype(jnp.float32), reading.at)
  table_VD = params["embed"] if cfg.tie_embeddings else params["head"].T
  bias_V = params.get("head_bias", jnp.zeros(table_VD.shape[0]))
  of = lambda rows, ids: jnp.take(rows, ids, axis=0).astype(jnp.float32)
  w_BTD, constant_BT = of(table_VD, target_BT), of(bias_V, target_BT)
  if contrast_BT is not None:
    w_BTD -= of(table_VD, contrast_BT)
    constant_BT -= of(bias_V, contrast_BT)
  w_BTD *= cfg.output_scale
  norm = params["final_norm"]
  if "bias" in norm:
    constant_BT += w_BTD @ norm["bias"]
  # norm(x) · w with fixed statistics is x · u.
  x_BTD, u_BTD = at["resid_final"], w_BTD * norm["scale"]
  if cfg.norm == "layernorm":
    x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    u_BTD -= u_BTD.mean(-1, keepdims=True)
  u_BTD *= jax.lax.rsqrt(jnp.square(x_BTD).mean(-1, keepdims=True) + cfg.norm_eps)
  parts = [at["embed"][None], at["attn_out"]]
  if "mlp_out" in at:
    parts.append(at["mlp_out"])
  terms = jnp.einsum("CBTD,BTD->CBT", jnp.concatenate(parts), u_BTD)
  components = jnp.concatenate([terms, constant_BT[None]])
  heads = None
  if cfg.norm_placement == "pre":
    o_LNHD = of_layers(cfg, params, "attn", "o").astype(jnp.float32) * cfg.residual_scale
    heads = jnp.einsum("LBTNH,LNHD,BTD->LNBT", at["heads"], o_LNHD, u_BTD)
  total = components.sum(0)
  return Attribution(components, heads, total, _gap(cfg, reading, total, target_BT, contrast_BT))


def _gap(
  cfg: ml_collections.FrozenConfigDict,
  reading: taps.Reading,
  total_BT: jax.Array,
  target_BT: jax.Array,
  contrast_BT: jax.Array | None,
) -> jax.Array:
  """Largest difference between the sums and the model's logits, before the softcap."""
  pick = lambda ids: jnp.take_along_axis(reading.output.logits, ids[..., None], -1)[..., 0]
  cap = cfg.logit_softcap
  uncapped = lambda x: x if cap is None else cap * jnp.arctanh(x / cap)
  own = uncapped(pick(target_BT))
  if contrast_BT is not None:
    own -= uncapped(pick(contrast_BT))
  return jnp.abs(own - total_BT).max()
