"""Config keys of the `model` section: the architecture, its numerics and its memory use."""

from ml_collections import ConfigDict

from jaxgpt.config import checks, remat
from jaxgpt.config.keys import conditions
from jaxgpt.config.keys.conditions import one_of, other_than
from jaxgpt.config.keys.model_sections import LATENT, LORA, MOE, MUP, ROPE
from jaxgpt.config.schema import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, Key, Section
from jaxgpt.errors import UserError


def _head_dim(c: ConfigDict) -> int:
  m = c.model
  if m.width % m.num_heads:
    raise UserError(
      f"model.num_heads={m.num_heads} does not divide model.width={m.width}; choose a divisor, or "
      "set model.head_dim"
    )
  return m.width // m.num_heads


def _attn_scale(c: ConfigDict) -> float:
  m = c.model
  if not m.mup.base_width:
    return m.head_dim**-0.5
  return (m.mup.base_head_dim or 1) ** 0.5 / m.head_dim


def _output_scale(c: ConfigDict) -> float:
  m = c.model
  return m.mup.base_width / m.width if m.mup.base_width else 1.0


def _residual_scale(c: ConfigDict) -> float:
  m = c.model
  deeper = m.num_layers / m.mup.base_depth if m.mup.base_depth else 1.0
  return deeper**-m.mup.depth_power


MODEL = Section(
  "The architecture, its numerics, and how its activations use memory. A preset fills it in.",
  dict(
    preset=Key(
      "", "Name of the preset that filled this section. For information only.", architecture=False
    ),
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
      needs=conditions.MLP_WIDTH,
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
      needs=one_of("model.norm_placement", "pre", "both"),
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
      values_need={"nope": one_of("model.position", "rotary")},
    ),
    window=Key(
      None,
      "Local attention reads tokens fewer than this many positions away.",
      value_type=int,
      unset="no local layers",
      interval=AT_LEAST_1,
      needs=conditions.LOCAL_LAYERS,
    ),
    attn_scale=Key(
      None,
      "Factor on the attention logits.",
      value_type=float,
      derive=_attn_scale,
      unset="1 / sqrt(`model.head_dim`), or that of `model.mup`",
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
      items={
        "dense": "one MLP",
        "moe": "a mixture of experts",
        "none": "no MLP: attention only, to study it (no Hugging Face family has it)",
      },
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
      needs=conditions.ACTIVATION,
    ),
    gated=Key(
      False,
      "Multiply the activation by a second projection (SwiGLU, if the activation is silu).",
      needs=conditions.HAS_MLP,
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
    residual_scale=Key(
      None,
      "Factor on the output of each residual branch.",
      value_type=float,
      derive=_residual_scale,
      unset="1, or that of `model.mup`",
      interval=ABOVE_0,
    ),
    output_scale=Key(
      None,
      "Factor on the input of the head, and so on the logits without their bias.",
      value_type=float,
      derive=_output_scale,
      unset="1, or that of `model.mup`",
      interval=ABOVE_0,
      needs=conditions.HAS_LOGITS,
    ),
    logit_softcap=Key(
      None,
      "Output logits x become cap * tanh(x / cap).",
      value_type=float,
      unset="no cap",
      interval=ABOVE_0,
      needs=conditions.HAS_LOGITS,
    ),
    tie_embeddings=Key(
      True, "Use the transposed embedding as the output head.", needs=one_of("model.head", "lm")
    ),
    head=Key(
      "lm",
      "Output of the model.",
      choices={
        "lm": "logits over the vocabulary",
        "classifier": "logits over `num_labels` classes",
        "token_classifier": "such logits for each token",
        "pooler": "one vector per row",
        "none": "hidden states",
      },
    ),
    head_bias=Key(False, "A bias on the logits.", needs=conditions.HAS_LOGITS),
    head_transform=Key(
      "none",
      "Layer before the head.",
      choices={
        "none": "no layer",
        "tanh": "BERT's pooler",
        "norm": "activation and norm, as in BERT's masked-LM head",
      },
      needs=other_than("model.head", "none"),
    ),
    pooling=Key(
      "first",
      "Input of a classifier or pooler, or the vector that stands for a text.",
      choices={
        "first": "the first token",
        "mean": "the mean over the tokens",
        "last": "the last token",
      },
      needs=conditions.POOLED,
      values_need={"first": conditions.SEES_ITS_TEXT},
    ),
    num_labels=Key(
      2,
      "Classes of a classifier. 1: regression.",
      interval=AT_LEAST_1,
      needs=conditions.HAS_CLASSES,
    ),
    label_names=Key(
      (),
      "Names of a classifier's classes in the order of its outputs. They number the classes of the "
      "data. (): the names in the weights of `init_from`, or else in the data.",
      check=checks.label_names,
      architecture=False,
      needs=conditions.HAS_CLASSES,
    ),
    causal=Key(True, "A token attends only to itself and to earlier tokens."),
    dropout=Key(
      0.0,
      "Dropout rate on the embeddings and on each residual branch in training.",
      interval=BELOW_1,
      architecture=False,
      if_changed="dropout",
    ),
    init_std=Key(
      0.02,
      "Standard deviation of initial weights. Weights that write into the residual stream get "
      "1/sqrt(2 * num_layers) of it.",
      interval=ABOVE_0,
      architecture=False,
    ),
    dtype=Key(
      "float32",
      "dtype of activations and matmuls. Parameters, norms, softmax and loss stay in float32.",
      choices={"float32": "", "bfloat16": ""},
      architecture=False,
      stored=True,
      if_changed="rounding",
    ),
    grad_dtype=Key(
      "compute",
      "dtype of weight gradients, as matmul output and in the cross-device reduction. Experts "
      "always use `compute`.",
      choices={"compute": "as `dtype`", "float32": ""},
      needs=one_of("model.dtype", "bfloat16"),
      architecture=False,
      if_changed="rounding of gradients",
    ),
    quantize=Key(
      "none",
      "Eight-bit matmuls with the layers' weights, except those of experts. Needs the extra "
      "[quant].",
      choices={"none": "off", "int8": "", "fp8": ""},
      architecture=False,
      stored=True,
      if_changed="rounding of matmuls",
    ),
    quantize_gradients=Key(
      False,
      "With `quantize`: eight-bit matmuls in the backward pass as well.",
      architecture=False,
      if_changed="rounding of gradients",
    ),
    attention=Key(
      "auto",
      "Implementation of attention.",
      choices={
        "auto": "the best for the backend",
        "reference": "by definition",
        "batched": "for CPUs",
        "splash": "TPU kernel",
        "cudnn": "GPU kernel, bfloat16, no `attn_softcap`",
      },
      free_on_resume=True,
      architecture=False,
    ),
    scan_unroll=Key(
      1,
      "Layers per iteration of the scan over layers. `num_layers` or more unrolls it completely.",
      interval=AT_LEAST_1,
      free_on_resume=True,
      architecture=False,
    ),
    remat=Key(
      "none",
      "Rematerialization: which activations are saved for the backward pass. The rest are "
      "recomputed. One of "
      + ", ".join(f"`{name}` ({words})" for name, words in remat.POLICIES.items())
      + f", or `save:` and a list from {', '.join(remat.ACTIVATIONS)}, such as `save:q,k,v`. "
      "`offload:` and a list moves these to host memory, and `input`, that of each layer, which is "
      "saved otherwise. `save:gate,up+offload:q,k,v` does both.",
      check=remat.check,
      free_on_resume=True,
      architecture=False,
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
      architecture=False,
    ),
    rope=ROPE,
    moe=MOE,
    latent=LATENT,
    lora=LORA,
    mup=MUP,
  ),
  fixed="the weights in the checkpoint belong to the old model",
)
