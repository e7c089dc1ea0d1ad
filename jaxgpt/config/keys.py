"""Every key of a config, once, with a comment that says what it does and in what unit.

`docs/config.md` is generated from this file's text.
"""

import ml_collections
from ml_collections import config_dict

MESH_AXES = ("data", "fsdp", "seq", "tensor", "expert", "stage")

# Keys that may differ between a run and its continuation: they don't change what is computed.
FREE_ON_RESUME = (
  "mesh",
  "log",
  "checkpoint",
  "eval",
  "data.prefetch",
  "data.threads",
  "data.path",
  "model.remat",
  "model.scan_unroll",
  "model.materialize",
  "model.attention",
  "objective.loss_chunk",
)


def base():
  """Every key there is. A placeholder (`None`, but typed) is derived from others by `resolve`."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # seed of the initial weights, of dropout and of the data order
  c.init_from = (
    ""  # run folder or Hugging Face folder whose weights step 0 starts from; empty: random
  )

  _model(c)

  c.data = d = ml_collections.ConfigDict()
  d.path = ""  # folder written by `jaxgpt data`; several, separated by commas, are mixed
  d.weights = ()  # share of the rows from each folder; (): in proportion to its rows
  d.weight_changes = ()  # a curriculum, ((step, weights), …): the weights from those steps on
  d.stream = ""  # files to read and tokenize while training, in place of path's training split; addresses as `jaxgpt data` takes them, separated by commas
  d.stream_field = "text"  # stream: the column that holds the text, in files that have columns
  d.stream_window = 512  # stream: rows that are packed and shuffled together, a host
  d.seq_len = 256  # tokens a row (T)
  d.batch_size = 8  # rows a step, over all hosts and accumulation steps (global B)
  d.packing = "best_fit"  # best_fit (whole documents together) | concat (one stream) | one_per_row
  d.shuffle = True  # permute the rows anew each epoch, seeded by `seed`
  d.threads = 4  # reader threads a host
  d.prefetch = 4  # batches kept ready a host

  c.objective = o = ml_collections.ConfigDict()
  o.name = "causal_lm"  # causal_lm | masked_lm | classification | preference (DPO, of adapters)
  o.beta = (
    0.1  # preference: how far the model may move from the one without adapters; less is further
  )
  o.mask_rate = 0.15  # masked_lm: share of the tokens that are to be guessed
  o.mask_replace = 0.8  # masked_lm: share of these that the mask stands for
  o.mask_random = 0.1  # masked_lm: share of these that become any token; the others stay
  o.mask_whole_words = False  # masked_lm: choose words, with all of their tokens
  o.loss_chunk = (
    0  # causal_lm, masked_lm: tokens of a device whose logits exist at once, such as 2048; 0: all
  )
  o.z_loss = 0.0  # weight of log(Z)^2, which keeps the logits' normaliser near 1 (PaLM: 1e-4)

  c.optim = p = ml_collections.ConfigDict()
  p.name = "adamw"  # adamw | lion | adafactor | muon (matrices of the layers; adamw for the rest)
  p.lr = 1e-3  # peak learning rate
  p.adam_lr = config_dict.placeholder(float)  # muon: peak rate of what adamw updates; default: lr
  p.b1 = 0.9  # decay of the first moment: adamw, lion, and what adamw updates beside muon
  p.b2 = 0.95  # decay of the second moment (of lion: of its momentum); adafactor has its own
  p.eps = 1e-8  # added to the root of the second moment: adamw, also beside muon
  p.first_dtype = (
    "float32"  # float32 | bfloat16: what adamw, lion and muon keep the first moment in
  )
  p.second_dtype = "float32"  # float32 | bfloat16: what adamw keeps the second moment in; bfloat16 asks for b2 of at most 0.98
  p.muon_momentum = 0.95  # muon: decay of the momentum that is orthogonalised
  p.weight_decay = 0.1  # decoupled, times the learning rate; on matrices, not on norms and biases
  p.clip_norm = 1.0  # gradients are scaled down to this global norm; 0: off
  p.trainable = ()  # patterns of parameters that are trained, such as "layers/*"; default: all, or LoRA's alone
  p.frozen = ()  # patterns of those that are not trained after all
  p.layer_decay = 1.0  # learning rate of a layer as a share of the next one's; the embeddings come before the first
  p.lr_scales = ()  # ((pattern, factor), …): learning rates of parameters as shares of lr; the first match counts
  p.accumulate = 1  # microbatches a step, whose gradients are summed before the one update
  p.ema = 0.0  # decay of the moving average of the weights, which evaluation then uses; 0: off

  c.schedule = s = ml_collections.ConfigDict()
  s.name = "cosine"  # cosine | linear | wsd | inverse_sqrt | constant
  s.warmup_steps = 100  # linear rise to the peak, which the step after them has
  s.decay_fraction = 0.2  # wsd: last share of the run in which the rate falls
  s.final_ratio = 0.1  # rate at the end, as a share of the peak (cosine, linear, wsd)

  _run(c)
  return c.lock()


def _run(c):
  c.train = t = ml_collections.ConfigDict()
  t.steps = 1000  # optimizer steps

  c.eval = e = ml_collections.ConfigDict()
  e.every = 250  # steps between evaluations on the validation split; 0: only at the end
  e.batches = 20  # batches of an evaluation while training; 0: the whole split
  e.batch_size = config_dict.placeholder(int)  # rows a batch; default: data.batch_size

  c.checkpoint = k = ml_collections.ConfigDict()
  k.every = 500  # steps between checkpoints; the last step is always saved
  k.keep = 2  # newest checkpoints that are kept
  k.keep_every = 0  # keep each checkpoint whose step is a multiple of this; 0: none

  c.log = g = ml_collections.ConfigDict()
  g.every = 10  # steps between log lines; metrics are means over them
  g.tensorboard = False  # also write TensorBoard event files (needs the extra [track])

  c.mesh = h = ml_collections.ConfigDict()
  h.data = 1  # devices that hold copies of the model and share the batch
  h.fsdp = -1  # devices that share the batch and shard the parameters; -1: what is left
  h.seq = 1  # devices that share each row's tokens, for long contexts; 2 * seq divides data.seq_len, with splash attention 256 * seq
  h.tensor = 1  # devices that split heads, MLP columns and vocabulary
  h.expert = 1  # devices that split the experts; they share the batch too
  h.stage = 1  # devices that split the layers, as stages of a pipeline; outside of the layers they share the batch
  h.stage_microbatches = 0  # parts of a batch, after accumulation, that go through the stages one after the other, a multiple of stage; of a step (stage - 1) / (stage_microbatches * stage_repeats + stage - 1) is waiting; 0: one row of each data shard a part
  h.stage_repeats = 1  # times that a part goes round the stages, with so many times fewer layers a turn: less waiting, more messages
  h.compiled_step = ""  # file from `jaxgpt plan --save`: a start loads the step in place of compiling it, if it is the same
  h.compiler_options = ()  # XLA options of the train step as "name=value", before those that jaxgpt/training/xla_options.py has for the chip
  _rules(h)


def _rules(h):
  h.rules = u = ml_collections.ConfigDict()
  u.vocab = "tensor"  # parameters: the rows of the vocabulary. Each value: mesh axes that cut it, joined by commas, or none
  u.positions = "none"  # parameters: learned positions, types of tokens
  u.embed = "fsdp"  # parameters: the residual stream's dimension
  u.mlp = "tensor"  # parameters: columns of MLPs and experts
  u.heads = "tensor"  # parameters: query heads
  u.kv_heads = "tensor"  # parameters: key/value heads
  u.head_dim = "none"  # parameters: entries of a head
  u.norm = "none"  # parameters: scales of norms, biases of the residual stream
  u.experts = "expert"  # parameters and activations: experts
  u.router = "none"  # parameters: a router's columns
  u.rank = "none"  # parameters: LoRA's and latent attention's ranks
  u.labels = "none"  # parameters: a classifier's classes
  u.residual_length = "seq,tensor"  # activations between the blocks: tokens of a row
  u.expert_batch = "data,fsdp"  # activations: rows that were sent to the experts
  u.act_embed = "none"  # activations: the residual stream's dimension
  u.act_mlp = "tensor"  # activations: columns of MLPs and experts
  u.act_heads = "tensor"  # activations: heads, of queries, keys and values alike
  u.act_vocab = (
    "tensor"  # activations: the vocabulary, of logits and of embeddings that are looked up
  )


def _model(c):
  c.model = m = ml_collections.ConfigDict()
  m.preset = ""  # name of the preset that filled this section; for information only
  m.vocab_size = config_dict.placeholder(
    int
  )  # rows of the embedding; default: the tokenizer's size
  m.max_len = config_dict.placeholder(int)  # longest context, in tokens; default: data.seq_len
  m.num_layers = 6  # Transformer blocks
  m.width = 384  # size of the residual stream (D)
  m.num_heads = 6  # query heads (N)
  m.num_kv_heads = config_dict.placeholder(
    int
  )  # key/value heads (K), divides num_heads; default: num_heads
  m.head_dim = config_dict.placeholder(int)  # size of one head (H); default: width / num_heads
  m.mlp_width = config_dict.placeholder(int)  # hidden size of the MLP (F); default: 4 * width
  m.norm = "layernorm"  # layernorm | rmsnorm
  m.norm_eps = 1e-5  # added to the variance
  m.norm_placement = "pre"  # pre (of a branch's input) | branch (its output: OLMo 2) | both (Gemma 2) | post (the sum: BERT)
  m.first_norm = (
    True  # False: attention of the first layer reads the embeddings as they are (ModernBERT)
  )
  m.embed_norm = False  # a norm on the embeddings (BERT)
  m.embed_scale = 1.0  # factor on the embeddings (Gemma: the root of the width)
  m.position = "learned"  # learned | rotary | none
  m.token_types = (
    0  # rows of a table that is added for the first and second text of a pair (BERT: 2)
  )
  m.attention_pattern = (
    "global",
  )  # of the layers in turn: global | local (within window) | nope (global, unrotated)
  m.window = config_dict.placeholder(
    int
  )  # local attention: reads tokens fewer than this many places away
  m.attn_scale = config_dict.placeholder(
    float
  )  # factor on the attention logits; default: 1 / sqrt(head_dim)
  m.attn_softcap = config_dict.placeholder(
    float
  )  # cap * tanh(x / cap) on attention logits; default: no cap
  m.mlp_pattern = ("dense",)  # of the layers in turn: dense | moe
  m.activation = "gelu"  # gelu (tanh form) | gelu_exact | silu | relu | relu2 (squared)
  m.gated = False  # MLP multiplies the activation with a second projection (SwiGLU with silu)
  m.bias = True  # biases in the projections and in layernorm
  m.qkv_bias = config_dict.placeholder(bool)  # biases of queries, keys and values; default: bias
  m.qk_norm = "none"  # RMSNorm on queries and keys before positions: none | head (each) | all (heads together)
  m.logit_softcap = config_dict.placeholder(float)  # cap * tanh(logits / cap); default: no cap
  m.tie_embeddings = True  # the output head is the transposed embedding
  m.head = (
    "lm"  # lm (logits of tokens) | classifier | pooler (a vector a row) | none (hidden states)
  )
  m.head_bias = False  # a bias on the logits
  m.head_transform = "none"  # layer before the head: none | tanh (BERT's pooler) | norm (activation and norm: its MLM head)
  m.pooling = "first"  # what a classifier or pooler reads: first (token) | mean
  m.num_labels = 2  # classes of a classifier; 1: a regression
  m.causal = True  # a token reads only itself and what came before
  m.dropout = 0.0  # drop rate on the embeddings and on each residual branch while training
  m.init_std = 0.02  # standard deviation of initial weights; 1/sqrt(2 * num_layers) of it into the residual stream
  m.dtype = "float32"  # float32 | bfloat16: activations and matmuls; parameters, norms, softmax, loss stay float32
  m.grad_dtype = "compute"  # compute (as dtype) | float32: what weights' gradients leave the matmuls in and are summed over devices in; experts: compute
  m.quantize = "none"  # none | int8 | fp8: the layers' products with weights, but experts', in eight bits (needs the extra [quant])
  m.quantize_gradients = False  # quantize: the products of the gradients too
  m.attention = "auto"  # auto (by backend) | reference | batched (CPUs) | splash (TPUs) | cudnn (GPUs, bfloat16)
  m.scan_unroll = (
    1  # layers per iteration of the scan over layers; num_layers or more unrolls it all
  )
  m.remat = "none"  # recompute in the backward pass: none | full | dots | save_qkv | save_attention | save:q,k,v,attention,o,gate,up,down (some of these) | offload:… (the same, to the memory of the host) | save:…+offload:…
  m.materialize = "values"  # on TPUs, what is written before matmuls read it: none | values (of norms, the MLP's product) | gradients (theirs too)
  _parts_of_model(m)


def _parts_of_model(m):
  m.rope = r = ml_collections.ConfigDict()
  r.theta = 10_000.0  # base of the rotary frequencies
  r.local_theta = config_dict.placeholder(
    float
  )  # base in local layers, which then have no scaling; default: as global
  r.fraction = 1.0  # share of a head that is rotated
  r.scaling = "none"  # for longer contexts: none | linear | ntk | llama3 | yarn | longrope
  r.factor = 1.0  # how many times longer the context is to be
  r.original_len = config_dict.placeholder(int)  # context before that, in tokens; default: max_len
  r.attention_factor = config_dict.placeholder(
    float
  )  # yarn, longrope: factor on sines and cosines; default: by paper
  r.low_freq = (
    1.0  # llama3: turns in the original context below which a frequency is divided by factor
  )
  r.high_freq = 4.0  # llama3: turns above which it is kept
  r.beta_fast = 32.0  # yarn: turns above which a frequency is kept
  r.beta_slow = 1.0  # yarn: turns below which it is divided by factor
  r.short_factors = ()  # longrope: divisors of the frequencies within the original context
  r.long_factors = ()  # longrope: the same beyond it

  m.moe = x = ml_collections.ConfigDict()
  x.experts = 0  # experts of a layer that the pattern calls moe
  x.per_token = 2  # experts that a token goes to
  x.width = config_dict.placeholder(int)  # hidden size of an expert; default: mlp_width
  x.shared = 0  # experts that every token goes to beside
  x.first_dense = 0  # leading layers that are dense whatever the pattern says
  x.router = "softmax"  # softmax | sigmoid (with a bias in the choice: DeepSeek-V3)
  x.normalize = True  # a token's weights over its experts sum to 1
  x.scale = 1.0  # factor on these weights
  x.groups = 1  # groups of experts; a token goes to experts of the best top_groups groups
  x.top_groups = 1  # see groups
  x.capacity = (
    0.0  # places of an expert in a row, in shares of an even load; 0: no token is dropped
  )
  x.balance_loss = 0.01  # weight of the loss that spreads tokens over the experts
  x.z_loss = 0.001  # weight of the loss that keeps the router's logits small

  m.latent = a = ml_collections.ConfigDict()
  a.kv_rank = (
    0  # size that keys and values are compressed to (multi-head latent attention); 0: they are not
  )
  a.q_rank = 0  # size that queries are compressed to; 0: they are not
  a.rope_dim = 64  # last entries of a head that are rotated; keys share theirs over the heads
  a.v_dim = config_dict.placeholder(int)  # size of a head's values; default: head_dim

  m.lora = b = ml_collections.ConfigDict()
  b.rank = 0  # rank of the products that are trained instead of the weights (LoRA); 0: off
  b.alpha = 16.0  # factor on these products, divided by the rank
  b.dropout = 0.0  # drop rate on their input while training
  b.targets = (
    "q",
    "v",
  )  # weights of the layers that get one, by name or pattern: q k v o gate up down
