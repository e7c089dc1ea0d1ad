"""Checks of a resolved config's values against each other, one function per topic."""

import ml_collections

from jaxgpt.config.keys import lora_targets, training
from jaxgpt.config.keys.layer_kinds import attention_kinds, mlp_kinds
from jaxgpt.errors import UserError


def check(c: ml_collections.ConfigDict) -> None:
  """Raises a UserError if values of a resolved config exclude each other.

  Checks that need devices, data or an optional package come later, in `training.build`.
  """
  attention_heads(c.model)
  rotary(c.model)
  experts(c.model)
  latent_attention(c.model)
  lora_targets.check_match(c.model)
  scaled_parametrization(c)
  qk_clip(c)
  quantization(c.model)
  pooler(c.model)
  classes(c.model)
  masking(c.objective)
  windows(c)
  stream(c)
  stored(c)
  lengths(c)


def attention_heads(m: ml_collections.ConfigDict) -> None:
  """Checks grouped queries and local attention of the `model` section."""
  if m.num_heads % m.num_kv_heads:
    raise UserError(
      f"model.num_kv_heads={m.num_kv_heads} does not divide model.num_heads={m.num_heads}; "
      "choose a divisor"
    )
  if "local" in attention_kinds(m) and m.window is None:
    raise UserError("model.attention_pattern has 'local' layers: set model.window, in tokens")


def rotary(m: ml_collections.ConfigDict) -> None:
  """Checks the rotated part of a head, and longrope's number of factors."""
  if m.rope.fraction > 1:
    raise UserError(f"model.rope.fraction={m.rope.fraction} is a fraction of a head: at most 1")
  if m.position == "rotary" and not m.latent.kv_rank and m.head_dim * m.rope.fraction % 2:
    raise UserError(
      f"model.head_dim={m.head_dim} x model.rope.fraction={m.rope.fraction} must be even for "
      "model.position='rotary'"
    )
  if m.position == "rotary":
    scaling(m.rope, m.latent.rope_dim if m.latent.kv_rank else int(m.head_dim * m.rope.fraction))
  if m.rope.scaling == "longrope":
    half = int(m.head_dim * m.rope.fraction) // 2
    for key in ("short_factors", "long_factors"):
      if len(m.rope[key]) != half:
        raise UserError(
          f"model.rope.{key} has {len(m.rope[key])} numbers; longrope needs one for each of the "
          f"{half} frequencies"
        )


def scaling(r: ml_collections.ConfigDict, rotated: int) -> None:
  """Checks the numbers that a scaling of the rotary embedding divides by.

  Args:
    r: The `model.rope` section.
    rotated: Number of entries of a head that are rotated.
  """
  if r.scaling == "llama3" and r.high_freq <= r.low_freq:
    raise UserError(
      f"model.rope.high_freq={r.high_freq} must be above model.rope.low_freq={r.low_freq}"
    )
  if r.scaling == "ntk" and rotated <= 2:
    raise UserError(
      f"model.rope.scaling='ntk' needs more than {rotated} rotated entries of a head; choose a "
      "larger model.head_dim or another scaling"
    )
  if r.scaling == "yarn" and r.theta == 1:
    raise UserError("model.rope.scaling='yarn' needs model.rope.theta other than 1.0")
  if r.scaling == "longrope" and r.attention_factor is None and r.original_len < 2:
    raise UserError(
      f"model.rope.original_len={r.original_len} is too short for longrope's formula; set "
      "model.rope.attention_factor"
    )


def experts(m: ml_collections.ConfigDict) -> None:
  """Checks groups and numbers of experts, if there are layers of experts."""
  if "moe" not in m.mlp_pattern[: m.num_layers]:  # a pattern longer than the model is deep is cut
    return
  x = m.moe
  if x.experts < 1:
    raise UserError("model.mlp_pattern has 'moe' layers: set model.moe.experts")
  if x.experts % x.groups or x.top_groups > x.groups:
    raise UserError(
      f"model.moe.groups={x.groups} must divide model.moe.experts={x.experts} and be at least "
      f"model.moe.top_groups={x.top_groups}"
    )
  if x.router == "sigmoid" and x.groups > 1 and x.experts // x.groups < 2:
    raise UserError(
      f"model.moe.groups={x.groups} leaves one expert per group, but model.moe.router='sigmoid' "
      "ranks groups by their best two experts; use fewer groups"
    )
  choice = x.experts // x.groups * x.top_groups
  if x.per_token > choice:
    raise UserError(
      f"model.moe.per_token={x.per_token} is more than the {choice} experts that a token can be "
      "routed to; lower it, or raise model.moe.experts or model.moe.top_groups"
    )
  if "moe" not in mlp_kinds(m):
    raise UserError(
      f"model.moe.first_dense={x.first_dense} leaves none of the model.num_layers="
      f"{m.num_layers} layers to the experts"
    )


def latent_attention(m: ml_collections.ConfigDict) -> None:
  """Checks the keys that multi-head latent attention fixes, and those that only it allows."""
  if not m.latent.kv_rank:
    if m.latent.v_dim != m.head_dim:
      raise UserError(
        f"model.latent.v_dim={m.latent.v_dim} differs from model.head_dim={m.head_dim}, which "
        "only latent attention allows; set model.latent.kv_rank"
      )
    return
  if m.position != "rotary" or m.num_kv_heads != m.num_heads or m.qk_norm != "none":
    raise UserError(
      f"model.latent.kv_rank={m.latent.kv_rank} needs model.position='rotary', "
      "model.num_kv_heads = model.num_heads and model.qk_norm='none'"
    )
  if not m.latent.rope_dim < m.head_dim or m.latent.rope_dim % 2:
    raise UserError(
      f"model.latent.rope_dim={m.latent.rope_dim} must be even and below "
      f"model.head_dim={m.head_dim}"
    )


def scaled_parametrization(c: ml_collections.ConfigDict) -> None:
  """Checks that the rules of `model.mup` are defined for the model and its training."""
  m, mup = c.model, c.model.mup
  if not (mup.base_width or mup.base_depth):
    return
  key = "base_width" if mup.base_width else "base_depth"
  setting = f"model.mup.{key}={mup[key]}"
  if c.init_from:
    raise UserError(
      f"{setting} is for models that start from random weights, but init_from={c.init_from!r}; "
      f"set model.mup.{key}=0: scales in a copied model section stay as they are"
    )
  if m.lora.rank or m.latent.kv_rank:
    low = f"model.lora.rank={m.lora.rank}" if m.lora.rank else ""
    low = low or f"model.latent.kv_rank={m.latent.kv_rank}"
    raise UserError(
      f"{setting}: muP has no rule for {low}, whose size need not grow with the width; set one of "
      "them to 0"
    )
  if mup.base_depth and m.norm_placement == "post":
    raise UserError(
      f"model.mup.base_depth={mup.base_depth} has no rule for model.norm_placement='post', which "
      "normalizes the residual stream; choose 'pre', or set it to 0"
    )


def qk_clip(c: ml_collections.ConfigDict) -> None:
  """Checks that QK-clip can bound attention logits by the weights of queries and keys."""
  m, clip = c.model, f"optim.qk_clip={c.optim.qk_clip}"
  if not c.optim.qk_clip:
    return
  for has_no_effect, why in (
    (m.qk_norm != "none", f"model.qk_norm={m.qk_norm!r} undoes the scale of queries and keys"),
    (m.attn_softcap, f"model.attn_softcap={m.attn_softcap} bounds the logits already"),
    (m.lora.rank, f"model.lora.rank={m.lora.rank} leaves queries' and keys' weights as they are"),
  ):
    if has_no_effect:
      raise UserError(f"{clip} cannot take effect: {why}; leave one of them out")


def quantization(m: ml_collections.ConfigDict) -> None:
  """Checks the keys that change the precision of matmuls."""
  if m.lora.rank and m.lora.base != "float32" and m.quantize != "none":
    raise UserError(
      f"model.lora.base={m.lora.base!r} multiplies with dequantized weights, model.quantize="
      f"{m.quantize!r} with activations in eight bits: set one of them back to its default"
    )
  if m.quantize_gradients and m.quantize == "none":
    raise UserError("model.quantize_gradients=True needs model.quantize='int8' or 'fp8'")
  if m.quantize != "none" and m.grad_dtype != "compute":
    raise UserError(
      f"model.quantize={m.quantize!r} computes weight gradients in model.dtype: set "
      f"model.grad_dtype='compute', not {m.grad_dtype!r}"
    )


def pooler(m: ml_collections.ConfigDict) -> None:
  """Checks that a pooler has a layer."""
  if m.head == "pooler" and m.head_transform == "none":
    raise UserError("model.head='pooler' needs model.head_transform='tanh' or 'norm'")


def classes(m: ml_collections.ConfigDict) -> None:
  """Checks that a classifier has an output for each class that has a name."""
  if (
    m.head in ("classifier", "token_classifier")
    and m.label_names
    and not 1 < m.num_labels >= len(m.label_names)
  ):
    raise UserError(
      f"model.num_labels={m.num_labels}, but model.label_names has {len(m.label_names)} classes; "
      f"set model.num_labels={max(len(m.label_names), 2)}, or name other classes"
    )


def masking(o: ml_collections.ConfigDict) -> None:
  """Checks the fractions of masked tokens in the `objective` section."""
  if o.mask_replace + o.mask_random > 1:
    raise UserError(
      f"objective.mask_replace={o.mask_replace} and objective.mask_random={o.mask_random} are "
      "fractions of the same tokens; their sum must not exceed 1"
    )


def windows(c: ml_collections.ConfigDict) -> None:
  """Checks that the windows of a passage go on."""
  if c.objective.name != "question_answering":
    return
  d, most = c.data, training.most_overlap(c.data.seq_len)
  if most < 0:
    raise UserError(
      f"data.seq_len={d.seq_len} is too short for a question and a window of its passage; choose "
      "one of 4 or more"
    )
  if d.overlap > most:
    raise UserError(
      f"data.overlap={d.overlap} leaves windows of data.seq_len={d.seq_len} nothing new, as a "
      f"question may have half of a row; choose at most {most}"
    )


def stream(c: ml_collections.ConfigDict) -> None:
  """Checks the keys that a stream of training data excludes."""
  if not c.data.stream:
    return
  if c.data.weights or c.data.weight_changes:
    raise UserError(
      f"data.stream={c.data.stream!r} replaces the training splits that data.weights and "
      "data.weight_changes mix; leave them out"
    )


def stored(c: ml_collections.ConfigDict) -> None:
  """Checks the numbers that are stored of each row."""
  o, rows = c.objective, c.model.vocab_size
  if not o.stored:
    return
  if c.data.stream:
    raise UserError(
      f"objective.stored={o.stored!r} needs rows that come again, but data.stream="
      f"{c.data.stream!r} has none; prepare the files with `jaxgpt data`"
    )
  if o.name == "distillation" and rows and o.top_k >= rows:
    raise UserError(
      f"objective.top_k={o.top_k} must be below the vocabulary, model.vocab_size={rows}; lower it"
    )


def stages(c: ml_collections.ConfigDict) -> None:
  """Checks the stages with another batch size or length of rows."""
  d = c.data
  if not d.stages:
    return
  for key in ("stream", "stored"):
    value = d.stream if key == "stream" else c.objective.stored
    if value:
      name = f"data.{key}" if key == "stream" else f"objective.{key}"
      raise UserError(
        f"data.stages needs prepared rows of one kind each, but {name}={value!r}; leave one out"
      )
  if sum(steps for steps, _, _ in d.stages) >= c.train.steps:
    raise UserError(
      f"data.stages has {sum(steps for steps, _, _ in d.stages)} steps, which leaves none of "
      f"train.steps={c.train.steps} to data.batch_size and data.seq_len; shorten the stages"
    )
  for stage in d.stages:
    _, batch_size, seq_len = stage
    if seq_len > c.model.max_len:
      raise UserError(
        f"data.stages: {stage} has longer rows than the model's context, model.max_len="
        f"{c.model.max_len}; raise it, or shorten the rows"
      )
    if batch_size % c.optim.accumulate:
      raise UserError(
        f"data.stages: optim.accumulate={c.optim.accumulate} does not divide the batch size of "
        f"{stage}"
      )


def lengths(c: ml_collections.ConfigDict) -> None:
  """Checks numbers of tokens, rows and steps that must fit each other."""
  if c.data.seq_len > c.model.max_len:
    raise UserError(
      f"data.seq_len={c.data.seq_len} is longer than the model's context "
      f"model.max_len={c.model.max_len}"
    )
  if c.data.batch_size % c.optim.accumulate:
    raise UserError(
      f"optim.accumulate={c.optim.accumulate} does not divide data.batch_size={c.data.batch_size}"
    )
  stages(c)
  if c.train.spike.factor and c.train.spike.window >= c.train.steps:
    raise UserError(
      f"train.spike.window={c.train.spike.window}: train.steps={c.train.steps} has no step after "
      "as many losses, so no spike would be found; choose a shorter window"
    )
  if c.schedule.warmup_steps > c.train.steps:
    raise UserError(
      f"schedule.warmup_steps={c.schedule.warmup_steps} is more than train.steps={c.train.steps}"
    )
