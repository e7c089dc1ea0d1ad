"""What values the keys of a config may have, alone and together."""

import math

from jaxgpt.errors import UserError, nearest

CHOICES = {
  "objective.name": ("causal_lm", "masked_lm", "classification", "preference"),
  "model.norm": ("layernorm", "rmsnorm"),
  "model.norm_placement": ("pre", "branch", "both", "post"),
  "model.position": ("learned", "rotary", "none"),
  "model.qk_norm": ("none", "head", "all"),
  "model.head": ("lm", "classifier", "pooler", "none"),
  "model.head_transform": ("none", "tanh", "norm"),
  "model.pooling": ("first", "mean"),
  "model.rope.scaling": ("none", "linear", "ntk", "llama3", "yarn", "longrope"),
  "model.moe.router": ("softmax", "sigmoid"),
  "model.activation": ("gelu", "gelu_exact", "silu", "relu", "relu2"),
  "model.dtype": ("float32", "bfloat16"),
  "model.grad_dtype": ("compute", "float32"),
  "model.quantize": ("none", "int8", "fp8"),
  "model.materialize": ("none", "values", "gradients"),
  "model.attention": ("auto", "reference", "batched", "splash", "cudnn"),
  "data.packing": ("best_fit", "concat", "one_per_row"),
  "optim.name": ("adamw", "lion", "adafactor", "muon"),
  "optim.first_dtype": ("float32", "bfloat16"),
  "optim.second_dtype": ("float32", "bfloat16"),
  "schedule.name": ("cosine", "linear", "wsd", "inverse_sqrt", "constant"),
}

REMAT = ("none", "full", "dots", "save_qkv", "save_attention")
SAVED = ("q", "k", "v", "attention", "o", "gate", "up", "down")  # what model.remat='save:…' names

FIXED_RULES = {  # rows of the table of logical axes that code is written for: (mesh axes, by what)
  # Of the batch, where all stages do the same; within the layers, where a stage has its own.
  "rows": (("data", "fsdp", "expert", "stage"), "the readers of batches"),
  "batch": (("data", "fsdp", "expert"), "the pipeline"),
  "stages": (("stage",), "the pipeline"),
  "layers": (("stage",), "the pipeline"),
  "length": (("seq",), "the ring of context parallelism"),
}
_ACTIVATIONS = {  # what each is cut by, for which mesh axes no two rows may share
  "what goes between the blocks": ("rows", "residual_length", "act_embed"),
  "what the head reads": ("rows", "length", "act_embed"),
  "the logits": ("rows", "length", "act_vocab"),
  "the gathered embeddings": ("act_vocab", "act_embed"),
  "the heads": ("rows", "length", "act_heads"),
  "the MLP's columns": ("rows", "length", "act_mlp"),
  "what the experts read": ("stages", "expert_batch", "experts", "act_embed"),
  "the experts' columns": ("stages", "expert_batch", "experts", "act_mlp"),
}

PATTERNS = {  # keys whose value is a tuple of these
  "model.attention_pattern": ("global", "local", "nope"),
  "model.mlp_pattern": ("dense", "moe"),
}


def values(flat):
  """Raises a UserError where a value is out of its range, or is no choice of its key.

  Args:
    flat: the config as `config.flatten` gives it; its placeholders may be empty.
  """
  positive = (
    "model.num_layers",
    "model.width",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.mlp_width",
    "model.max_len",
    "model.vocab_size",
    "model.scan_unroll",
    "model.window",
    "model.num_labels",
    "model.rope.original_len",
    "model.moe.per_token",
    "model.moe.width",
    "model.moe.groups",
    "model.moe.top_groups",
    "model.latent.rope_dim",
    "model.latent.v_dim",
    "data.seq_len",
    "data.batch_size",
    "data.stream_window",
    "data.threads",
    "data.prefetch",
    "optim.accumulate",
    "mesh.stage_repeats",
    "train.steps",
    "eval.batch_size",
    "log.every",
    "checkpoint.every",
    "checkpoint.keep",
  )
  for key in positive:
    if flat[key] is not None and flat[key] < 1:
      raise UserError(f"{key}={flat[key]} must be at least 1")
  at_least_0 = (
    "model.token_types",
    "model.moe.experts",
    "model.moe.shared",
    "model.moe.first_dense",
    "model.moe.capacity",
    "model.moe.balance_loss",
    "model.moe.z_loss",
    "model.lora.rank",
    "model.latent.kv_rank",
    "model.latent.q_rank",
    "schedule.warmup_steps",
    "eval.every",
    "eval.batches",
    "checkpoint.keep_every",
    "optim.clip_norm",
    "optim.weight_decay",
    "optim.lr",
    "optim.adam_lr",
    "objective.z_loss",
    "objective.loss_chunk",
    "mesh.stage_microbatches",
  )
  for key in at_least_0:
    if flat[key] is not None and flat[key] < 0:
      raise UserError(f"{key}={flat[key]} must be at least 0")
  for key, value in flat.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"{key}={value} must be a finite number")
  for key in (
    "model.norm_eps",
    "model.init_std",
    "model.logit_softcap",
    "model.attn_softcap",
    "model.attn_scale",
    "model.embed_scale",
    "model.rope.theta",
    "model.rope.local_theta",
    "model.rope.fraction",
    "model.rope.factor",
    "model.rope.attention_factor",
    "model.moe.scale",
    "model.lora.alpha",
    "optim.layer_decay",
    "objective.beta",
    "optim.eps",
  ):
    if flat[key] is not None and flat[key] <= 0:
      raise UserError(f"{key}={flat[key]} must be above 0")
  for key in (
    "schedule.decay_fraction",
    "schedule.final_ratio",
    "objective.mask_rate",
    "objective.mask_replace",
    "objective.mask_random",
  ):
    if not 0 <= flat[key] <= 1:
      raise UserError(f"{key}={flat[key]} must lie in [0, 1]")
  if not 0 <= flat["seed"] < 2**31:
    raise UserError(f"seed={flat['seed']} must lie in [0, 2^31)")
  for key in (
    "model.dropout",
    "model.lora.dropout",
    "optim.ema",
    "optim.b1",
    "optim.b2",
    "optim.muon_momentum",
  ):
    if not 0 <= flat[key] < 1:
      raise UserError(f"{key}={flat[key]} must lie in [0, 1)")
  _weights(flat)
  _pairs(flat)
  _remat(flat["model.remat"])
  for key, names in PATTERNS.items():
    if not flat[key] or set(flat[key]) - set(names):
      raise UserError(f"{key}={flat[key]!r}: a tuple of one or more of {', '.join(names)}")
  for key, names in CHOICES.items():
    if flat[key] not in names:
      raise UserError(
        f"{key}={flat[key]!r}: {nearest(str(flat[key]), names)}choose one of {', '.join(names)}"
      )


def kept(remat):
  """(names saved on the device, names moved to the host) of 'save:a,b', 'offload:c' or both.

  Both are joined by '+': 'save:gate,up+offload:q,k,v'. Anything else has no names.
  """
  names = {"save": (), "offload": ()}
  for part in remat.split("+"):
    where, _, some = part.partition(":")
    if where in names and some:
      names[where] += tuple(some.split(","))
  return names["save"], names["offload"]


def _remat(value):
  names = sum(kept(value), ())
  parts = [part.partition(":") for part in value.split("+")]
  are_named = all(where in ("save", "offload") and some for where, _, some in parts)
  if value not in REMAT and (
    not are_named or set(names) - set(SAVED) or len(set(names)) < len(names)
  ):
    raise UserError(
      f"model.remat={value!r}: {nearest(value, REMAT)}choose one of "
      f"{', '.join(REMAT)}, or save: and some of {','.join(SAVED)}, each once, such as "
      "'save:q,k,v,attention', or offload: and such names, or 'save:gate,up+offload:q'"
    )


def mesh_axes_of(rule):
  """The mesh axes of a value of `mesh.rules`, ('fsdp', 'tensor') of 'fsdp,tensor', () of 'none'."""
  return () if rule == "none" else tuple(rule.split(","))


def rules(section, mesh_axes):
  """Raises a UserError where a row of `mesh.rules` is none, or cuts an activation twice by one axis.

  Args:
    section: the config's `mesh.rules`.
    mesh_axes: names of all mesh axes.
  """
  table = {axis: names for axis, (names, _) in FIXED_RULES.items()}
  for axis, rule in section.items():
    table[axis] = names = mesh_axes_of(rule)
    unknown = [name for name in names if name not in mesh_axes]
    if unknown:
      raise UserError(
        f"mesh.rules.{axis}={rule!r}: no mesh axis {unknown[0]!r}; "
        f"{nearest(unknown[0], mesh_axes)}give some of {', '.join(mesh_axes)} joined "
        "by commas, or none"
      )
    cut_once(table, (axis,), "a dimension")
  for what, axes in _ACTIVATIONS.items():
    cut_once(table, axes, what)


def cut_once(table, axes, what):
  """Raises a UserError where a mesh axis cuts two dimensions of an array, or one of them twice.

  Args:
    table: {logical axis: mesh axes}.
    axes: the array's logical axes, or None.
    what: it is, for the message.
  """
  seen = {}
  for axis in filter(None, axes):
    for name in table[axis]:
      if name in seen:
        ours = [a for a in dict.fromkeys((axis, seen[name])) if a not in FIXED_RULES]
        rows = " and ".join(f"mesh.rules.{a}={','.join(table[a])!r}" for a in ours)
        fixed = "" if seen[name] in ours else f" (its {seen[name]!r} always is)"
        raise UserError(
          f"{rows}: {what} would be cut by the mesh axis {name!r} twice{fixed}; "
          f"take {name!r} out of mesh.rules.{ours[0]}, or name another mesh axis"
        )
      seen[name] = axis


def _weights(flat):
  """Raises a UserError where the weights of a mixture have not the form that is asked for."""
  is_number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
  are_weights = lambda x: isinstance(x, tuple) and all(is_number(w) and w >= 0 for w in x)
  given = flat["data.weights"]
  if not are_weights(given):
    raise UserError(
      f"data.weights={given!r} must be numbers of at least 0, one a folder of "
      "data.path, such as (0.7, 0.3)"
    )
  last = 0
  for change in flat["data.weight_changes"]:
    if not (
      isinstance(change, tuple)
      and len(change) == 2
      and isinstance(change[0], int)
      and change[0] > last
      and are_weights(change[1])
    ):
      raise UserError(
        f"data.weight_changes: {change!r} must be (step, weights) with a step above "
        f"{last}; write ((1000, (0.5, 0.5)),) for new weights from step 1000 on"
      )
    last = change[0]


def _pairs(flat):
  """Raises a UserError where options of XLA, or shares of the learning rate, have not their form."""
  for option in flat["mesh.compiler_options"]:
    if not isinstance(option, str) or not option.partition("=")[2]:
      raise UserError(
        f'mesh.compiler_options: {option!r} must be "name=value"; write '
        "--config.mesh.compiler_options='(\"name=value\",)'"
      )
  for scale in flat["optim.lr_scales"]:
    if not (
      isinstance(scale, tuple)
      and len(scale) == 2
      and isinstance(scale[0], str)
      and isinstance(scale[1], (int, float))
      and scale[1] >= 0
    ):
      raise UserError(
        f"optim.lr_scales: {scale!r} must be (pattern, factor); write "
        "(('layers/*', 0.1),), with the comma at the end"
      )


def combinations(c):
  """Raises a UserError where values of a resolved config exclude each other."""
  m = c.model
  if m.num_heads % m.num_kv_heads:
    raise UserError(
      f"model.num_kv_heads={m.num_kv_heads} does not divide model.num_heads={m.num_heads}"
    )
  _model(m)
  if c.objective.name in ("causal_lm", "preference") and not m.causal:
    raise UserError(
      f"objective.name={c.objective.name!r} needs model.causal=True: otherwise each "
      "token reads the one it is to predict"
    )
  o = c.objective
  if o.mask_replace + o.mask_random > 1:
    raise UserError(
      f"objective.mask_replace={o.mask_replace} and objective.mask_random="
      f"{o.mask_random} are shares of the same tokens; their sum must not exceed 1"
    )
  if o.name == "preference" and not m.lora.rank:
    raise UserError(
      "objective.name='preference' compares the model with itself without adapters: "
      "set model.lora.rank, such as 16"
    )
  if o.loss_chunk and o.name not in ("causal_lm", "masked_lm"):
    raise UserError(
      f"objective.loss_chunk={o.loss_chunk} is for causal_lm and masked_lm, not for "
      f"objective.name={o.name!r}; set it to 0"
    )
  if c.data.stream and o.name != "causal_lm":
    raise UserError(
      f"data.stream={c.data.stream!r} is for objective.name='causal_lm', not "
      f"{o.name!r}; prepare the files with `jaxgpt data`"
    )
  if c.data.stream and (c.data.weights or c.data.weight_changes):
    raise UserError(
      "data.weights and data.weight_changes mix prepared folders, and data.stream="
      f"{c.data.stream!r} takes the place of their training splits; leave them out"
    )
  head = "classifier" if c.objective.name == "classification" else "lm"
  if m.head in ("lm", "classifier") and m.head != head:
    raise UserError(
      f"objective.name={c.objective.name!r} needs model.head={head!r}, not {m.head!r}"
    )
  if c.data.seq_len > m.max_len:
    raise UserError(
      f"data.seq_len={c.data.seq_len} is longer than the model's context model.max_len={m.max_len}"
    )
  _moments(c.optim)
  if c.data.batch_size % c.optim.accumulate:
    raise UserError(
      f"optim.accumulate={c.optim.accumulate} does not divide data.batch_size={c.data.batch_size}"
    )
  if c.schedule.warmup_steps > c.train.steps:
    raise UserError(
      f"schedule.warmup_steps={c.schedule.warmup_steps} is more than train.steps={c.train.steps}"
    )


def _model(m):
  if m.rope.fraction > 1:
    raise UserError(f"model.rope.fraction={m.rope.fraction} is a share of a head: at most 1")
  if m.position == "rotary" and not m.latent.kv_rank and m.head_dim * m.rope.fraction % 2:
    raise UserError(
      f"model.head_dim={m.head_dim} x model.rope.fraction={m.rope.fraction} must be "
      "even for model.position='rotary'"
    )
  if "local" in m.attention_pattern and m.window is None:
    raise UserError("model.attention_pattern has 'local' layers: set model.window, in tokens")
  if m.rope.scaling == "longrope":
    half = int(m.head_dim * m.rope.fraction) // 2
    for key in ("short_factors", "long_factors"):
      if len(m.rope[key]) != half:
        raise UserError(
          f"model.rope.{key} has {len(m.rope[key])} numbers; longrope needs one for "
          f"each of the {half} frequencies"
        )
  if "moe" in m.mlp_pattern:
    _moe(m.moe, m.num_layers)
  if m.latent.kv_rank:
    if m.position != "rotary" or m.num_kv_heads != m.num_heads or m.qk_norm != "none":
      raise UserError(
        "model.latent.kv_rank > 0 needs model.position='rotary', model.num_kv_heads "
        "= model.num_heads and model.qk_norm='none'"
      )
    if not m.latent.rope_dim < m.head_dim or m.latent.rope_dim % 2:
      raise UserError(
        f"model.latent.rope_dim={m.latent.rope_dim} must be even and below "
        f"model.head_dim={m.head_dim}"
      )
  elif m.latent.v_dim != m.head_dim:
    raise UserError(
      f"model.latent.v_dim={m.latent.v_dim} differs from model.head_dim="
      f"{m.head_dim}; only latent attention (model.latent.kv_rank) can do that"
    )
  if m.quantize_gradients and m.quantize == "none":
    raise UserError("model.quantize_gradients=True needs model.quantize='int8' or 'fp8'")
  if m.quantize != "none" and m.grad_dtype != "compute":
    raise UserError(
      f"model.quantize={m.quantize!r} makes weights' gradients in model.dtype: set "
      f"model.grad_dtype='compute', not {m.grad_dtype!r}"
    )
  if m.head == "pooler" and m.head_transform == "none":
    raise UserError("model.head='pooler' needs model.head_transform='tanh' or 'norm'")


_KEEPS = {
  "adamw": ("first_dtype", "second_dtype"),
  "muon": ("first_dtype", "second_dtype"),
  "lion": ("first_dtype",),
  "adafactor": (),
}  # moments of a parameter's size
_LARGEST_B2 = 0.98  # what a step adds is then 1/50 of the moment, ten half units of bfloat16


def _moments(o):
  for key in ("first_dtype", "second_dtype"):
    if o[key] != "float32" and key not in _KEEPS[o.name]:
      raise UserError(
        f"optim.{key}={o[key]!r}: optim.name={o.name!r} keeps no such moment; leave it at 'float32'"
      )
  if o.second_dtype == "bfloat16" and o.b2 > _LARGEST_B2:
    raise UserError(
      f"optim.second_dtype='bfloat16' rounds away what a step changes where "
      f"optim.b2={o.b2} is above {_LARGEST_B2}; set optim.b2=0.95, or keep it in "
      "'float32'"
    )


def _moe(x, num_layers):
  if x.experts < 1:
    raise UserError("model.mlp_pattern has 'moe' layers: set model.moe.experts")
  if x.experts % x.groups or x.top_groups > x.groups:
    raise UserError(
      f"model.moe.groups={x.groups} must divide model.moe.experts={x.experts} and be "
      f"at least model.moe.top_groups={x.top_groups}"
    )
  if x.router == "sigmoid" and x.groups > 1 and x.experts // x.groups < 2:
    raise UserError(
      f"model.moe.groups={x.groups} leaves one expert a group, and model.moe.router="
      "'sigmoid' ranks groups by their best two; take fewer groups"
    )
  if x.per_token > x.experts // x.groups * x.top_groups:
    raise UserError(
      f"model.moe.per_token={x.per_token} is more than the experts a token can "
      f"choose from ({x.experts // x.groups * x.top_groups})"
    )
  if x.first_dense >= num_layers:
    raise UserError(
      f"model.moe.first_dense={x.first_dense} leaves none of the "
      f"model.num_layers={num_layers} layers to the experts"
    )
