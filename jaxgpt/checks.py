"""What values the keys of a config may have, alone and together."""

import difflib
import math

from jaxgpt.errors import UserError

CHOICES = {
    "objective.name": ("causal_lm",),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.position": ("learned", "rotary", "none"),
    "model.activation": ("gelu", "gelu_exact", "silu", "relu", "relu2"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots", "save_qkv", "save_attention"),
    "model.attention": ("auto", "reference", "batched"),
    "data.packing": ("best_fit", "concat", "one_per_row"),
    "optim.name": ("adamw", "lion", "adafactor", "muon"),
    "schedule.name": ("cosine", "linear", "wsd", "inverse_sqrt", "constant"),
}


def nearest(name, names):
  """A hint 'did you mean …? ' with the closest of `names`, or ''."""
  close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
  return f"did you mean {close[0]!r}? " if close else ""


def values(flat):
  """Raises a UserError where a value is out of its range, or is no choice of its key.

  Args:
    flat: the config as `config.flatten` gives it; its placeholders may be empty.
  """
  positive = ("model.num_layers", "model.width", "model.num_heads", "model.num_kv_heads",
              "model.head_dim", "model.mlp_width", "model.max_len", "model.vocab_size",
              "model.scan_unroll", "data.seq_len", "data.batch_size", "data.threads",
              "data.prefetch", "optim.accumulate", "train.steps", "eval.batch_size", "log.every",
              "checkpoint.every", "checkpoint.keep")
  for key in positive:
    if flat[key] is not None and flat[key] < 1:
      raise UserError(f"{key}={flat[key]} must be at least 1")
  at_least_0 = ("schedule.warmup_steps", "eval.every", "eval.batches", "checkpoint.keep_every",
                "optim.clip_norm", "optim.weight_decay", "optim.lr", "optim.adam_lr",
                "objective.z_loss")
  for key in at_least_0:
    if flat[key] is not None and flat[key] < 0:
      raise UserError(f"{key}={flat[key]} must be at least 0")
  for key, value in flat.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"{key}={value} must be a finite number")
  for key in ("model.norm_eps", "model.rope_theta", "model.init_std", "model.logit_softcap",
              "optim.eps"):
    if flat[key] is not None and flat[key] <= 0:
      raise UserError(f"{key}={flat[key]} must be above 0")
  for key in ("schedule.decay_fraction", "schedule.final_ratio", "objective.mask_rate",
              "objective.mask_replace", "objective.mask_random"):
    if not 0 <= flat[key] <= 1:
      raise UserError(f"{key}={flat[key]} must lie in [0, 1]")
  if not 0 <= flat["seed"] < 2**31:
    raise UserError(f"seed={flat['seed']} must lie in [0, 2^31)")
  for key in ("model.dropout", "optim.ema", "optim.b1", "optim.b2", "optim.muon_momentum"):
    if not 0 <= flat[key] < 1:
      raise UserError(f"{key}={flat[key]} must lie in [0, 1)")
  _weights(flat)
  for key, names in CHOICES.items():
    if flat[key] not in names:
      raise UserError(f"{key}={flat[key]!r}: {nearest(str(flat[key]), names)}"
                      f"choose one of {', '.join(names)}")


def _weights(flat):
  """Raises a UserError where the weights of a mixture have not the form that is asked for."""
  is_number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
  are_weights = lambda x: isinstance(x, tuple) and all(is_number(w) and w >= 0 for w in x)
  given = flat["data.weights"]
  if not are_weights(given):
    raise UserError(f"data.weights={given!r} must be numbers of at least 0, one a folder of "
                    "data.path, such as (0.7, 0.3)")
  last = 0
  for change in flat["data.weight_changes"]:
    if not (isinstance(change, tuple) and len(change) == 2 and isinstance(change[0], int)
            and change[0] > last and are_weights(change[1])):
      raise UserError(f"data.weight_changes: {change!r} must be (step, weights) with a step above "
                      f"{last}; write ((1000, (0.5, 0.5)),) for new weights from step 1000 on")
    last = change[0]


def combinations(c):
  """Raises a UserError where values of a resolved config exclude each other."""
  m = c.model
  if m.num_heads % m.num_kv_heads:
    raise UserError(f"model.num_kv_heads={m.num_kv_heads} does not divide "
                    f"model.num_heads={m.num_heads}")
  if m.position == "rotary" and m.head_dim % 2:
    raise UserError(f"model.head_dim={m.head_dim} must be even for model.position='rotary'")
  if c.objective.name == "causal_lm" and not m.causal:
    raise UserError("objective.name='causal_lm' needs model.causal=True: otherwise each token "
                    "reads the one it is to predict")
  o = c.objective
  if o.mask_replace + o.mask_random > 1:
    raise UserError(f"objective.mask_replace={o.mask_replace} and objective.mask_random="
                    f"{o.mask_random} are shares of the same tokens; their sum must not exceed 1")
  if c.data.seq_len > m.max_len:
    raise UserError(f"data.seq_len={c.data.seq_len} is longer than the model's context "
                    f"model.max_len={m.max_len}")
  if c.data.batch_size % c.optim.accumulate:
    raise UserError(f"optim.accumulate={c.optim.accumulate} does not divide "
                    f"data.batch_size={c.data.batch_size}")
  if c.schedule.warmup_steps > c.train.steps:
    raise UserError(f"schedule.warmup_steps={c.schedule.warmup_steps} is more than "
                    f"train.steps={c.train.steps}")
