"""Optimizers as chains of Optax parts: a direction, weight decay, the learning rate.

Which parameters decay and which are matrices to Muon is read off the axes tree.
"""

import fnmatch
import math

import jax
import numpy as np
import optax

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.model import lora
from jaxgpt.parallel import sharding

_MUON_RMS = 0.2  # makes Muon's updates as large as AdamW's (arXiv:2502.16982, section 2.2)


def trained(c_optim, axes):
  """The parameters that are trained: those of `optim.trainable` without those of `optim.frozen`.

  Where neither names any, all are, or with LoRA (arXiv:2106.09685) its thin matrices alone.

  Args:
    c_optim: the config's `optim` section.
    axes: tree of logical axes of all parameters.

  Returns:
    A set of paths.

  Raises:
    UserError: a pattern that matches no parameter, or nothing is left to train.
  """
  paths = set(tree.flatten(axes, is_leaf=sharding.is_axes))

  def matching(key, patterns):
    for pattern in patterns:
      if not fnmatch.filter(paths, pattern):
        raise UserError(
          f"optim.{key}: {pattern!r} matches no parameter; they are named like "
          f"{', '.join(sorted(paths)[:8])}"
        )
    return {path for path in paths for pattern in patterns if fnmatch.fnmatchcase(path, pattern)}

  thin = {path for path in paths if lora.is_adapter(path)}
  chosen = matching("trainable", c_optim.trainable) or thin or paths
  chosen -= matching("frozen", c_optim.frozen)
  if not chosen:
    raise UserError(f"optim.frozen={c_optim.frozen} leaves no parameter to train")
  return chosen


def _rates(c_optim, axes, depths):
  """Shares of the learning rate: a tree of numbers, or of arrays [layers, 1, …]; None: all 1."""
  named = tree.flatten(depths)
  last = max(np.max(depth) for depth in named.values())

  def one(path, axes_of_path):
    share = c_optim.layer_decay ** (last - np.asarray(named[path], np.float32))
    for pattern, factor in c_optim.lr_scales:
      if fnmatch.fnmatchcase(path, pattern):
        share = share * factor
        break
    return share.reshape(share.shape + (1,) * (len(axes_of_path) - 1) if share.ndim else ())

  shares = tree.map_named(one, axes, is_leaf=sharding.is_axes)
  return None if all((x == 1).all() for x in jax.tree.leaves(shares)) else shares


def make(c_optim, schedule, axes, depths):
  """The optimizer that the config names, without gradient clipping (the train step clips).

  Args:
    c_optim: the config's `optim` section, resolved.
    schedule: step -> share of the peak learning rate, see `schedules.make`.
    axes: tree of logical axes of the trained parameters, see `model.transformer.abstract`.
    depths: tree of the layers that they belong to, see `model.transformer.depths`.

  Returns:
    An `optax.GradientTransformation`. Every update is -lr * (direction + weight_decay * weight),
    the decay on matrices only. 'adafactor' (arXiv:1804.04235) scales its direction with the root
    mean square of the parameter, so its lr is relative: around 1e-2.
  """
  decays = jax.tree.map(sharding.is_weight, axes, is_leaf=sharding.is_axes)
  chain = [
    DIRECTIONS[c_optim.name](c_optim, axes),
    optax.add_decayed_weights(c_optim.weight_decay, mask=decays),
    optax.scale_by_learning_rate(lambda step: c_optim.lr * schedule(step)),
  ]
  shares = _rates(c_optim, axes, depths)
  if shares is not None:
    chain.append(
      optax.stateless(lambda updates, _: jax.tree.map(lambda u, share: u * share, updates, shares))
    )
  return optax.chain(*chain)


def matrix_axes(axes):
  """(input dimensions, output dimensions) of a layer's matrix; None for any other parameter.

  ('layers', 'embed', 'heads', 'head_dim') -> ((1,), (2, 3)): one matrix a layer maps the residual
  stream to all heads together.
  """
  if "layers" not in axes or "router" in axes or not sharding.is_weight(axes):
    return None
  hub = axes.index("embed" if "embed" in axes else "rank")
  others = tuple(i for i, a in enumerate(axes) if a not in ("layers", "experts") and i != hub)
  return ((hub,), others) if hub < others[0] else (others, (hub,))


def _kept_in(tx, **dtypes):
  """The transformation with fields of its state, such as `mu`, stored in other dtypes.

  It computes in float32 all the same; only what is kept for the next step is rounded, to nearest.
  """

  def cast(state, dtypes):
    return state._replace(
      **{
        field: jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), getattr(state, field))
        for field, dtype in dtypes.items()
      }
    )

  def update(updates, state, params=None):
    state = cast(state, dict.fromkeys(dtypes, "float32"))
    updates, state = tx.update(updates, state, params)
    return updates, cast(state, dtypes)

  return optax.GradientTransformation(lambda params: cast(tx.init(params), dtypes), update)


def _adam(o, axes):
  del axes
  return _kept_in(optax.scale_by_adam(o.b1, o.b2, o.eps), mu=o.first_dtype, nu=o.second_dtype)


def _lion(o, axes):
  del axes
  return _kept_in(optax.scale_by_lion(o.b1, o.b2), mu=o.first_dtype)


def _adafactor(o, axes):
  """Adafactor without momentum, for each layer's part of a stacked parameter on its own."""
  del o
  tx = optax.chain(
    optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
  )
  stacked = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
  labels = jax.tree.map(
    lambda a: "stacked" if "layers" in a else "single", axes, is_leaf=sharding.is_axes
  )
  return optax.partition({"stacked": stacked, "single": tx}, labels)


def _muon(o, axes):
  """Muon for the layers' matrices, Adam for the embeddings, the head, norms and biases."""
  dims = {name: matrix_axes(a) for name, a in tree.flatten(axes, is_leaf=sharding.is_axes).items()}
  numbers = lambda params: tree.map_named(
    lambda name, _: optax.contrib.MuonDimensionNumbers(*dims[name]), params
  )
  labels = tree.map_named(
    lambda name, _: "muon" if dims[name] else "adam", axes, is_leaf=sharding.is_axes
  )

  def match_rms(updates, params):
    del params

    def one(name, u):
      longer = max(math.prod(u.shape[i] for i in side) for side in dims[name])
      return u * (_MUON_RMS * longer**0.5)

    return tree.map_named(one, updates)

  return optax.partition(
    {
      "muon": optax.chain(
        _kept_in(
          optax.contrib.scale_by_muon(beta=o.muon_momentum, weight_dimension_numbers=numbers),
          mu=o.first_dtype,
        ),
        optax.stateless(match_rms),
      ),
      "adam": optax.chain(_adam(o, axes), optax.scale(o.adam_lr / o.lr if o.lr else 1.0)),
    },
    labels,
  )


DIRECTIONS = {"adamw": _adam, "lion": _lion, "adafactor": _adafactor, "muon": _muon}
