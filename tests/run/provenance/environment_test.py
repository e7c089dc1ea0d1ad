"""A run folder says in which environment each start ran, and what differs in another one."""

import jax
import pytest

from jaxgpt import config
from jaxgpt.parallel import mesh
from jaxgpt.run.provenance import environment


@pytest.fixture(scope="module")
def here():
  return environment.collect(mesh.make(config.base().mesh), environment.git())


def changed(here, topic, **values):
  return here._replace(facts=here.facts | {topic: here.facts[topic] | values})


def test_it_has_what_a_repetition_needs(here):
  assert here.facts["versions"]["jax"] == jax.__version__
  assert {"numpy", "orbax-checkpoint", "python"} <= here.facts["versions"].keys()
  assert "jaxgpt/run/provenance/environment.py" in here.facts["code"]
  assert here.facts["hardware"]["devices"] == 8
  assert "device_count=8" in here.facts["flags"]["XLA_FLAGS"]


def test_it_is_read_as_it_was_recorded(here, tmp_path):
  here = here._replace(diff="-a\n+b")
  start = {"environment": environment.record(tmp_path, here)}
  again = environment.read(tmp_path, start)
  assert again == here and environment.differences(here, again) == []
  assert environment.record(tmp_path, here) == start["environment"]
  assert len(list((tmp_path / "environments").iterdir())) == 2


@pytest.mark.parametrize(
  "topic, values, text",
  [
    ("versions", {"jax": "0.1"}, f"versions: jax was {jax.__version__}, is 0.1"),
    ("flags", {"XLA_FLAGS": "--x"}, "is --x"),
    ("code", {"jaxgpt/tree.py": "0"}, "code: jaxgpt/tree.py differs"),
    ("code", {"jaxgpt/new.py": "0"}, "code: jaxgpt/new.py was added"),
    ("hardware", {"mesh": "data=8"}, "hardware: mesh was fsdp=8, is data=8"),
  ],
)
def test_a_difference_is_named(here, topic, values, text):
  (found,) = environment.differences(here, changed(here, topic, **values))
  assert text in found.describe()


def test_a_commit_counts_if_it_changed_the_package(here):
  other = changed(here, "code", commit="0")
  assert environment.differences(here._replace(diff="+x"), other) == []
  other = changed(here, "code", commit="0", **{"jaxgpt/tree.py": "0"})
  names = {d.name for d in environment.differences(here, other)}
  assert names - {"commit"} == {"jaxgpt/tree.py"}


def test_the_start_of_an_earlier_version_is_compared_as_far_as_it_goes(here):
  start = {
    "python": here.facts["versions"]["python"],
    "packages": {"jax": "0.1", "jaxgpt": None},
    "git": None,
    "device_kind": here.facts["hardware"]["device"],
    "platform": "cpu",
    "processes": 1,
    "mesh": {"data": 1, "fsdp": 8},
  }
  old = environment.read("nowhere", start)
  assert [d.name for d in environment.differences(old, here)] == ["jax"]


def test_what_computes_comes_first(here):
  other = changed(here, "versions", absl_py="0", jax="0.1")
  other = changed(other, "flags", XLA_FLAGS="")
  assert [d.name for d in environment.differences(here, other)] == ["jax", "absl_py", "XLA_FLAGS"]
