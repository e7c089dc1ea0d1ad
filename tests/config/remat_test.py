"""The grammar of `model.remat`."""

import pytest

from jaxgpt.config import remat
from jaxgpt.errors import UserError


def test_lists_of_saved_and_offloaded_activations():
  assert remat.activations("save:q,k+offload:gate") == (("q", "k"), ("gate",))
  assert remat.activations("offload:o") == ((), ("o",))
  assert remat.activations("save:q+offload:input") == (("q",), ("input",))
  assert remat.activations("full") == ((), ())


@pytest.mark.parametrize(
  "value", ["none", "full", "save:q", "offload:o,up", "save:q+offload:k,input"]
)
def test_well_formed_values(value):
  remat.check("model.remat", value)


@pytest.mark.parametrize(
  "value", ["save:q+offload:q", "offload:", "offload:x", "save:q+full", "save:input", "ful", ""]
)
def test_malformed_values_are_refused_with_an_example(value):
  with pytest.raises(UserError, match="such as 'save:q,k,v,attention', or 'offload:' and such"):
    remat.check("model.remat", value)
