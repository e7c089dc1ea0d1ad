"""The choice of an attention implementation by platform, rows and heads."""

import types

import jax
import pytest

from jaxgpt.errors import UserError
from jaxgpt.model.attention import choose


def work(**more):
  fields = dict(length=1024, dtype="bfloat16", softcap=None, heads=(64, 64)) | more
  return choose.Workload(**fields)


@pytest.mark.parametrize(
  "platform, more, form",
  [
    ("cpu", {}, "batched"),
    ("cpu", dict(softcap=30.0), "batched"),
    ("tpu", {}, "splash"),
    ("tpu", dict(softcap=30.0), "splash"),
    ("tpu", dict(length=100), "reference"),
    ("gpu", {}, "cudnn"),
    ("gpu", dict(dtype="float32"), "reference"),
    ("gpu", dict(softcap=30.0), "reference"),
    ("gpu", dict(heads=(256, 256)), "reference"),
    ("gpu", dict(heads=(100, 100)), "reference"),
    ("gpu", dict(heads=(128, 64)), "reference"),
  ],
)
def test_auto_goes_by_the_platform(platform, more, form):
  assert choose.choose("auto", platform, work(**more)) == form
  assert choose.choose("batched", platform, work(**more)) == "batched"


@pytest.mark.parametrize(
  "form, platform, more, words",
  [
    ("splash", "cpu", {}, "a kernel for TPUs, but the devices are of platform 'cpu'"),
    ("cudnn", "tpu", {}, "a kernel for GPUs, but the devices are of platform 'tpu'"),
    ("splash", "tpu", dict(length=1000), "data.seq_len=1000 is not a multiple of 128"),
    ("cudnn", "gpu", dict(dtype="float32"), "set model.dtype=bfloat16"),
    ("cudnn", "gpu", dict(softcap=30.0), "no softcap, and model.attn_softcap=30.0; leave"),
  ],
)
def test_a_kernel_that_cannot_run_is_a_user_error(form, platform, more, words):
  with pytest.raises(UserError, match=words):
    choose.choose(form, platform, work(**more))


def test_cudnn_is_chosen_if_the_gpu_supports_the_head_sizes(monkeypatch):
  wide = work(heads=(256, 128))
  with pytest.raises(
    UserError, match=r"no kernel for head size 256 \(values: 128\) on a GPU that is not"
  ):
    choose.choose("cudnn", "gpu", wide)
  gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
  monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
  assert choose.choose("auto", "gpu", wide) == "cudnn"
  assert choose.choose("cudnn", "gpu", wide) == "cudnn"
  gpu.compute_capability = "gfx942"
  assert choose.choose("auto", "gpu", wide) == "reference"
  gpu.compute_capability = "8.0"
  with pytest.raises(UserError, match="on NVIDIA H100; leave model.attention=auto"):
    choose.choose("cudnn", "gpu", wide)


@pytest.mark.parametrize(
  "capability, heads, form",
  [
    ((9, 0), (256, 256), "cudnn"),
    ((10, 0), (192, 128), "cudnn"),
    ((8, 0), (256, 256), "reference"),
    ((8, 9), (128, 128), "cudnn"),
    ((8, 9), (192, 128), "reference"),
    ((9, 0), (512, 512), "reference"),
  ],
)
def test_gpus_that_are_not_here_are_asked_about_by_their_capability(capability, heads, form):
  assert choose.choose("auto", "gpu", work(heads=heads), capability) == form
