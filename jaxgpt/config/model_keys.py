"""Config keys of the `model` section: the architecture, its numerics and its memory use."""

from jaxgpt.config import remat
from jaxgpt.config.schema import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, Key, Section
from jaxgpt.errors import UserError


def _head_dim(c):
  m = c.model
  if m.width % m.num_heads:
    raise UserError(
      f"model.num_heads={m.num_heads} does not divide model.width={m.width}; choose a divisor, or "
      "set model.head_dim"
    )
  return m.width // m.num_heads


ROPE = Section(
  "Rotary position embedding, used where `model.position` is `rotary`.",
  dict(
    theta=Key(10_000.0, "Base of the rotary frequencies.", interval=ABOVE_0),
    local_theta=Key(
      None,
      "Base of the frequencies in local layers, to which no scaling then applies.",
      value_type=float,
      unset="as in global layers",
      interval=ABOVE_0,
    ),
    fraction=Key(1.0, "Fraction of a head that is rotated. At most 1.", interval=ABOVE_0),
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
    ),
    factor=Key(1.0, "Length of the new context divided by the original one.", interval=ABOVE_0),
    original_len=Key(
      None,
      "Length of the original context, in tokens.",
      value_type=int,
      derive=lambda c: c.model.max_len,
      unset="`model.max_len`",
      interval=AT_LEAST_1,
    ),
    attention_factor=Key(
      None,
      "yarn, longrope: factor on sines and cosines.",
      value_type=float,
      unset="the paper's formula",
      interval=ABOVE_0,
    ),
    low_freq=Key(
      1.0,
      "llama3: frequencies with fewer turns in the original context are divided by `factor`.",
    ),
    high_freq=Key(4.0, "llama3: frequencies with more turns in the original context are kept."),
    beta_fast=Key(32.0, "yarn: frequencies with more turns in the original context are kept."),
    beta_slow=Key(
      1.0, "yarn: frequencies with fewer turns in the original context are divided by `factor`."
    ),
    short_factors=Key((), "longrope: divisors of the frequencies within the original context."),
    long_factors=Key((), "longrope: divisors of the frequencies beyond the original context."),
  ),
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
      "Capacity of an expert per row, as a multiple of its share under an even load. Tokens "
      "beyond it are dropped. 0: no limit.",
      interval=AT_LEAST_0,
    ),
    balance_loss=Key(
      0.01, "Weight of the loss that spreads tokens evenly over the experts.", interval=AT_LEAST_0
    ),
    z_loss=Key(
      0.001, "Weight of the loss that keeps the router's logits small.", interval=AT_LEAST_0
    ),
  ),
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
  ),
)

LORA = Section(
  "Low-rank adapters (LoRA, arXiv:2106.09685), trained in place of the weights.",
  dict(
    rank=Key(0, "Rank of the adapters. 0: no adapters.", interval=AT_LEAST_0),
    alpha=Key(16.0, "Factor on the adapters' output, divided by the rank.", interval=ABOVE_0),
    dropout=Key(0.0, "Dropout rate on the adapters' input in training.", interval=BELOW_1),
    targets=Key(
      ("q", "v"),
      "Weights that get an adapter, by name or pattern: q, k, v, o, gate, up, down.",
    ),
  ),
)

MODEL = Section(
  "The architecture, its numerics, and how its activations use memory. A preset fills it in.",
  dict(
    preset=Key("", "Name of the preset that filled this section. For information only."),
    vocab_size=Key(
      None,
      "Rows of the embedding table.",
      value_type=int,
      unset="the tokenizer's size",
      interval=AT_LEAST_1,
    ),
    max_len=Key(
      None,
      "Longest context, in tokens.",
      value_type=int,
      derive=lambda c: c.data.seq_len,
      unset="`data.seq_len`",
      interval=AT_LEAST_1,
    ),
    num_layers=Key(6, "Transformer blocks.", interval=AT_LEAST_1),
    width=Key(384, "Size of the residual stream (D).", interval=AT_LEAST_1),
    num_heads=Key(6, "Query heads (N).", interval=AT_LEAST_1),
    num_kv_heads=Key(
      None,
      "Key/value heads (K). Must divide `num_heads`.",
      value_type=int,
      derive=lambda c: c.model.num_heads,
      unset="`model.num_heads`",
      interval=AT_LEAST_1,
    ),
    head_dim=Key(
      None,
      "Size of a head (H).",
      value_type=int,
      derive=_head_dim,
      unset="`model.width` / `model.num_heads`",
      interval=AT_LEAST_1,
    ),
    mlp_width=Key(
      None,
      "Hidden size of the MLP (F).",
      value_type=int,
      derive=lambda c: 4 * c.model.width,
      unset="4 × `model.width`",
      interval=AT_LEAST_1,
    ),
    norm=Key(
      "layernorm",
      "Normalization.",
      choices={"layernorm": "mean and variance", "rmsnorm": "root mean square only"},
    ),
    norm_eps=Key(1e-5, "Added to the variance.", interval=ABOVE_0),
    norm_placement=Key(
      "pre",
      "What the norms of a residual branch apply to.",
      choices={
        "pre": "the branch's input",
        "branch": "the branch's output (OLMo 2)",
        "both": "its input and its output (Gemma 2)",
        "post": "the sum of residual stream and branch (BERT)",
      },
    ),
    first_norm=Key(
      True,
      "Normalize the input of the first layer's attention. False: it reads the embeddings as they "
      "are (ModernBERT).",
    ),
    embed_norm=Key(False, "Normalize the embeddings (BERT)."),
    embed_scale=Key(1.0, "Factor on the embeddings (Gemma: sqrt(width)).", interval=ABOVE_0),
    position=Key(
      "learned",
      "How positions enter the model.",
      choices={
        "learned": "an embedding per position",
        "rotary": "rotated queries and keys",
        "none": "only through the causal mask",
      },
    ),
    token_types=Key(
      0,
      "Rows of an embedding that marks the first and second text of a pair (BERT: 2). 0: none.",
      interval=AT_LEAST_0,
    ),
    attention_pattern=Key(
      ("global",),
      "Attention of the layers, repeated in turn.",
      items={
        "global": "reads the whole context",
        "local": "reads within `window`",
        "nope": "global, without rotary embedding",
      },
    ),
    window=Key(
      None,
      "Local attention reads tokens fewer than this many positions away.",
      value_type=int,
      unset="no local layers",
      interval=AT_LEAST_1,
    ),
    attn_scale=Key(
      None,
      "Factor on the attention logits.",
      value_type=float,
      derive=lambda c: c.model.head_dim**-0.5,
      unset="1 / sqrt(`model.head_dim`)",
      interval=ABOVE_0,
    ),
    attn_softcap=Key(
      None,
      "Attention logits x become cap * tanh(x / cap).",
      value_type=float,
      unset="no cap",
      interval=ABOVE_0,
    ),
    mlp_pattern=Key(
      ("dense",),
      "MLPs of the layers, repeated in turn.",
      items={"dense": "one MLP", "moe": "a mixture of experts"},
    ),
    activation=Key(
      "gelu",
      "Activation of the MLP.",
      choices={
        "gelu": "tanh approximation",
        "gelu_exact": "with the error function",
        "silu": "x * sigmoid(x)",
        "relu": "max(x, 0)",
        "relu2": "max(x, 0) squared",
      },
    ),
    gated=Key(
      False, "Multiply the activation by a second projection (SwiGLU, if the activation is silu)."
    ),
    bias=Key(True, "Biases in projections and in layernorm."),
    qkv_bias=Key(
      None,
      "Biases of queries, keys and values.",
      value_type=bool,
      derive=lambda c: c.model.bias,
      unset="`model.bias`",
    ),
    qk_norm=Key(
      "none",
      "RMSNorm of queries and keys, before the rotary embedding.",
      choices={"none": "no norm", "head": "each head by itself", "all": "all heads together"},
    ),
    logit_softcap=Key(
      None,
      "Output logits x become cap * tanh(x / cap).",
      value_type=float,
      unset="no cap",
      interval=ABOVE_0,
    ),
    tie_embeddings=Key(True, "Use the transposed embedding as the output head."),
    head=Key(
      "lm",
      "Output of the model.",
      choices={
        "lm": "logits over the vocabulary",
        "classifier": "logits over `num_labels` classes",
        "pooler": "one vector per row",
        "none": "hidden states",
      },
    ),
    head_bias=Key(False, "A bias on the logits."),
    head_transform=Key(
      "none",
      "Layer before the head.",
      choices={
        "none": "no layer",
        "tanh": "BERT's pooler",
        "norm": "activation and norm, as in BERT's masked-LM head",
      },
    ),
    pooling=Key(
      "first",
      "Input of a classifier or pooler.",
      choices={"first": "the first token", "mean": "the mean over the tokens"},
    ),
    num_labels=Key(2, "Classes of a classifier. 1: regression.", interval=AT_LEAST_1),
    causal=Key(True, "A token attends only to itself and to earlier tokens."),
    dropout=Key(
      0.0,
      "Dropout rate on the embeddings and on each residual branch in training.",
      interval=BELOW_1,
    ),
    init_std=Key(
      0.02,
      "Standard deviation of initial weights. Weights that write into the residual stream get "
      "1/sqrt(2 * num_layers) of it.",
      interval=ABOVE_0,
    ),
    dtype=Key(
      "float32",
      "dtype of activations and matmuls. Parameters, norms, softmax and loss stay in float32.",
      choices={"float32": "", "bfloat16": ""},
    ),
    grad_dtype=Key(
      "compute",
      "dtype of weight gradients, as matmul output and in the cross-device reduction. Experts "
      "always use `compute`.",
      choices={"compute": "as `dtype`", "float32": ""},
    ),
    quantize=Key(
      "none",
      "Eight-bit matmuls with the layers' weights, except those of experts. Needs the extra "
      "[quant].",
      choices={"none": "off", "int8": "", "fp8": ""},
    ),
    quantize_gradients=Key(
      False, "With `quantize`: eight-bit matmuls in the backward pass as well."
    ),
    attention=Key(
      "auto",
      "Implementation of attention.",
      choices={
        "auto": "the best for the backend",
        "reference": "by definition",
        "batched": "for CPUs",
        "splash": "TPU kernel",
        "cudnn": "GPU kernel, bfloat16",
      },
      free_on_resume=True,
    ),
    scan_unroll=Key(
      1,
      "Layers per iteration of the scan over layers. `num_layers` or more unrolls it completely.",
      interval=AT_LEAST_1,
      free_on_resume=True,
    ),
    remat=Key(
      "none",
      "Rematerialization: which activations are saved for the backward pass. The rest are "
      "recomputed. One of "
      + ", ".join(f"`{name}` ({words})" for name, words in remat.POLICIES.items())
      + f", or `save:` and a list from {', '.join(remat.ACTIVATIONS)}, such as `save:q,k,v`. "
      "`offload:` and a list moves these to host memory. `save:gate,up+offload:q,k,v` does both.",
      check=remat.check,
      free_on_resume=True,
    ),
    materialize=Key(
      "values",
      "On TPUs, which matmul inputs are written to memory once. Others are recomputed inside each "
      "matmul that reads them.",
      choices={
        "none": "no inputs",
        "values": "outputs of norms, and the MLP's hidden layer",
        "gradients": "these and their gradients",
      },
      free_on_resume=True,
    ),
    rope=ROPE,
    moe=MOE,
    latent=LATENT,
    lora=LORA,
  ),
)
