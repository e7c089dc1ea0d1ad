"""The kinds of the layers of a model, from its patterns."""

from ml_collections import ConfigDict


def attention_kinds(m: ConfigDict) -> list[str]:
  """The kind of attention of each layer: 'global', 'local' or 'nope'.

  Args:
    m: The `model` section.
  """
  pattern = m.attention_pattern  # read once: lookups in a ConfigDict are slow
  return [pattern[i % len(pattern)] for i in range(m.num_layers)]


def mlp_kinds(m: ConfigDict) -> list[str]:
  """The kind of MLP of each layer: 'dense', 'moe' or 'none'. `m` is the `model` section."""
  pattern, dense = m.mlp_pattern, m.moe.first_dense
  return ["dense" if i < dense else pattern[i % len(pattern)] for i in range(m.num_layers)]
