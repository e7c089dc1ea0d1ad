"""The choice of an attention implementation: model.attention, and the meaning of 'auto'."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxgpt.errors import UserError
from jaxgpt.model.attention.kernels import cudnn, splash

FORMS = ("reference", "batched", "splash", "cudnn")
KERNELS = {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}  # and the platforms that they run on


class Workload(NamedTuple):
  """The properties of attention that the choice depends on.

  Attributes:
    length: Tokens of a row.
    dtype: Of queries, keys and values.
    softcap: Softcap on the logits, or None.
    heads: (head size of queries and keys, head size of values).
  """

  length: int
  dtype: str
  softcap: float | None
  heads: tuple[int, int]


def choose(
  form: str, platform: str, work: Workload, capability: tuple[int, int] | None = None
) -> str:
  """Returns the implementation that model.attention=form stands for.

  Args:
    form: One of `FORMS`, which is checked and returned, or 'auto'.
    platform: Platform of the devices: 'cpu', 'tpu', 'gpu' (or 'cuda', its name in plans).
    work: The rows and heads.
    capability: Compute capability of the GPUs, see `cudnn.supports_heads`.

  Raises:
    UserError: The requested kernel does not run on this platform, or not on these rows or heads, or
      lacks a softcap.
  """
  if form != "auto":
    _check(form, platform, work, capability)
    return form
  if platform == "cpu":
    return "batched"
  if platform == "tpu" and work.length % splash.LANES == 0:
    return "splash"
  is_16_bit = jnp.dtype(work.dtype).itemsize == 2
  fits_cudnn = platform in KERNELS["cudnn"] and is_16_bit and work.softcap is None
  return "cudnn" if fits_cudnn and cudnn.supports_heads(*work.heads, capability) else "reference"


def _check(form: str, platform: str, work: Workload, capability: tuple[int, int] | None) -> None:
  way_out = f"leave model.attention=auto, or choose one of {', '.join(FORMS[:2])}"
  key = f"model.attention={form!r}"
  if form in KERNELS and platform not in KERNELS[form]:
    raise UserError(
      f"{key} is a kernel for {KERNELS[form][0].upper()}s, but the devices are of platform "
      f"{platform!r}; {way_out}"
    )
  if form == "splash" and work.length % splash.LANES:
    raise UserError(
      f"{key}: data.seq_len={work.length} is not a multiple of {splash.LANES}, the smallest block "
      f"of this kernel; make it one, or {way_out}"
    )
  if form == "cudnn" and jnp.dtype(work.dtype).itemsize != 2:
    raise UserError(f"{key} needs a 16-bit dtype: set model.dtype=bfloat16, or {way_out}")
  if form == "cudnn" and work.softcap is not None:
    raise UserError(
      f"{key}: cuDNN's kernel has no softcap, and model.attn_softcap={work.softcap}; {way_out}"
    )
  if form == "cudnn" and not cudnn.supports_heads(*work.heads, capability):
    raise UserError(
      f"{key}: cuDNN has no kernel for head size {work.heads[0]} (values: {work.heads[1]}) on "
      f"{cudnn.gpu_name() or 'a GPU that is not in this machine'}; leave model.attention=auto"
    )
