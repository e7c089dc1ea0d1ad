from jaxgpt import tree


def test_leaves_are_known_by_their_path():
  nested = {"a": {"b": 1, "c": (2, 3)}, "d": 4}
  assert tree.flatten(nested) == {"a/b": 1, "a/c/0": 2, "a/c/1": 3, "d": 4}
  assert tree.map_named(lambda name, x: f"{name}={x}", nested)["a"]["c"][1] == "a/c/1=3"


def test_merge_keeps_both_sides():
  assert tree.merge({"a": {"b": 1}}, {"a": {"c": 2}, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
  assert tree.merge({"a": 1}, None) == {"a": 1}
