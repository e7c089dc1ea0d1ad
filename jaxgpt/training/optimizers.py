"""Optimizers: update directions, and the chain of weight decay and learning rate that all share.

An update is -lr * factor * (direction + weight_decay * weight). An entry of `OPTIMIZERS` makes the
direction and says which moments it keeps. Which parameters decay, and which are matrices to Muon,
is read from the axes tree.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from jaxgpt import tree
from jaxgpt.config import user_code
from jaxgpt.config.keys import KEYS
from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError, nearest
from jaxgpt.model import lora
from jaxgpt.model.quantization import quantized_base
from jaxgpt.model.scaling import mup
from jaxgpt.parallel import sharding
from jaxgpt.training import kept_zeros
from jaxgpt.tree import PyTree

Axes: TypeAlias = tuple[str | None, ...]  # logical axes of a parameter
Dims: TypeAlias = tuple[int, ...]

_MUON_RMS = 0.2  # makes Muon's updates as large as AdamW's (arXiv:2502.16982, section 2.2)
_LARGEST_B2 = 0.98  # a step then adds 1/50 of the moment: ten times bfloat16's rounding error


@dataclasses.dataclass(frozen=True)
class Moment:
  """An array that the optimizer keeps for each parameter.

  Attributes:
    dtype_key: The key of the `optim` section that holds its dtype, or None for float32.
    per_parameter: Numbers kept per number of the parameters, averaged over a model. Less than 1 for
      factored moments, or for moments that only some parameters have.
  """

  dtype_key: str | None = None
  per_parameter: float = 1.0

  def bytes(self, c_optim: ml_collections.ConfigDict) -> float:
    """Bytes per number of the parameters."""
    dtype = c_optim[self.dtype_key] if self.dtype_key else "float32"
    return self.per_parameter * jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An update direction and the memory it takes.

  Attributes:
    direction: Makes the transformation from gradients to directions of descent, from the config's
      `optim` section and the tree of logical axes of the trained parameters. It applies neither the
      learning rate nor weight decay, and does not flip the sign: `make` does.
    moments: Arrays that it keeps. `jaxgpt plan` computes the optimizer's memory from them.
    check: Raises a UserError if the `optim` section does not suit this optimizer.
    check_trained: Raises a UserError if the trained parameters, given as their tree of logical
      axes, leave a setting of the `optim` section without effect.
    mup: Whether the numbers of a direction are of order 1 whatever the scale of the gradient, as
      those of Adam. The rule of `model.scaling.mup` holds for these.
    summary: A few words for docs/config.md.
  """

  direction: Callable[[ml_collections.ConfigDict, PyTree], optax.GradientTransformation]
  moments: tuple[Moment, ...] = ()
  check: Callable[[ml_collections.ConfigDict], None] = lambda c_optim: None
  check_trained: Callable[[ml_collections.ConfigDict, PyTree], None] = lambda c_optim, axes: None
  mup: bool = False
  summary: str = ""

  def bytes_per_parameter(self, c_optim: ml_collections.ConfigDict) -> float:
    """Bytes of optimizer state per number of the trained parameters."""
    return sum(moment.bytes(c_optim) for moment in self.moments)


OPTIMIZERS: Registry[Optimizer] = Registry("optim.name")


def find(c: ml_collections.ConfigDict) -> Optimizer:
  """The optimizer of a config: an entry of `OPTIMIZERS`, or an object of a user's file.

  Raises:
    UserError: There is none of that name.
  """
  return user_code.find(OPTIMIZERS, Optimizer, c.optim.name, c.code_folder)


def check(c: ml_collections.ConfigDict) -> None:
  """Checks the `optim` section against its optimizer.

  Raises:
    UserError: There is no such optimizer, it does not keep a moment whose dtype is set, or its own
      check fails.
  """
  optimizer, c_optim = find(c), c.optim
  kept = {moment.dtype_key for moment in optimizer.moments}
  for key in ("first_dtype", "second_dtype"):
    if c_optim[key] != "float32" and key not in kept:
      raise UserError(
        f"optim.{key}={c_optim[key]!r}: optim.name={c_optim.name!r} has no such moment; leave it "
        "at 'float32'"
      )
  optimizer.check(c_optim)
  if mup.is_on(c.model) and not optimizer.mup:
    have = ", ".join(repr(name) for name, one in OPTIMIZERS.items() if one.mup)
    raise UserError(
      f"optim.name={c_optim.name!r}: model.mup has no rule for its learning rates, only for those "
      f"of {have}; choose one of these, or set model.mup.base_width and base_depth to 0"
    )
  prune, steps = c_optim.prune, c.train.steps
  derive = KEYS["optim.prune.end"].derive
  end = derive(c) if prune.end is None and derive else prune.end
  if prune.sparsity and not prune.start < end < steps:
    raise UserError(
      f"optim.prune.end={end}: must be above optim.prune.start={prune.start} and below "
      f"train.steps={steps}"
    )


def make(
  c: ml_collections.ConfigDict, schedule: optax.Schedule, axes: PyTree, depths: PyTree
) -> optax.GradientTransformation:
  """The optimizer of a config, without gradient clipping, which the train step does.

  Args:
    c: A resolved config.
    schedule: Step -> fraction of the peak learning rate, see `schedules.make`.
    axes: Tree of logical axes of the trained parameters, see `model.transformer.abstract`.
    depths: Tree of the layers that they belong to, see `model.transformer.depths`.

  Returns:
    A transformation from gradients to updates. Only matrices decay. With `model.mup`, rates, weight
    decay and Adam's epsilon are those of `model.scaling.mup`. Epsilon times f is the same as
    gradients divided by f: Adam's direction depends on their ratio alone.
  """
  c_optim = c.optim
  decays = jax.tree.map(sharding.is_weight, axes, is_leaf=sharding.is_axes)
  named = user_code.reading_options(OPTIMIZERS.setting, c_optim)
  chain = [
    named(find(c).direction)(c_optim, axes),
    optax.add_decayed_weights(c_optim.weight_decay, mask=decays),
    optax.scale_by_learning_rate(lambda step: c_optim.lr * schedule(step)),
  ]
  factors = _rate_factors(c_optim, axes, depths)
  if factors is not None:
    chain.append(_times(factors))
  if mup.is_on(c.model):
    of = jax.tree.map(lambda names: mup.factors(c.model, names), axes, is_leaf=sharding.is_axes)
    pick = lambda f: jax.tree.map(f, of, is_leaf=lambda x: isinstance(x, mup.Factors))
    chain = [
      _times(pick(lambda f: 1 / f.eps)),
      chain[0],
      _times(pick(lambda f: 1 / f.decay)),
      *chain[1:],
      _times(pick(lambda f: f.rate * f.decay)),
    ]
  tx = optax.chain(*chain)
  if c_optim.prune.sparsity:
    stacked = lambda names: matrix_axes(names) is not None
    is_matrix = jax.tree.map(stacked, axes, is_leaf=sharding.is_axes)
    tx = kept_zeros.gradual(tx, c_optim.prune, is_matrix)
  return kept_zeros.keeping_zeros(tx, axes) if c_optim.keep_zeros or c_optim.prune.sparsity else tx


def _times(factors: PyTree) -> optax.GradientTransformation:
  """Multiplies updates by a tree of factors. Factors of 1 leave them as they are, to the bit."""
  return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))


def trained(c_optim: ml_collections.ConfigDict, axes: PyTree, strict: bool = True) -> set[str]:
  """Paths of the trained parameters: those of `optim.trainable` without those of `optim.frozen`.

  If `optim.trainable` is empty, all parameters are trained, or with LoRA (arXiv:2106.09685) only
  its low-rank matrices.

  Args:
    c_optim: The config's `optim` section.
    axes: Tree of logical axes of all parameters.
    strict: Refuse patterns of `optim.frozen` that match only parameters which are not trained
      anyway. Runs of earlier versions may have some.

  Raises:
    UserError: A pattern matches no parameter, or no parameter is left to train.
  """
  paths = {
    path
    for path in tree.flatten(axes, is_leaf=sharding.is_axes)
    if not quantized_base.is_code(path)  # integers have no gradient
  }
  adapters = {path for path in paths if lora.is_adapter(path)}
  chosen = (
    {path for p in c_optim.trainable for path in _matching("trainable", p, paths)}
    or adapters
    or paths
  )
  among, kind = (chosen, "trained parameter") if strict and chosen < paths else (paths, "parameter")
  frozen = {path for p in c_optim.frozen for path in _matching("frozen", p, among, kind)}
  if chosen <= frozen:
    raise UserError(f"optim.frozen={c_optim.frozen} leaves no parameter to train")
  return chosen - frozen


def _matching(key: str, pattern: str, paths: Collection[str], kind: str = "parameter") -> set[str]:
  """The paths that a pattern of the `optim` section matches.

  Raises:
    UserError: It matches none. The message lists the paths.
  """
  matched = {path for path in paths if fnmatch.fnmatchcase(path, pattern)}
  if not matched:
    raise UserError(
      f"optim.{key}: {pattern!r} matches no {kind}; {nearest(pattern, paths)}there are: "
      f"{', '.join(sorted(paths))}"
    )
  return matched


def _rate_factors(
  c_optim: ml_collections.ConfigDict, axes: PyTree, depths: PyTree
) -> PyTree | None:
  """Factors on the learning rate: a tree of numbers or arrays [layers, 1, …]. None if all are 1."""
  named = tree.flatten(depths)
  last = max(np.max(depth) for depth in named.values())

  def one(path: str, axes_of_path: Axes) -> np.ndarray | tuple[()]:
    factor = c_optim.layer_decay ** (last - np.asarray(named[path], np.float32))
    for pattern, scale in c_optim.lr_scales:
      if fnmatch.fnmatchcase(path, pattern):
        factor = factor * scale
        break
    return factor.reshape(factor.shape + (1,) * (len(axes_of_path) - 1) if factor.ndim else ())

  factors = tree.map_named(one, axes, is_leaf=sharding.is_axes)
  return None if all((x == 1).all() for x in jax.tree.leaves(factors)) else factors


def check_rates(c_optim: ml_collections.ConfigDict, depths: PyTree) -> None:
  """Checks that each factor on the learning rate applies to a parameter.

  Args:
    c_optim: The config's `optim` section.
    depths: Tree of the layers of the trained parameters, see `model.transformer.depths`.

  Raises:
    UserError: A pattern of `optim.lr_scales` is the first match of no trained parameter, or
      `optim.layer_decay` is set and all trained parameters belong to one layer.
  """
  named = tree.flatten(depths)
  left = set(named)
  for pattern, _ in c_optim.lr_scales:
    matched = _matching("lr_scales", pattern, named, "trained parameter")
    if not matched & left:
      raise UserError(
        f"optim.lr_scales: {pattern!r} has no effect, since earlier patterns match all of its "
        "parameters and the first match counts; move it to the front"
      )
    left -= matched
  if c_optim.layer_decay != 1 and len({x for d in named.values() for x in np.ravel(d)}) == 1:
    raise UserError(
      f"optim.layer_decay={c_optim.layer_decay} has no effect: all trained parameters "
      f"({', '.join(sorted(named))}) belong to one layer; leave it at 1.0"
    )


def matrix_axes(axes: Axes) -> tuple[Dims, Dims] | None:
  """Input and output dimensions of a layer's matrix, or None for any other parameter.

  ('layers', 'embed', 'heads', 'head_dim') -> ((1,), (2, 3)): one matrix per layer maps the residual
  stream to all heads together.
  """
  if "layers" not in axes or "router" in axes or not sharding.is_weight(axes):
    return None
  hub = axes.index(next(name for name in ("embed", "latent", "rank") if name in axes))
  others = tuple(i for i, a in enumerate(axes) if a not in ("layers", "experts") and i != hub)
  return ((hub,), others) if hub < others[0] else (others, (hub,))


def kept_in(tx: optax.GradientTransformation, **dtypes: str) -> optax.GradientTransformation:
  """A transformation whose moments are stored in narrower dtypes.

  It computes in float32. Only the value stored for the next step is rounded, to nearest.

  Args:
    tx: A transformation whose state is a NamedTuple.
    **dtypes: Field of that state, such as `mu`, to its dtype.
  """

  def cast(state: optax.OptState, dtypes: Mapping[str, str]) -> optax.OptState:
    return state._replace(
      **{
        field: jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), getattr(state, field))
        for field, dtype in dtypes.items()
      }
    )

  def update(
    updates: PyTree, state: optax.OptState, params: PyTree | None = None
  ) -> tuple[PyTree, optax.OptState]:
    state = cast(state, dict.fromkeys(dtypes, "float32"))
    updates, state = tx.update(updates, state, params)
    return updates, cast(state, dtypes)

  return optax.GradientTransformation(lambda params: cast(tx.init(params), dtypes), update)


def _check_second_dtype(c_optim: ml_collections.ConfigDict) -> None:
  """Refuses a second moment in bfloat16 that averages over too many steps."""
  if c_optim.second_dtype == "bfloat16" and c_optim.b2 > _LARGEST_B2:
    raise UserError(
      f"optim.second_dtype='bfloat16' needs optim.b2 <= {_LARGEST_B2} (got {c_optim.b2}): smaller "
      "updates would be lost to bfloat16 rounding; set optim.b2=0.95, or keep it in 'float32'"
    )


def _adamw(c_optim: ml_collections.ConfigDict, axes: PyTree) -> optax.GradientTransformation:
  """Adam (arXiv:1412.6980), whose decoupled weight decay (arXiv:1711.05101) `make` adds.

  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  direction = m' / (sqrt(v') + eps), where m' and
  v' are m and v without their bias towards 0.
  """
  del axes
  tx = optax.scale_by_adam(c_optim.b1, c_optim.b2, c_optim.eps)
  return kept_in(tx, mu=c_optim.first_dtype, nu=c_optim.second_dtype)


OPTIMIZERS.add(
  "adamw",
  Optimizer(
    _adamw,
    (Moment("first_dtype"), Moment("second_dtype")),
    _check_second_dtype,
    mup=True,
    summary="Adam with decoupled weight decay",
  ),
)


def _lion(c_optim: ml_collections.ConfigDict, axes: PyTree) -> optax.GradientTransformation:
  """Lion (arXiv:2302.06675): direction = sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g."""
  del axes
  return kept_in(optax.scale_by_lion(c_optim.b1, c_optim.b2), mu=c_optim.first_dtype)


OPTIMIZERS.add(
  "lion",
  Optimizer(_lion, (Moment("first_dtype"),), mup=True, summary="the sign of a momentum"),
)


def _adafactor(c_optim: ml_collections.ConfigDict, axes: PyTree) -> optax.GradientTransformation:
  """Adafactor (arXiv:1804.04235) without momentum, applied to each layer of a stack separately.

  The second moment of a matrix is the outer product of a row and a column. The direction is scaled
  by the root mean square of the parameter, so `optim.lr` is relative: around 1e-2.
  """
  del c_optim
  tx = optax.chain(
    optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
  )
  stacked = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
  labels = jax.tree.map(
    lambda a: "stacked" if "layers" in a else "single", axes, is_leaf=sharding.is_axes
  )
  return optax.partition({"stacked": stacked, "single": tx}, labels)


OPTIMIZERS.add(
  "adafactor",
  Optimizer(
    _adafactor, (Moment(per_parameter=0.01),), summary="factored second moments, no first one"
  ),
)


def _muon(c_optim: ml_collections.ConfigDict, axes: PyTree) -> optax.GradientTransformation:
  """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for all other parameters.

  The direction of a matrix is its momentum with all singular values set to about 1 by Newton-Schulz
  iterations, times 0.2 sqrt(longer side), which gives it the RMS of AdamW (arXiv:2502.16982, 2.2).
  Embeddings, the head, norms and biases get AdamW with the peak rate `optim.adam_lr`.
  """
  named = tree.flatten(axes, is_leaf=sharding.is_axes)
  dims = {name: found for name, a in named.items() if (found := matrix_axes(a))}
  numbers = lambda params: tree.map_named(
    lambda name, _: optax.contrib.MuonDimensionNumbers(*dims[name]), params
  )
  labels = tree.map_named(
    lambda name, _: "muon" if name in dims else "adam", axes, is_leaf=sharding.is_axes
  )

  def match_rms(updates: PyTree, params: PyTree) -> PyTree:
    del params

    def one(name: str, u: jax.Array) -> jax.Array:
      longer = max(math.prod(u.shape[i] for i in side) for side in dims[name])
      return u * (_MUON_RMS * longer**0.5)

    return tree.map_named(one, updates)

  orthogonal = optax.contrib.scale_by_muon(
    beta=c_optim.muon_momentum, weight_dimension_numbers=numbers
  )
  # `make` multiplies all directions by optim.lr, so AdamW's are scaled to get optim.adam_lr.
  adam_factor = c_optim.adam_lr / c_optim.lr if c_optim.lr else 1.0
  return optax.partition(
    {
      "muon": optax.chain(kept_in(orthogonal, mu=c_optim.first_dtype), optax.stateless(match_rms)),
      "adam": optax.chain(_adamw(c_optim, axes), optax.scale(adam_factor)),
    },
    labels,
  )


def _check_muon_trained(c_optim: ml_collections.ConfigDict, axes: PyTree) -> None:
  """Refuses Muon without matrices, and a rate for other parameters where there are none."""
  named = tree.flatten(axes, is_leaf=sharding.is_axes)
  matrices = [path for path, a in named.items() if matrix_axes(a)]
  if not matrices:
    raise UserError(
      f"optim.name='muon' has no effect: none of the trained parameters ({', '.join(named)}) is a "
      "matrix of the layers; set optim.name='adamw'"
    )
  if len(matrices) == len(named) and c_optim.adam_lr != c_optim.lr:
    raise UserError(
      f"optim.adam_lr={c_optim.adam_lr} has no effect: all trained parameters "
      f"({', '.join(named)}) are matrices of the layers, which muon updates; leave it out"
    )


# The second moment is AdamW's, of about a fifth of the parameters.
OPTIMIZERS.add(
  "muon",
  Optimizer(
    _muon,
    (Moment("first_dtype"), Moment("second_dtype", per_parameter=0.2)),
    _check_second_dtype,
    _check_muon_trained,
    summary="orthogonalized momentum for matrices of the layers, adamw for the rest",
  ),
)
