"""From a config and a mesh to everything that trains it, before any number is computed."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import ml_collections
import optax

from jaxgpt import tree
from jaxgpt.config import effects, user_code
from jaxgpt.config.keys.layer_kinds import mlp_kinds
from jaxgpt.config.remat import INPUT, activations
from jaxgpt.errors import UserError
from jaxgpt.model import fixed_models, lora, remat, stacks, transformer
from jaxgpt.model.attention import choose
from jaxgpt.model.quantization import quantized_base
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from jaxgpt.run import metric_writers
from jaxgpt.run import teacher as teacher_lib
from jaxgpt.training import objectives, optimizers, schedules, train_step
from jaxgpt.tree import PyTree


class Parts(NamedTuple):
  """A model and everything that trains it.

  Attributes:
    model: The `Transformer`.
    objective: The loss function, see `objectives`.
    tx: The optimizer without gradient clipping.
    schedule: Step -> fraction of the peak learning rate.
    state: The train state as a tree of ShapeDtypeStructs with shardings, see `train_step`.
  """

  model: transformer.Transformer
  objective: objectives.LossFn
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  state: PyTree


def check(c: ml_collections.ConfigDict, for_training: bool = True) -> None:
  """Checks the objective, the optimizer and the schedule that a config names, and their options.

  This needs no data, no devices and no vocabulary, so commands call it first. It executes the user
  files that the config names.

  Args:
    c: A config, resolved or not.
    for_training: False: the model is only used, so it may lack a head.

  Raises:
    UserError: A name is unknown, a user file fails, or the config does not suit the objective, the
      optimizer or the schedule.
  """
  for section, members in c.items():
    if not isinstance(members, ml_collections.ConfigDict) or "name" not in members:
      continue
    options = members.get("options")
    if options and not user_code.is_user_defined(members.name):
      raise UserError(
        f"{section}.options are for your own {section}.name=FILE.py:NAME, but "
        f"{section}.name={members.name!r} is built in and has no {', '.join(options)}; remove them"
      )
  objectives.check(c, for_training)
  optimizers.check(c)
  schedules.find(c).check(c.schedule)


def check_settings(
  c: ml_collections.ConfigDict, origin: Mapping[str, str], *, resumed: bool = False
) -> list[str]:
  """Checks that each setting of a run has an effect: `effects.check`, and `log.options`.

  Args:
    c: A config from `config.load`, not resolved.
    origin: As in `effects.check`.
    resumed: As in `effects.check`.

  Returns:
    Lines to print.

  Raises:
    UserError: A new run has a setting without effect, or no metric writer reads an option.
  """
  metric_writers.check_options(c)
  return effects.check(c, origin, resumed=resumed)


def build(
  c: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  *,
  for_training: bool = True,
  resumed: bool = False,
) -> Parts:
  """Builds the model, its objective and optimizer, and the shape of the state on the mesh.

  Args:
    c: A resolved config.
    mesh: The device mesh.
    for_training: Whether the mesh must divide the batches of training and evaluation. False to use
      a trained model.
    resumed: Whether the run exists already. Runs of earlier versions may have settings without
      effect, which a new run may not have.

  Raises:
    UserError: `check` refuses the config. Also raised if the mesh does not divide a batch, a
      parameter, the length, the heads or the layers, if a pattern of parameters matches none, if
      the objective cannot train the chosen parameters, or if the devices lack a kind of memory.
  """
  check(c, for_training)
  if for_training:
    mesh_lib.check_batch(mesh.shape, c.data.batch_size, c.optim.accumulate)
    mesh_lib.check_batch(mesh.shape, c.eval.batch_size, key="eval.batch_size")
  model = _transformer(c, mesh)
  schedule = schedules.make(c)
  shapes, axes = transformer.abstract(model)
  strict = for_training and not resumed
  trained = optimizers.trained(c.optim, axes, strict)
  select = lambda named, is_leaf=None: tree.split(named, trained, is_leaf)[0]
  depths = select(transformer.depths(c.model, shapes))
  if strict:
    optimizers.check_rates(c.optim, depths)
    optimizers.find(c).check_trained(c.optim, select(axes, sharding.is_axes))
  tx = optimizers.make(c, schedule, select(axes, sharding.is_axes), depths)
  check_qk_clip(c, mesh.shape, set(tree.flatten(shapes)) - set(trained))
  fixed = _fixed_models(c, mesh, trained)
  state = train_step.abstract_state(model, tx, c.optim.ema > 0, trained, mesh, fixed)
  for one in filter(None, (model, fixed.teacher)):
    check_heads(one, mesh)
  return Parts(model, objectives.make(model, c, fixed.teacher), tx, schedule, state)


def teacher(c: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> train_step.Placed:
  """The teacher of a distillation, and the shapes and shardings of its weights.

  Args:
    c: The student's config, from `run.teacher.settle`.
    mesh: The device mesh.
  """
  model = _transformer(teacher_lib.config_of(c), mesh)
  return train_step.Placed(model, train_step.abstract_params(model, mesh))


def _transformer(c: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> transformer.Transformer:
  """The model of a config on a mesh of devices."""
  model = model_on(c, mesh.shape, mesh.devices.flat[0].platform)
  if activations(model.cfg.remat).offloaded:
    mesh_lib.check_memory(mesh, remat.HOST_MEMORY, f"model.remat={model.cfg.remat!r}")
  return model


def model_on(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], platform: str
) -> transformer.Transformer:
  """The model of a config on a mesh, with the attention that suits its platform.

  Args:
    c: The resolved config.
    sizes: Sizes of the mesh axes, {axis: size}.
    platform: Platform of the devices, as JAX names it. The devices need not be there.

  Raises:
    UserError: The mesh does not divide the length or the layers, or does not go with
      `model.remat`. Also raised if the attention does not run on these devices.
  """
  fields = c.model.copy_and_resolve_references()
  fields.attention = attention_form(c, platform)
  mesh_lib.check_length(sizes, c.data.seq_len, fields.attention)
  check_remat(fields.remat, sizes)
  return transformer.Transformer(
    ml_collections.FrozenConfigDict(fields),
    stacks.pipeline_of(c, sizes),
    sharding.rules(c.mesh),
    largest_logits=c.optim.qk_clip > 0,
  )


def attention_form(
  c: ml_collections.ConfigDict, platform: str, capability: tuple[int, int] | None = None
) -> str:
  """The implementation of attention that `model.attention` stands for, see `choose.choose`."""
  m = c.model
  heads = (m.head_dim, m.latent.v_dim)
  work = choose.Workload(c.data.seq_len, m.dtype, m.attn_softcap, heads)
  return choose.choose(m.attention, platform, work, capability)


def check_remat(remat: str, sizes: Mapping[str, int]) -> None:
  """Checks that a remat policy suits the sizes of the mesh axes.

  Args:
    remat: `model.remat`.
    sizes: {axis: size}.

  Raises:
    UserError: It offloads the layers' input, which a pipeline saves on the device.
  """
  if INPUT in activations(remat).offloaded and sizes["stage"] > 1:
    raise UserError(
      f"model.remat={remat!r} does not go with mesh.stage={sizes['stage']}: a pipeline "
      "saves the input of its layers on the device; leave out input, or set mesh.stage=1"
    )


def check_qk_clip(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], frozen: Collection[str] = ()
) -> None:
  """Checks that QK-clip can work.

  Args:
    c: A resolved config.
    sizes: Sizes of the mesh axes, {axis: size}.
    frozen: Paths of the parameters that are not trained.

  Raises:
    UserError: The mesh divides the rows or the layers, or queries or keys are frozen.
  """
  if not c.optim.qk_clip:
    return
  for axis in ("seq", "stage"):
    if sizes[axis] > 1:
      raise UserError(
        f"optim.qk_clip={c.optim.qk_clip} does not work with mesh.{axis}={sizes[axis]}, which "
        "divides the rows or the layers; set one of them to its default"
      )
  if held := sorted(path for path in frozen if path.endswith(("attn/q", "attn/k"))):
    raise UserError(
      f"optim.qk_clip={c.optim.qk_clip} cannot take effect: optim.trainable or optim.frozen keep "
      f"{held[0]} as it is; train it, or set optim.qk_clip=0"
    )


def _fixed_models(
  c: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, trained: Collection[str]
) -> train_step.Fixed:
  """The fixed models that the objective compares the trained one with.

  The reference is the model before the first step with its adapters turned off. So copies of the
  trained parameters are enough, adapters excepted.
  """
  names = objectives.find(c).fixed(c)
  copied = [path for path in trained if not lora.is_adapter(path)]
  reference = copied if fixed_models.REFERENCE in names else ()
  if fixed_models.TEACHER not in names:
    return train_step.Fixed(reference)
  return train_step.Fixed(reference, teacher(c, mesh).model)


def describe_trained(parts: Parts) -> list[str]:
  """Lines on the trained parameters, if there are others, and on fixed models."""
  state, cfg = parts.state, parts.model.cfg
  frozen, fixed = fixed_models.split(state.get("frozen"))
  lines = [
    f"{name}: {tree.count(params):,} parameters that stay as they are"
    for name, params in fixed.items()
  ]
  if not frozen:
    return lines
  names = sorted(tree.flatten(state["params"]))
  shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
  skipped = ""
  if cfg.lora.rank and "moe" in mlp_kinds(cfg):
    skipped = "; the routed experts have no adapters"
  count = tree.count(state["params"])
  total = count + tree.count(jax.eval_shape(quantized_base.numbers, frozen))
  if quantized_base.bits_of(cfg.lora):
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    skipped += f"; the frozen ones take {size:,} bytes ({cfg.lora.base} in the layers)"
  return [f"training {count:,} of {total:,} parameters: {shown}{skipped}", *lines]


def check_heads(model: transformer.Transformer, mesh: sharding.AnyMesh) -> None:
  """Checks that each device has the key/value heads that its query heads attend with.

  Args:
    model: A `Transformer`.
    mesh: The device mesh, or an abstract one.

  Raises:
    UserError: The mesh axes of `mesh.rules.act_heads` do not divide a number of heads.
  """
  shards = model.rules.num_shards(mesh, "act_heads")
  for key in ("num_heads", "num_kv_heads"):
    if model.cfg[key] % shards:
      axes = model.rules.mesh_axes("act_heads")
      sizes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
      raise UserError(
        f"{sizes} does not divide model.{key}={model.cfg[key]}, and "
        f"mesh.rules.act_heads={','.join(axes)!r} shards heads over it; set it to none"
      )
