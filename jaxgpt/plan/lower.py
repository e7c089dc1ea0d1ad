"""Compilation of a config's train step for a topology, and the memory that it takes.

This is the train step that training runs, compiled for devices that are not present.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt import config
from jaxgpt.config import installed
from jaxgpt.data import layouts
from jaxgpt.errors import UserError, first_line
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from jaxgpt.plan import topology as topology_lib
from jaxgpt.plan.schedule import dump
from jaxgpt.plan.topology import Topology
from jaxgpt.training import build as build_lib
from jaxgpt.training import objectives, stored, train_step, xla_options
from jaxgpt.tree import PyTree


class Memory(NamedTuple):
  """Bytes on one device while a step runs.

  Attributes:
    parameters: The parameters, trained or frozen, and those of fixed models.
    optimizer: The optimizer state.
    average: The moving average of the parameters.
    batch: The batch.
    padding: Padding of these arrays in the device's layouts.
    temporaries: Saved activations, gradients, gathered weights and other intermediate results.
    outputs: Results that do not reuse the memory of an argument.
    code: The program itself.
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
  def total(self) -> int:
    """Sum of all kinds."""
    return sum(self)


class Compiled(NamedTuple):
  """A compiled step.

  Attributes:
    c: The resolved config.
    mesh: Mesh of devices that can compile but not run.
    lowered: The program before compilation, see `train_step.lower`.
    executable: The compiled program.
    memory: Its memory.
    attention: Its implementation of attention.
    seconds: Time that the compiler took.
  """

  c: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  lowered: jax.stages.Lowered
  executable: jax.stages.Compiled
  memory: Memory
  attention: str
  seconds: float


class OutOfMemory(Exception):
  """The program needs more memory than a device has.

  Attributes:
    needed: Bytes that it needs, or 0 if the compiler does not report them.
    limit: Bytes of a device.
  """

  def __init__(self, needed: int, limit: int):
    super().__init__(f"{needed / 2**30:.2f} GiB needed, {limit / 2**30:.2f} GiB available")
    self.needed, self.limit = needed, limit


def resolve(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Resolves a config as training does, except that no tokenizer is read.

  Raises:
    UserError: The vocabulary size is not set, or `config.resolve` finds an error.
  """
  if c.model.vocab_size is None:
    raise UserError(
      "model.vocab_size is not set, and a plan does not read the tokenizer; add "
      "--config.model.vocab_size=N"
    )
  c = config.resolve(c)
  build_lib.check(c)
  return c


def batch_shapes(c: ml_collections.ConfigDict) -> PyTree:
  """The global batch of a resolved config as a tree of `ShapeDtypeStruct`s."""
  one = layouts.blank(objectives.find(c).layout, 1, c.data.seq_len, c.model.num_labels)
  for name, (shape, dtype) in stored.shapes(c).items():
    one[name] = np.zeros((1, *shape), dtype)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((c.data.batch_size, *x.shape[1:]), x.dtype), one
  )


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
  """Disables JAX's compilation cache.

  An executable from the cache is incomplete when it is serialized a second time.
  """
  before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # set dynamically
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # JAX checks only once whether there is a cache
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def compile_step(
  c: ml_collections.ConfigDict, topology: Topology, use_cache: bool = True
) -> Compiled:
  """Compiles the train step for a topology.

  Args:
    c: A config from `resolve`.
    topology: The hardware.
    use_cache: Whether to use JAX's compilation cache, where it does no harm: a TPU's program from
      the cache has no schedules of its kernels. `compiled_step.save` needs a program that does not
      come from the cache.

  Raises:
    UserError: The config does not suit the topology's devices, or XLA refuses an option or the
      program.
    OutOfMemory: The program does not fit the memory of a device.
  """
  mesh = topology_lib.mesh(c.mesh, topology)
  parts = build_lib.build(c, mesh)
  step = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  batch = batch_shapes(c)
  began = time.monotonic()
  dump.clear()
  lowered = train_step.lower(step, parts.state, batch, mesh)
  has_schedules = topology.chip is not None and not topology.chip.gpu
  try:
    with contextlib.nullcontext() if use_cache and not has_schedules else _no_cache():
      executable = xla_options.compile(lowered, mesh, c.mesh.compiler_options)
  except jax.errors.JaxRuntimeError as e:
    given = sharding.device_bytes(parts.state) + batch_bytes(batch, mesh)
    raise refusal(e, topology, given) from e
  return Compiled(
    c,
    mesh,
    lowered,
    executable,
    memory(executable, parts.state, batch, mesh),
    parts.model.cfg.attention,
    time.monotonic() - began,
  )


def attention_forms(c: ml_collections.ConfigDict, topology: Topology) -> tuple[str, str]:
  """(implementation of attention that this machine compiles, that of training on the devices)."""
  gpu = topology.chip.gpu if topology.chip else None
  return (
    build_lib.attention_form(c, topology.platform),
    build_lib.attention_form(c, topology.platform, gpu.capability if gpu else None),
  )


def other_attention(compiled: str, in_training: str) -> Iterator[str]:
  """A line that says that training will use another attention than compiled programs, or none.

  Args:
    compiled, in_training: From `attention_forms`.
  """
  if compiled != in_training:
    yield (
      f"training on these GPUs uses attention {in_training}, which takes less time and memory: "
      "without such a GPU, JAX can't compile that kernel for heads of this size"
    )


def refusal(
  error: jax.errors.JaxRuntimeError, topology: Topology, given: int
) -> UserError | OutOfMemory:
  """The reason that a compiler refuses a program.

  Args:
    error: The compiler's error.
    topology: The hardware.
    given: Bytes of the program's arguments, see `read_out_of_memory`.
  """
  message = str(error)
  if re.search(r"memory space vmem|exceeded scoped vmem limit", message):
    kernel = re.search(r"([\w.]+)/pallas_call", message)
    sizes = re.search(r"with size (\S+) and limit (\S+) exceeded", message)
    return UserError(
      f"the fast memory (VMEM) of {topology.name} is too small for "
      + (f"the kernel {kernel[1]}" if kernel else "an instruction of the program")
      + (f": it needs {sizes[1]}, the limit is {sizes[2]}" if sizes else "")
      + "; raise the limit with "
      """--config.mesh.compiler_options='("xla_tpu_scoped_vmem_limit_kib=KIB",)', or leave out a """
      "lower one that is given there: the blocks of attention are chosen for the chip's default"
    )
  if "RESOURCE_EXHAUSTED" in message and topology.chip is not None:
    return read_out_of_memory(message, topology.chip.hbm_limit, given)
  # A first line such as "INTERNAL: E3000: Kernel:" is the heading of the second.
  lines = message.splitlines() or ["?"]
  said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
  return UserError(f"the compiler for {topology.name} refuses the program: {said}")


def text(compiled: Compiled) -> str:
  """The text of a compiled program, for `hlo.parse`.

  Raises:
    UserError: JAX is older than the compiler and cannot read the program.
  """
  try:
    return compiled.executable.as_text() or ""
  except jax.errors.JaxRuntimeError as e:
    if "async-update instruction should have" not in str(e):
      raise
    libtpu = installed.version("libtpu")
    raise UserError(
      f"JAX {jax.__version__} cannot read a program that libtpu {libtpu} compiled with "
      f"gathers on the SparseCore ({first_line(e, 200)}); install a newer JAX, 0.12 can (Python "
      "3.12 or later): pip install -U 'jax[tpu]'"
    ) from e


def batch_bytes(batch: PyTree, mesh: jax.sharding.Mesh) -> int:
  """Bytes of a global batch on one device."""
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
  return whole // mesh_lib.num_batch_shards(mesh.shape)


def memory(
  executable: jax.stages.Compiled, state: PyTree, batch: PyTree, mesh: jax.sharding.Mesh
) -> Memory:
  """The memory of a compiled step, as the compiler reports it.

  Args:
    executable: From `xla_options.compile`.
    state: From `train_step.abstract_state`.
    batch: The global batch's shapes.
    mesh: The device mesh.
  """
  found: Any = executable.memory_analysis()
  # The compiler reports the arguments as one sum. Their parts follow from shapes and shardings, and
  # the rest of the sum is padding.
  kinds = {
    "parameters": sharding.device_bytes([state["params"], state.get("frozen", {})]),
    "optimizer": sharding.device_bytes(state["opt"]),
    "average": sharding.device_bytes(state.get("ema", {})),
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


def read_out_of_memory(text: str, limit: int, given: int = 0) -> OutOfMemory:
  """Parses the compiler's error.

  Args:
    text: The error.
    limit: Bytes of a device, if the error does not report them.
    given: Bytes of the program's arguments. Some compilers report only its temporaries.
  """
  # "(22.66G) exceeds available HBM (15.75G)" reports the temporaries only; another form, "Used
  # 22.66G of 15.75G hbm", reports everything.
  sizes = re.search(r"\(?([\d.]+)([KMGT]?)B?\)? exceeds available HBM \(([\d.]+)([KMGT])\)", text)
  if sizes is None:
    sizes, given = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", text), 0
  if sizes is None:
    return OutOfMemory(0, limit)
  return OutOfMemory(_bytes(*sizes.groups()[:2]) + given, _bytes(*sizes.groups()[2:]))


def _bytes(number: str, unit: str) -> int:
  return int(float(number) * _SIZES[unit])
