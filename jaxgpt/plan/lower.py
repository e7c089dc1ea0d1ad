"""Compiles the very train step of a config for a topology, and says what memory it takes."""

import contextlib
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt import config
from jaxgpt.data import layouts
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.plan import topology as topology_lib
from jaxgpt.training import build as build_lib
from jaxgpt.training import train_step, xla_options


class Memory(NamedTuple):
  """Bytes on one device while a step runs.

  Attributes:
    parameters, optimizer, average, batch: what the step is given; see `train_step`.
    padding: what the layouts of these arrays add.
    temporaries: activations that are saved, gradients, gathered weights and whatever is in flight.
    outputs: results that are not written over what was given.
    code: the program.
  """

  parameters: int
  optimizer: int
  average: int
  batch: int
  padding: int
  temporaries: int
  outputs: int
  code: int

  @property
  def total(self):
    return sum(self)


class Compiled(NamedTuple):
  """A compiled step.

  Attributes:
    c: the resolved config.
    mesh: of devices that only compile.
    lowered: the program before that, see `train_step.lower`.
    executable: `jax.stages.Compiled`.
    memory: a `Memory`.
    attention: the form of attention in it.
    seconds: how long the compiler took.
  """

  c: Any
  mesh: Any
  lowered: Any
  executable: Any
  memory: Memory
  attention: str
  seconds: float


class OutOfMemory(Exception):
  """The program needs more memory than a device has.

  Attributes:
    needed, limit: bytes; `needed` is 0 where the compiler does not say.
  """

  def __init__(self, needed, limit):
    super().__init__(f"{needed / 2**30:.2f} GiB needed, {limit / 2**30:.2f} GiB there")
    self.needed, self.limit = needed, limit


def resolve(c):
  """The config as training resolves it, but for the tokenizer, which no plan needs.

  Raises:
    UserError: no vocabulary size, or what `config.resolve` finds.
  """
  if c.model.vocab_size is None:
    raise UserError(
      "model.vocab_size is not set, and a plan reads no tokenizer; add --config.model.vocab_size=N"
    )
  return config.resolve(c)


def batch_shapes(c):
  """The global batch of a resolved config as a tree of ShapeDtypeStructs."""
  layout = layouts.OBJECTIVES[c.objective.name]
  if layout is layouts.MaskedLM:
    layout = layout(None)
  elif layout is layouts.Classification:
    layout = layout(c.model.num_labels > 1)
  else:
    layout = layout()
  one = layout.batch([], 1, c.data.seq_len)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((c.data.batch_size, *x.shape[1:]), x.dtype), one
  )


@contextlib.contextmanager
def _no_cache():
  """JAX asks the compiler alone: what its cache gives loses functions when it is written again."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # whether there is one is asked but once
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def compile_step(c, topology, anew=False):
  """Compiles the train step for a topology.

  Args:
    c: from `resolve`.
    topology: a `topology.Topology`.
    anew: whether JAX's compilation cache is left alone, as it must be for `programs.save`.

  Returns:
    A `Compiled`.

  Raises:
    UserError: the config does not fit the topology's devices, or XLA refuses an option.
    OutOfMemory: the program does not fit their memory.
  """
  mesh = topology_lib.mesh(c.mesh, topology)
  mesh_lib.check_batch(mesh.shape, c.data.batch_size, c.optim.accumulate)
  parts = build_lib.build(c, mesh)
  step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  batch = batch_shapes(c)
  began = time.monotonic()
  lowered = train_step.lower(step, parts.state, batch, mesh)
  try:
    with _no_cache() if anew else contextlib.nullcontext():
      executable = xla_options.compile(lowered, mesh, c.mesh.compiler_options)
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e) or topology.chip is None:
      raise
    given = device_bytes(parts.state) + batch_bytes(batch, mesh)
    raise read_out_of_memory(str(e), topology.chip.hbm_limit, given) from e
  return Compiled(
    c,
    mesh,
    lowered,
    executable,
    memory(executable, parts.state, batch, mesh),
    parts.model.cfg.attention,
    time.monotonic() - began,
  )


def device_bytes(tree):
  """Bytes of a tree of sharded ShapeDtypeStructs on one device, without padding."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def batch_bytes(batch, mesh):
  """Bytes of a global batch's shapes on one device."""
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
  return whole // mesh_lib.num_batch_shards(mesh.shape)


def memory(executable, state, batch, mesh):
  """The `Memory` of a compiled step, from the compiler's own figures.

  Args:
    executable: from `train_step.compile`.
    state: from `train_step.abstract_state`.
    batch: the global batch's shapes.
    mesh: the device mesh.
  """
  found = executable.memory_analysis()
  kinds = {
    "parameters": device_bytes([state["params"], state.get("frozen", {})]),
    "optimizer": device_bytes(state["opt"]),
    "average": device_bytes(state.get("ema", {})),
    "batch": batch_bytes(batch, mesh),
  }
  return Memory(
    **kinds,
    padding=found.argument_size_in_bytes - sum(kinds.values()),
    temporaries=found.temp_size_in_bytes,
    outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
    code=found.generated_code_size_in_bytes,
  )


_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_out_of_memory(text, limit, given=0):
  """An `OutOfMemory` from the compiler's words.

  Args:
    text: its error.
    limit: bytes of a device, where it does not say.
    given: bytes of what the program is given, which some compilers leave out of what it takes.
  """
  sizes = re.search(r"\(?([\d.]+)([KMGT]?)B?\)? exceeds available HBM \(([\d.]+)([KMGT])\)", text)
  if sizes is None:
    sizes, given = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", text), 0
  if sizes is None:
    return OutOfMemory(0, limit)
  return OutOfMemory(_bytes(*sizes.groups()[:2]) + given, _bytes(*sizes.groups()[2:]))


def _bytes(number, unit):
  return int(float(number) * _SIZES[unit])
