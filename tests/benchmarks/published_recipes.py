"""Recipes that others have run on real pods, and their equivalents in jaxgpt.

Step times are lines of MaxText's log in the README files of AI-Hypercomputer/tpu-recipes
(training/trillium), with JAX 0.5.2 to 0.6.1, so older compilers than those of the estimates. Rates
are those of the tables in MaxText's configs/tpu/v5e and v5p, in TFLOP/s per chip.
"""

from typing import NamedTuple

from jaxgpt.plan import topology


class Recipe(NamedTuple):
  """A published result.

  Attributes:
    preset: Our preset of the model.
    where: Topology.
    rows: Rows of a chip.
    length: Tokens of a row.
    seconds: Measured seconds of a step.
    source: Folder in tpu-recipes/training/trillium, or file in MaxText's configs/tpu.
    changes: {config key: value} of the equivalent.
  """

  preset: str
  where: str
  rows: int
  length: int
  seconds: float
  source: str
  changes: dict


# What the recipes move to the host's memory, as libtpu does it unless it is told otherwise.
_PIPELINED = {"mesh.compiler_options": ("xla_tpu_pipeline_memory_host_transfers=true",)}
_OFFLOADED = {"model.remat": "offload:input,q,k,v,o"} | _PIPELINED
_QKV_OFFLOADED = {"model.remat": "offload:input,q,k,v", "objective.loss_chunk": 2048} | _PIPELINED
# Where the logits of all rows would not fit, as in the one above.
_CHUNKED = _OFFLOADED | {"objective.loss_chunk": 2048}
_MINIMAL = {"model.remat": "save:q,k,v,o,gate,up,down"}


def _scaled(
  source: str,
  where: str,
  rows: int,
  tflops: float,
  model: tuple[int, int, int, int],
  changes: dict,
) -> Recipe:
  """A recipe of MaxText's own models with rows of 2,048 tokens, from its measured TFLOP/s per chip.

  Its models have as many key heads as query heads, heads of 128 and 32,000 tokens. The FLOPs are
  those that MaxText counted when it published the rates: it has counted only the visible half of
  attention since 2025.

  Args:
    source: See `Recipe`.
    where: Topology.
    rows: Rows of a chip.
    tflops: Measured TFLOP/s per chip.
    model: (layers, width, heads, MLP's width).
    changes: See `Recipe`.
  """
  layers, width, heads, hidden = model
  length, vocab, head = 2048, 32000, 128
  of_layer = 4 * width * heads * head + 3 * width * hidden
  weights = layers * of_layer + width * vocab
  flops = 6 * weights + 12 * layers * length * heads * head
  sizes = {
    "num_layers": layers,
    "width": width,
    "num_heads": heads,
    "num_kv_heads": heads,
    "head_dim": head,
    "mlp_width": hidden,
    "vocab_size": vocab,
  }
  changes = {f"model.{key}": value for key, value in sizes.items()} | changes
  seconds = rows * length * flops / (tflops * 1e12)
  return Recipe("llama2_7b", where, rows, length, seconds, source, changes)


_16B = 32, 4096, 64, 28672
_32B = 32, 8192, 64, 28672
_64B = 64, 8192, 64, 28672
_128B = 64, 8192, 128, 57344

RECIPES = {
  "8b_256": Recipe(
    "llama31_8b", "v6e-256", 4, 8192, 4.546, "Llama3.1-8B-MaxText/v6e-256", _OFFLOADED
  ),
  "8b_128": Recipe(
    "llama31_8b", "v6e-128", 4, 8192, 4.602, "Llama3.1-8B-MaxText/v6e-128", _OFFLOADED
  ),
  "8b_32": Recipe("llama31_8b", "v6e-32", 3, 8192, 3.495, "Llama3.1-8B-MaxText/v6e-32", _OFFLOADED),
  "8b_16": Recipe("llama31_8b", "v6e-16", 3, 8192, 3.393, "Llama3.1-8B-MaxText/v6e-16", _OFFLOADED),
  "8b_8": Recipe("llama31_8b", "v6e-8", 3, 8192, 3.443, "Llama3.1-8B-MaxText/v6e-8", _CHUNKED),
  "mistral": Recipe(
    "mistral_7b_v03",
    "v6e-8",
    6,
    8192,
    6.320,
    "Mistral-7B-MaxText",
    _CHUNKED | {"model.vocab_size": 32000},
  ),
  "70b_256": Recipe(
    "llama31_70b", "v6e-256", 5, 8192, 42.656, "Llama3.1-70B-MaxText/v6e-256", _QKV_OFFLOADED
  ),
  "70b_64": Recipe(
    "llama31_70b", "v6e-64", 2, 8192, 18.688, "Llama3.1-70B-MaxText/v6e-64", _QKV_OFFLOADED
  ),
  # The recipe's page says 3 rows of a chip, its log has the tokens of 2.
  "llama2_70b": Recipe(
    "llama2_70b", "v6e-256", 2, 4096, 9.052, "Llama2-70B-MaxText", _QKV_OFFLOADED
  ),
  "mixtral": Recipe(
    "mixtral_8x7b",
    "v6e-256",
    12,
    4096,
    13.484,
    "Mixtral-8x7B-MaxText",
    _OFFLOADED | {"model.moe.capacity": 1.25},
  ),
  "8x22b": Recipe(
    "mixtral_8x22b",
    "v6e-256",
    8,
    4096,
    24.706,
    "Mixtral-8x22B-MaxText",
    _OFFLOADED | {"model.moe.capacity": 1.25, "mesh.expert": 4},
  ),
  "16b_v5e": _scaled("v5e/16b.sh", "v5e-256", 6, 120, _16B, {"model.remat": "full"}),
  "32b_v5e": _scaled("v5e/32b.sh", "v5e-256", 4, 132, _32B, {"model.remat": "full"}),
  "64b_v5e": _scaled("v5e/64b.sh", "v5e-256", 2, 118, _64B, {"model.remat": "full"}),
  "128b_v5e": _scaled(
    "v5e/128b.sh",
    "v5e-256",
    1,
    110,
    _128B,
    {"model.remat": "offload:q,k,v", "mesh.tensor": 16} | _PIPELINED,
  ),
  "32b_v5p": _scaled("v5p/32b.sh", "v5p-128", 6, 328, _32B, _MINIMAL | {"mesh.tensor": 4}),
  "64b_v5p": _scaled("v5p/64b.sh", "v5p-128", 3, 323, _64B, _MINIMAL | {"mesh.tensor": 4}),
  "128b_v5p": _scaled("v5p/128b.sh", "v5p-256", 1, 315, _128B, _MINIMAL | {"mesh.tensor": 8}),
}


def setting(recipe: Recipe) -> tuple[str, str, list[str]]:
  """(config, topology, overrides) of the equivalent of a recipe."""
  changes = {
    "data.seq_len": recipe.length,
    "data.batch_size": recipe.rows * topology.parse(recipe.where).num_devices,
    **recipe.changes,
  }
  overrides = [f"--config.{key}={value}" for key, value in changes.items()]
  return f"configs/llama3_8b.py:{recipe.preset}", recipe.where, overrides
