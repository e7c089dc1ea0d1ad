"""Mixture of experts: a router sends each token to a few of many MLPs.

B batch, T position, D model, F feed-forward of an expert, E experts.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.config.remat import GATE, UP
from jaxgpt.model import layers, ops
from jaxgpt.model.experts import capacity, dropless
from jaxgpt.model.experts import router as router_lib
from jaxgpt.parallel.sharding import Rules


class MoE(layers.Module):
  """Routed experts, and optionally shared experts that every token goes to.

  With `moe.capacity` = 0 no token is dropped: tokens are sorted by expert and multiplied by a
  ragged matmul, on the devices that have the experts (`dropless`). Otherwise each expert has a
  number of slots per row, and tokens that find them full skip this expert (`capacity`).

  Attributes:
    rules: Logical axis rules.
  """

  rules: Rules

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, real_BT: jax.Array, lora_key: jax.Array | None = None
  ) -> tuple[jax.Array, router_lib.Statistics]:
    """Applies the experts.

    Args:
      x_BTD: Activations.
      real_BT: False for padding.
      lora_key: PRNG key of adapter dropout in the shared experts, or None.

    Returns:
      (y_BTD, statistics).
    """
    cfg, c = self.cfg, self.cfg.moe
    D, E, F = cfg.width, c.experts, c.width
    router = self.weight("router", (D, E), ("embed", "router"), cfg.init_std)
    bias = self.vector("router_bias", (E,), ("norm",)) if c.router == "sigmoid" else None
    logits_BTE = x_BTD.astype(jnp.float32) @ router
    weights, experts, scores = router_lib.route(logits_BTE, bias, c)
    stats = router_lib.statistics(logits_BTE, scores, experts, real_BT)
    std = {"gate": cfg.init_std, "up": cfg.init_std, "down": self.residual_std}
    names = ("gate", "up", "down") if cfg.gated else ("up", "down")
    w = {
      name: self.weight(
        name,
        (E, F, D) if name == "down" else (E, D, F),
        ("experts", "mlp", "embed") if name == "down" else ("experts", "embed", "mlp"),
        std[name],
      ).astype(self.dtype)
      for name in names
    }
    args = (x_BTD, weights, experts, real_BT, w, self._activated)
    if c.capacity:
      y, stats["dropped"] = capacity.apply(*args, cfg, self.rules)
      stats["sent"] = jnp.zeros(())
    else:
      y, counts = dropless.apply(*args, c, self.rules)
      stats |= counts._asdict()
    if c.shared:
      y += layers.MLP(cfg, self.rules, c.shared * F, name="shared")(x_BTD, lora_key)
    return y, stats

  def _activated(self, project: Callable[[str], jax.Array]) -> jax.Array:
    """Hidden activations of the experts. `project` multiplies by the weight of that name."""
    act = ops.ACTIVATIONS[self.cfg.activation]
    up = checkpoint_name(project(UP), UP)
    if not self.cfg.gated:
      return act(up)
    return act(checkpoint_name(project(GATE), GATE)) * up
