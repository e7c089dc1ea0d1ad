"""Config keys of the `mesh` section: how devices share the work, and the compiled step."""

import functools

from jaxgpt.config import checks, mesh_rules
from jaxgpt.config.keys import conditions
from jaxgpt.config.keys.conditions import above_0, other_than
from jaxgpt.config.schema import AT_LEAST_0, AT_LEAST_1, Key, Needs, Section

# The mesh axes, in the order of the device mesh. A size of -1 takes the devices that are left.
_AXES = dict(
  data=Key(1, "Devices that hold copies of the model and split the batch."),
  fsdp=Key(-1, "Devices that split the batch and shard the parameters."),
  seq=Key(
    1,
    "Devices that split the tokens of each row, for long contexts. 2 * seq must divide "
    "`data.seq_len`; with splash attention, 256 * seq must.",
  ),
  tensor=Key(1, "Devices that split heads, MLP columns and the vocabulary."),
  expert=Key(1, "Devices that split the experts. They also split the batch."),
  stage=Key(
    1,
    "Devices that split the layers into pipeline stages. Outside the layers they split the batch.",
  ),
)
MESH_AXES = tuple(_AXES)


def _rule(default: str, help: str, needs: Needs | None = None) -> Key:
  check = functools.partial(mesh_rules.check_rule, mesh_axes=MESH_AXES)
  return Key(default, help, check=check, needs=needs)


RULES = Section(
  "Logical axis rules: the mesh axes that shard each logical axis of parameters and activations, "
  "joined by commas, or `none`. A mesh axis can shard only one dimension of an array.",
  dict(
    vocab=_rule("tensor", "Parameters: the rows of the vocabulary."),
    positions=_rule("none", "Parameters: learned positions and token types.", conditions.POSITIONS),
    embed=_rule("fsdp", "Parameters: the dimension of the residual stream."),
    mlp=_rule("tensor", "Parameters: columns of MLPs and experts."),
    heads=_rule("tensor", "Parameters: query heads."),
    kv_heads=_rule("tensor", "Parameters: key/value heads."),
    head_dim=_rule("none", "Parameters: entries of a head."),
    norm=_rule("none", "Parameters: scales of norms, biases of the residual stream."),
    experts=_rule("expert", "Parameters and activations: experts.", conditions.EXPERTS),
    router=_rule("none", "Parameters: columns of a router.", conditions.EXPERTS),
    rank=_rule("none", "Parameters: ranks of LoRA and latent attention.", conditions.RANKS),
    latent=_rule(
      "fsdp",
      "Parameters: the input dimension of the projections of latent attention to queries, keys and "
      "values. Where the mesh does not divide it, each device holds all of it.",
      above_0("model.latent.kv_rank"),
    ),
    labels=_rule("none", "Parameters: classes of a classifier.", conditions.HAS_CLASSES),
    residual_length=_rule(
      "seq,tensor", "Activations between blocks: tokens of a row (sequence parallelism)."
    ),
    expert_batch=_rule(
      "data,fsdp",
      "Activations: rows that were sent to the experts, with a capacity.",
      above_0("model.moe.capacity"),
    ),
    act_embed=_rule("none", "Activations: the dimension of the residual stream."),
    act_mlp=_rule("tensor", "Activations: columns of MLPs and experts."),
    act_heads=_rule("tensor", "Activations: heads of queries, keys and values alike."),
    act_vocab=_rule(
      "tensor", "Activations: the vocabulary, of logits and of embeddings that are looked up."
    ),
  ),
)

MESH = Section(
  "The device mesh: how many devices share the work in each way. At most one size may be -1, "
  "for the devices that are left.",
  _AXES
  | dict(
    stage_microbatches=Key(
      0,
      "Pipeline microbatches per accumulation step, a multiple of `stage`. The pipeline bubble is "
      "(stage - 1) / (stage_microbatches * stage_repeats + stage - 1) of a step. 0: one row per "
      "data shard in each microbatch.",
      interval=AT_LEAST_0,
      needs=other_than("mesh.stage", 1),
    ),
    stage_repeats=Key(
      1,
      "Times that a microbatch passes through all stages, each time through a stage_repeats-th of "
      "the layers: a smaller bubble, but more messages.",
      interval=AT_LEAST_1,
      needs=other_than("mesh.stage", 1),
    ),
    compiled_step=Key(
      "",
      "File written by `jaxgpt plan --save`. Training loads its compiled step instead of compiling "
      "one, if the step is the same.",
    ),
    compiler_options=Key(
      (),
      'XLA options of the train step as "name=value". They take precedence over those that '
      "jaxgpt/parallel/chips.py has for the chip.",
      check=checks.mesh_compiler_options,
    ),
    rules=RULES,
  ),
  free_on_resume=True,
)
