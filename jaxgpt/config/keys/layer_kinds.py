"""The kinds of the layers of a model, from its patterns."""

from ml_collections import ConfigDict


def attention_kinds(m: ConfigDict) -> list[str]:
  """The kind of attention of each layer: 'global', 'local' or 'nope'.

  Args:
    m: The `model` section.
  """
  return [m.attention_pattern[i % len(m.attention_pattern)] for i in range(m.num_layers)]


def mlp_kinds(m: ConfigDict) -> list[str]:
  """The kind of MLP of each layer: 'dense', 'moe' or 'none'. `m` is the `model` section."""
  return [
    "dense" if i < m.moe.first_dense else m.mlp_pattern[i % len(m.mlp_pattern)]
    for i in range(m.num_layers)
  ]
