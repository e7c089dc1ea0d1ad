import jax
import pytest

from jaxgpt import config, mesh
from jaxgpt.errors import UserError


def section(**sizes):
  c = config.base().mesh
  c.update(sizes)
  return c


def test_minus_one_takes_what_is_left():
  assert mesh.axis_sizes(section(data=2, fsdp=-1), 8)["fsdp"] == 4
  assert dict(mesh.make(section(data=-1, fsdp=2)).shape) == {
      "data": 4, "fsdp": 2, "seq": 1, "tensor": 1, "expert": 1, "stage": 1}
  assert mesh.make(section(), jax.devices()[:3]).shape["fsdp"] == 3


@pytest.mark.parametrize("sizes, words", [
    (dict(data=3), "mesh.data=3.*3 does not divide the 8 devices"),
    (dict(data=3, fsdp=1), "mesh.data=3: the axes multiply to 3, but there are 8 devices"),
    (dict(data=-1), "only one axis may be -1"),
    (dict(data=0), "mesh.data=0.*at least 1"),
    (dict(stage=2), "mesh.stage=2.*pipelines"),
])
def test_a_mesh_that_does_not_fit_is_named(sizes, words):
  with pytest.raises(UserError, match=words):
    mesh.axis_sizes(section(**sizes), 8)


def test_a_batch_must_divide():
  sizes = mesh.axis_sizes(section(data=2, fsdp=4), 8)
  mesh.check_batch(sizes, 16, 2)
  with pytest.raises(UserError, match=r"data.batch_size=12 .*mesh.data=2 x mesh.fsdp=4 = 8; choose a multiple"):
    mesh.check_batch(sizes, 12)
  with pytest.raises(UserError, match=r"optim.accumulate=4 = 32"):
    mesh.check_batch(sizes, 16, 4)
