"""The drawn shardings are those that JAX makes of the same mesh."""

import jax
import pytest
from jax.sharding import NamedSharding

from jaxgpt import config, tree
from jaxgpt.commands.actions import plan
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from jaxgpt.parallel import mesh, sharding
from jaxgpt.plan import lower, shardings

SMALL = [
  "--config.model.num_layers=2",
  "--config.model.width=64",
  "--config.model.num_heads=4",
  "--config.model.num_kv_heads=4",
  "--config.model.mlp_width=128",
  "--config.model.vocab_size=256",
  "--config.data.seq_len=32",
  "--config.data.batch_size=8",
]
LLAMA = "configs/llama3_8b.py:llama2_7b"


def _resolved(*overrides):
  return lower.resolve(config.load(LLAMA, [*SMALL, *overrides])[0])


@pytest.mark.parametrize(
  "axes",
  [
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"seq": 2, "fsdp": 4},
    {"tensor": 4, "seq": 2},
    {
      "fsdp": 2,
      "tensor": 4,
      "rules.embed": "tensor,fsdp",
      "rules.mlp": "none",
      "rules.act_heads": "none",
      "rules.vocab": "none",
      "rules.heads": "none",
      "rules.kv_heads": "none",
    },
  ],
)
def test_each_device_holds_what_jax_gives_it(axes):
  axes = {"fsdp": 1} | axes
  c = _resolved(*(f"--config.mesh.{axis}={size}" for axis, size in axes.items()))
  where, sizes, rules = mesh.make(c.mesh), mesh.axis_sizes(c.mesh, 8), sharding.rules(c.mesh)
  numbers = {device: i for i, device in enumerate(where.devices.flat)}
  for array in shardings.parameters(c) + shardings.activations(c):
    shape = tuple(size for _, size in array.dims)
    spec = rules.fitting_spec(where, shape, [axis for axis, _ in array.dims])
    splits = shardings.split(array, sizes, rules)
    part = [size // one.shards for size, one in zip(shape, splits, strict=True)]
    expected = {}
    for device, slices in NamedSharding(where, spec).devices_indices_map(shape).items():
      index = tuple(s.indices(n)[0] // p for s, n, p in zip(slices, shape, part, strict=True))
      expected.setdefault(index, []).append(numbers[device])
    found = shardings.holders(array, sizes, rules)
    assert found == {index: sorted(held) for index, held in expected.items()}, array.name


ROWS = {"data.batch_size": 128, "eval.batch_size": 128}


@pytest.mark.parametrize(
  "sizes, overrides, words",
  [
    ({"tensor": 8}, {}, "mesh.tensor=8 does not divide dimension 'kv_heads' = 4"),
    ({"fsdp": 128}, ROWS, "mesh.fsdp=128 does not divide dimension 'embed' = 64"),
    ({"stage": 2}, {"model.num_layers": 3}, "mesh.stage=2 .* does not divide the 3 repetitions"),
    ({"stage": 2}, {"mesh.stage_microbatches": 3}, "mesh.stage_microbatches=3 must be a multiple"),
    ({"seq": 4}, {"data.seq_len": 100}, "data.seq_len=100 is not a multiple of 8"),
    ({"seq": 2}, {"data.seq_len": 640}, "data.seq_len=640 is not a multiple of 512"),  # splash
    ({}, {"model.attention": "cudnn"}, "cudnn' is a kernel for GPUs"),
  ],
)
def test_what_training_refuses_is_not_drawn(sizes, overrides, words):
  sizes = dict.fromkeys(config.MESH_AXES, 1) | sizes
  c = _resolved(*(f"--config.{key}={value}" for key, value in overrides.items()))
  with pytest.raises(UserError, match=words):
    shardings.describe(c, sizes, "tpu")


def test_rows_of_an_evaluation_that_the_mesh_does_not_divide_are_refused():
  with pytest.raises(UserError, match="eval.batch_size=12 is not a multiple of mesh.fsdp=8"):
    plan.draw(LLAMA, [*SMALL, "--config.eval.batch_size=12"], "v5e-8")


MOE = (
  "--config.model.mlp_pattern=('moe',)",
  "--config.model.moe.experts=4",
  "--config.model.moe.width=96",
)


@pytest.mark.parametrize(
  "overrides, names",
  [
    (("--config.model.moe.capacity=1.25",), ["within the experts"]),
    (("--config.model.moe.capacity=0",), ["results of the experts"]),
    (
      ("--config.model.moe.capacity=0", "--config.model.moe.shared=1"),
      ["results of the experts", "within the shared experts"],
    ),
    (
      ("--config.model.moe.capacity=1", "--config.model.mlp_pattern=('dense','moe')"),
      ["within the MLP", "within the experts"],
    ),
  ],
)
def test_activations_are_those_of_the_layers_that_there_are(overrides, names):
  c = _resolved(*MOE, *overrides)
  assert [a.name for a in shardings.activations(c)][3:-1] == names
  found = {a.name: a for a in shardings.activations(c)}
  if "within the experts" in names:
    assert found["within the experts"].dims[1] == ("experts", 4)
    assert found["within the experts"].dims[-1] == ("act_mlp", 96)


def test_all_parameters_are_listed_with_their_bytes():
  c = _resolved()
  shapes, _ = transformer.abstract(transformer.Transformer(c.model))
  names = {array.name: array for array in shardings.parameters(c)}
  assert names.keys() == tree.flatten(shapes).keys()
  lines = shardings.table([names["layers/mlp/up"]], mesh.axis_sizes(c.mesh, 8), sharding.DEFAULT)
  assert lines[1].split() == [
    "layers/mlp/up",
    "layers",
    "2",
    "x",
    "embed",
    "64",
    "x",
    "mlp",
    "128",
    "embed:",
    "fsdp",
    "[2,8,128]",
    f"{2 * 8 * 128 * 4 / 2**20:.2f}",
  ]


def test_a_picture_of_copies_and_one_of_many_parts():
  array = shardings.Array("w", (("embed", 64), ("mlp", 128)), 4)
  sizes = {"data": 2, "fsdp": 8, "seq": 1, "tensor": 2, "expert": 1, "stage": 1}
  assert shardings.picture(array, sizes, sharding.DEFAULT) == [
    "w [64, 128]   ↓ embed over fsdp   → mlp over tensor",
    "┌───────┬───────┐",
    "│ 0 16  │ 1 17  │",
    "├───────┼───────┤",
    "│ 2 18  │ 3 19  │",
    "├───────┼───────┤",
    "│ …     │ …     │",
    "├───────┼───────┤",
    "│ 14 30 │ 15 31 │",
    "└───────┴───────┘",
  ]
  whole = shardings.Array("scale", (("norm", 64),), 4)
  assert shardings.picture(whole, sizes, sharding.DEFAULT)[::2] == [
    "scale [64]   replicated",
    "│ 0-31 │",
  ]


def test_shardings_are_drawn_without_a_compiler(capsys, monkeypatch):
  monkeypatch.setattr(jax.experimental.topologies, "get_topology_desc", None)
  overrides = [*SMALL, "--config.data.batch_size=64", "--config.mesh.data=2"]
  assert plan.draw(LLAMA, overrides, "v5e-32x2") == 0
  assert capsys.readouterr().out.startswith("mesh: data 2, fsdp 32\n")
