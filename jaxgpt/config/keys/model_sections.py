"""Config keys of the sections below `model`: positions, experts, latent attention, LoRA, muP."""

from jaxgpt.config.keys import conditions, lora_targets
from jaxgpt.config.keys.conditions import ROUTED_LOSS, above_0, one_of
from jaxgpt.config.schema import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, Interval, Key, Section

ROPE = Section(
  "Rotary position embedding, used where `model.position` is `rotary`.",
  dict(
    theta=Key(
      10_000.0,
      "Base of the rotary frequencies.",
      interval=ABOVE_0,
      needs=conditions.ROTATED_BY_THETA,
    ),
    local_theta=Key(
      None,
      "Base of the frequencies in local layers, to which no scaling then applies.",
      value_type=float,
      unset="as in global layers",
      interval=ABOVE_0,
      needs=conditions.LOCAL_LAYERS,
    ),
    fraction=Key(
      1.0,
      "Fraction of a head that is rotated. At most 1.",
      interval=ABOVE_0,
      needs=one_of("model.latent.kv_rank", 0),
    ),
    scaling=Key(
      "none",
      "How the frequencies are changed for a longer context.",
      choices={
        "none": "not at all",
        "linear": "positions divided by `factor`",
        "ntk": "a larger base",
        "llama3": "low frequencies divided by `factor` (Llama 3.1)",
        "yarn": "arXiv:2309.00071",
        "longrope": "one divisor per frequency (arXiv:2402.13753)",
      },
      needs=conditions.ROTATED_BY_THETA,
      values_need={
        "linear": conditions.STRETCHED,
        "llama3": conditions.STRETCHED,
        "yarn": conditions.YARN,
        "ntk": conditions.BEYOND_THE_ORIGINAL,
      },
    ),
    factor=Key(
      1.0,
      "Length of the new context divided by the original one.",
      interval=ABOVE_0,
      needs=conditions.ROPE_FACTOR,
    ),
    original_len=Key(
      None,
      "Length of the original context, in tokens.",
      value_type=int,
      derive=lambda c: c.model.max_len,
      unset="`model.max_len`",
      interval=AT_LEAST_1,
      needs=one_of("model.rope.scaling", "ntk", "llama3", "yarn", "longrope"),
    ),
    attention_factor=Key(
      None,
      "yarn, longrope: factor on sines and cosines.",
      value_type=float,
      unset="the paper's formula",
      interval=ABOVE_0,
      needs=one_of("model.rope.scaling", "yarn", "longrope"),
    ),
    low_freq=Key(
      1.0,
      "llama3: frequencies with fewer turns in the original context are divided by `factor`.",
      needs=one_of("model.rope.scaling", "llama3"),
    ),
    high_freq=Key(
      4.0,
      "llama3: frequencies with more turns in the original context are kept.",
      needs=one_of("model.rope.scaling", "llama3"),
    ),
    beta_fast=Key(
      32.0,
      "yarn: frequencies with more turns in the original context are kept.",
      interval=ABOVE_0,
      needs=one_of("model.rope.scaling", "yarn"),
    ),
    beta_slow=Key(
      1.0,
      "yarn: frequencies with fewer turns in the original context are divided by `factor`.",
      interval=ABOVE_0,
      needs=one_of("model.rope.scaling", "yarn"),
    ),
    short_factors=Key(
      (),
      "longrope: divisors of the frequencies within the original context.",
      needs=one_of("model.rope.scaling", "longrope"),
    ),
    long_factors=Key(
      (),
      "longrope: divisors of the frequencies beyond the original context.",
      needs=one_of("model.rope.scaling", "longrope"),
    ),
  ),
  needs=conditions.ROTATED_LAYERS,
)

MOE = Section(
  "Mixture of experts, used in layers that `model.mlp_pattern` calls `moe`.",
  dict(
    experts=Key(0, "Experts per layer.", interval=AT_LEAST_0),
    per_token=Key(2, "Experts that each token is routed to.", interval=AT_LEAST_1),
    width=Key(
      None,
      "Hidden size of an expert.",
      value_type=int,
      derive=lambda c: c.model.mlp_width,
      unset="`model.mlp_width`",
      interval=AT_LEAST_1,
    ),
    shared=Key(0, "Additional experts that every token is routed to.", interval=AT_LEAST_0),
    first_dense=Key(
      0, "Leading layers that are dense, whatever the pattern says.", interval=AT_LEAST_0
    ),
    router=Key(
      "softmax",
      "Scores of the experts.",
      choices={
        "softmax": "over all experts",
        "sigmoid": "of each expert, with a bias in the selection (DeepSeek-V3)",
      },
    ),
    normalize=Key(True, "Make a token's weights over its experts sum to 1."),
    scale=Key(1.0, "Factor on these weights.", interval=ABOVE_0),
    groups=Key(
      1,
      "Groups of experts. A token is routed to experts of its best `top_groups` groups.",
      interval=AT_LEAST_1,
    ),
    top_groups=Key(1, "Groups that a token's experts come from.", interval=AT_LEAST_1),
    capacity=Key(
      0.0,
      "Capacity of an expert per row, as a multiple of its share under an even load. Training and "
      "evaluation drop tokens beyond it. 0: no limit.",
      interval=AT_LEAST_0,
      architecture=False,
      if_changed="tokens that experts drop in training",
    ),
    buffer=Key(
      0.0,
      "Tokens that a device has room for when devices exchange tokens without a capacity, as a "
      "multiple of its share under an even load. Training and evaluation drop tokens beyond it, "
      "and count them in `dropped_share`. 0: room for all tokens that can come.",
      interval=AT_LEAST_0,
      needs=conditions.EXCHANGED_TOKENS,
      architecture=False,
      if_changed="tokens that experts drop in training",
    ),
    balance_loss=Key(
      0.01,
      "Weight of the loss that spreads tokens evenly over the experts.",
      interval=AT_LEAST_0,
      needs=ROUTED_LOSS,
      architecture=False,
      if_changed="the loss",
    ),
    z_loss=Key(
      0.001,
      "Weight of the loss that keeps the router's logits small.",
      interval=AT_LEAST_0,
      needs=ROUTED_LOSS,
      architecture=False,
      if_changed="the loss",
    ),
  ),
  needs=conditions.EXPERTS,
)

LATENT = Section(
  "Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), used where `kv_rank` is above 0.",
  dict(
    kv_rank=Key(
      0, "Size of the latent that holds a token's keys and values. 0: off.", interval=AT_LEAST_0
    ),
    q_rank=Key(
      0, "Size of the latent that holds a token's queries. 0: no latent.", interval=AT_LEAST_0
    ),
    rope_dim=Key(
      64,
      "Number of a head's last entries that are rotated. All heads share them in the keys.",
      interval=AT_LEAST_1,
    ),
    v_dim=Key(
      None,
      "Size of a head's values.",
      value_type=int,
      derive=lambda c: c.model.head_dim,
      unset="`model.head_dim`",
      interval=AT_LEAST_1,
    ),
    norm_eps=Key(
      None,
      "Added to the variance in the norms of the latents.",
      value_type=float,
      derive=lambda c: c.model.norm_eps,
      unset="`model.norm_eps`",
      interval=ABOVE_0,
    ),
  ),
  needs=above_0("model.latent.kv_rank"),
)

LORA = Section(
  "Low-rank adapters (LoRA, arXiv:2106.09685), trained in place of the weights.",
  dict(
    rank=Key(0, "Rank of the adapters. 0: no adapters.", interval=AT_LEAST_0, architecture=False),
    alpha=Key(
      16.0,
      "Factor on the adapters' output, divided by the rank.",
      interval=ABOVE_0,
      needs=above_0("model.lora.rank"),
      architecture=False,
    ),
    dropout=Key(
      0.0,
      "Dropout rate on the adapters' input in training.",
      interval=BELOW_1,
      needs=above_0("model.lora.rank"),
      architecture=False,
      if_changed="dropout",
    ),
    targets=Key(
      ("q", "v"),
      "Weights that get an adapter, by name or pattern: q, k, v, o, gate, up, down, or `*` for "
      "all. Those of routed experts get none. PEFT's names, such as q_proj and all-linear, mean "
      "the same weights.",
      check=lora_targets.check,
      needs=above_0("model.lora.rank"),
      architecture=False,
    ),
    base=Key(
      "float32",
      "Form of the frozen weights of the layers (QLoRA, arXiv:2305.14314). Codes are "
      "multiplied by their scales when a layer is computed. Routed experts stay in float32.",
      choices={
        "float32": "numbers",
        "int8": "codes of a run that `jaxgpt quantize --weights=int8` made",
        "int4": "codes of 4 bits, two in a byte",
      },
      needs=above_0("model.lora.rank"),
      architecture=False,
    ),
    base_group=Key(
      0,
      "Inputs that share a scale, as in `jaxgpt quantize --group`. 0: all inputs of an output.",
      interval=AT_LEAST_0,
      needs=one_of("model.lora.base", "int8", "int4"),
      architecture=False,
    ),
  ),
)

MUP = Section(
  "Settings tuned on a narrow or shallow model, scaled to this one: muP (arXiv:2203.03466) for the "
  "width, CompleteP (arXiv:2505.01618) for the depth.",
  dict(
    base_width=Key(
      0,
      "Width of the model whose settings were tuned. Initial weights, learning rates, epsilon, "
      "`attn_scale` and `output_scale` follow from `width` relative to it. 0: off.",
      interval=AT_LEAST_0,
      architecture=False,
    ),
    base_head_dim=Key(
      0,
      "Head size of that model: `attn_scale` becomes sqrt(`base_head_dim`) / `head_dim`, which is "
      "the usual scale in that model. 0: `attn_scale` is 1 / `head_dim`.",
      interval=AT_LEAST_0,
      needs=above_0("model.mup.base_width"),
      architecture=False,
    ),
    base_depth=Key(
      0,
      "Layers of the model whose settings were tuned. `residual_scale` and the rates of the layers "
      "follow from `num_layers` relative to it. 0: off.",
      interval=AT_LEAST_0,
      architecture=False,
    ),
    depth_power=Key(
      1.0,
      "`residual_scale` is (`num_layers` / `base_depth`) to minus this power. 1: CompleteP. 0.5: "
      "arXiv:2310.02244.",
      interval=Interval(0.5, 1),
      needs=above_0("model.mup.base_depth"),
      architecture=False,
    ),
  ),
)
