"""Sums over the parts of the queries' gradient, written so that TPUs compute them fast.

Splash attention's fused backward kernel writes a gradient of the queries for each block of keys,
and JAX adds these parts up with `parts.sum(axis=0)`. XLA's reduction of that shape takes 5 to 12
times as long on TPUs as reading and writing the bytes, additions of slices twice as long, and XLA
fuses these into the next operation (docs/log.md). The sum is inside of a function of JAX, so the
trace of that function is rewritten.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend import core
from jax.extend.core import primitives

_DIMS = 4  # parts, heads, tokens, entries of a head


def adding(fn: Callable[..., Any]) -> Callable[..., Any]:
  """A function whose sums over the leading one of four dimensions are additions of slices."""

  @functools.wraps(fn)
  def run(*args: Any) -> Any:
    traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    out = _run(traced, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)

  return run


def _run(traced: core.ClosedJaxpr, args: Sequence[jax.Array]) -> list[jax.Array]:
  """Evaluates a trace, the traces of the jitted functions that it calls included."""
  jaxpr = traced.jaxpr
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*traced.consts, *args], strict=True))
  of = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
  narrow: dict[core.Var, jax.Array] = {}  # operands of conversions, by their results
  for step in jaxpr.eqns:
    operands = [of(atom) for atom in step.invars]
    if step.primitive is primitives.jit_p:
      results = _run(step.params["jaxpr"], operands)
    elif _is_sum_of_parts(step, operands):
      results = [_sum(narrow.get(step.invars[0], operands[0]), operands[0].dtype)]
    else:
      read = list(dict.fromkeys(atom for atom in step.invars if not isinstance(atom, core.Literal)))
      alone = jaxpr.replace(constvars=[], invars=read, outvars=step.outvars, eqns=[step])
      results = core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*map(of, read))
    values |= zip(step.outvars, results, strict=True)
    if step.primitive is primitives.convert_element_type_p:
      narrow[step.outvars[0]] = operands[0]
  return [of(atom) for atom in jaxpr.outvars]


def _sum(parts: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """The sum in a wider dtype. Slices are converted, since XLA would store all of them converted.

  The slices are taken of parts and heads as one dimension, which stays as the kernel wrote it. XLA
  would make a dimension that is then dropped the outermost one, or turn tokens and heads around,
  each time by a copy of all parts.
  """
  heads = parts.shape[1]
  merged = parts.reshape(-1, *parts.shape[2:])
  merged = with_layout_constraint(merged, Layout(tuple(range(merged.ndim))))
  one = lambda i: jax.lax.slice_in_dim(merged, i * heads, (i + 1) * heads).astype(dtype)
  return functools.reduce(operator.add, map(one, range(parts.shape[0])))


def _is_sum_of_parts(step: core.JaxprEqn, operands: Sequence[jax.Array]) -> bool:
  is_sum = step.primitive is primitives.reduce_sum_p and step.params["axes"] == (0,)
  return is_sum and operands[0].ndim == _DIMS
