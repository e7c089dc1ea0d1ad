"""The Transformer: causality, packing, KV cache, parameter counts, remat, dropout."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt import config, tree
from jaxgpt.config import presets
from jaxgpt.model import kv_cache, stacks, transformer
from jaxgpt.model.attention import paged
from tests import quick

STYLES = {
  "gpt2": dict(norm="layernorm", position="learned", activation="gelu", bias=True),
  "llama": dict(
    norm="rmsnorm",
    position="rotary",
    activation="silu",
    gated=True,
    bias=False,
    num_kv_heads=2,
    tie_embeddings=False,
  ),
  "other": dict(
    norm="rmsnorm",
    position="none",
    activation="relu2",
    bias=True,
    qk_norm="head",
    logit_softcap=20.0,
    num_kv_heads=1,
  ),
  "gemma": dict(
    norm="rmsnorm",
    norm_placement="both",
    position="rotary",
    activation="gelu",
    gated=True,
    bias=False,
    embed_scale=5.0,
    attn_softcap=30.0,
    num_layers=5,
    attention_pattern=("local", "global"),
    window=8,
    rope=dict(local_theta=100.0, scaling="linear", factor=2.0),
  ),
  "olmo": dict(
    norm="rmsnorm",
    norm_placement="branch",
    position="rotary",
    qk_norm="all",
    activation="silu",
    gated=True,
    bias=False,
  ),
  "moe": dict(
    norm="rmsnorm",
    position="rotary",
    activation="silu",
    gated=True,
    bias=False,
    mlp_pattern=("moe",),
    num_layers=3,
    moe=dict(experts=4, width=16, shared=1, first_dense=1),
  ),
  "latent": dict(
    norm="rmsnorm",
    position="rotary",
    activation="silu",
    gated=True,
    bias=False,
    head_dim=12,
    latent=dict(kv_rank=8, q_rank=10, rope_dim=4, v_dim=6),
  ),
  "post": dict(
    norm="layernorm",
    norm_placement="post",
    position="learned",
    token_types=2,
    activation="gelu_exact",
    embed_norm=True,
    head_transform="norm",
    head_bias=True,
  ),
}
# Published sizes (Hugging Face's num_parameters(); the models' papers).
SIZES = {
  "gpt2_124m": 124_439_808,
  "gpt2_355m": 354_823_168,
  "gpt2_774m": 774_030_080,
  "gpt2_1558m": 1_557_611_200,
  "llama2_7b": 6_738_415_616,
  "llama2_13b": 13_015_864_320,
  "llama2_70b": 68_976_648_192,
  "llama3_8b": 8_030_261_248,
  "llama3_70b": 70_553_706_496,
  "llama31_8b": 8_030_261_248,
  "llama31_70b": 70_553_706_496,
  "llama31_405b": 405_853_388_800,
  "llama32_1b": 1_235_814_400,
  "llama32_3b": 3_212_749_824,
  "mistral_7b_v01": 7_241_732_096,
  "mistral_7b_v03": 7_248_023_552,
  "mixtral_8x7b": 46_702_792_704,
  "mixtral_8x22b": 140_620_634_112,
  "qwen25_0_5b": 494_032_768,
  "qwen25_1_5b": 1_543_714_304,
  "qwen25_3b": 3_085_938_688,
  "qwen25_7b": 7_615_616_512,
  "qwen25_14b": 14_770_033_664,
  "qwen25_32b": 32_763_876_352,
  "qwen25_72b": 72_706_203_648,
  "qwen3_0_6b": 596_049_920,
  "qwen3_1_7b": 1_720_574_976,
  "qwen3_4b": 4_022_468_096,
  "qwen3_8b": 8_190_735_360,
  "qwen3_14b": 14_768_307_200,
  "qwen3_32b": 32_762_123_264,
  "qwen3_30b_a3b": 30_532_122_624,
  "qwen3_235b_a22b": 235_093_634_560,
  "gemma_2b": 2_506_172_416,
  "gemma_7b": 8_537_680_896,
  "gemma2_2b": 2_614_341_888,
  "gemma2_9b": 9_241_705_984,
  "gemma2_27b": 27_227_128_320,
  "gemma3_1b": 999_885_952,
  "gemma3_270m": 268_098_176,
  "phi3_mini": 3_821_079_552,
  "phi3_medium": 13_960_238_080,
  "olmo2_1b": 1_484_916_736,
  "olmo2_7b": 7_298_617_344,
  "olmo2_13b": 13_716_198_400,
  "olmo2_32b": 32_234_279_936,
  "smollm2_135m": 134_515_008,
  "smollm2_360m": 361_821_120,
  "smollm2_1_7b": 1_711_376_384,
  "starcoder2_3b": 3_030_371_328,
  "starcoder2_7b": 7_173_923_840,
  "deepseek_v2_lite": 15_706_484_224,
  "deepseek_v3": 671_026_419_200,
  "bert_base": 109_514_298,
  "bert_large": 335_174_458,
  "roberta_base": 124_697_433,
  "roberta_large": 355_412_057,
  "modernbert_base": 149_655_232,
  "modernbert_large": 395_881_664,
}
# RoBERTa's table has two positions that no token uses. ModernBERT's first layer has no norm before
# its attention. Ours has one that is not used.
MORE = {
  "roberta_base": -2 * 768,
  "roberta_large": -2 * 1024,
  "modernbert_base": 768,
  "modernbert_large": 1024,
}


def model_of(causal=True, **fields):
  """A small model."""
  c = config.base()
  c.model.update(
    dict(vocab_size=50, max_len=16, num_layers=2, width=32, num_heads=4, init_std=0.2) | fields
  )  # nested sections are merged
  c.data.seq_len = 16
  c = config.resolve(c)
  fields = ml_collections.ConfigDict(c.model)
  fields.causal = causal  # otherwise set by the objective
  return transformer.Transformer(ml_collections.FrozenConfigDict(fields))


def make(causal=True, **fields):
  """A small model with its initial parameters."""
  return _made(json.dumps(dict(fields, causal=causal), sort_keys=True))


@functools.cache
def _made(fields):
  model = model_of(**{k: _frozen(v) for k, v in json.loads(fields).items()})
  return model, jax.jit(lambda: transformer.init(model, jax.random.key(0)))()


def _frozen(value):
  return tuple(value) if isinstance(value, list) else value


def tokens_and_positions(batch=2, length=12):
  tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, 50)
  return tokens, jnp.broadcast_to(jnp.arange(length), (batch, length))


@functools.partial(jax.jit, static_argnums=0, static_argnames="layer_outputs")
def apply(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


def logits_of(model, params, *args, **kwargs):
  return apply(model, params, *args, **kwargs).logits


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_have_the_published_sizes(name):
  c = config.base()
  c.model.update(config.preset(name))
  c.objective.name = "causal_lm" if c.model.causal else "masked_lm"
  model = transformer.Transformer(ml_collections.FrozenConfigDict(config.resolve(c).model))
  assert tree.count(transformer.abstract(model)[0]) == SIZES[name] + MORE.get(name, 0)


def reads(style, segments=None, positions=None, **fields):
  """[t, s]: whether output t changes with input token s. All tokens differ."""
  model, params = make(**STYLES[style] | fields)
  tokens = jnp.arange(12)
  rows = jnp.stack([tokens, *(tokens.at[s].set(12 + s) for s in range(12))])
  whole = lambda row: None if row is None else jnp.broadcast_to(row, rows.shape)
  positions = tokens if positions is None else positions
  logits = logits_of(model, params, rows, whole(positions), whole(segments))
  return np.asarray(jnp.abs(logits[1:] - logits[0]).max(-1)).T > 1e-5


@pytest.mark.parametrize("style", quick.first(STYLES, 3))
def test_no_token_reads_the_future(style):
  np.testing.assert_array_equal(reads(style), np.tril(np.ones((12, 12), bool)))


@pytest.mark.parametrize("causal", [True, False])
def test_local_layers_read_a_window(causal):
  pattern = dict(num_layers=1, attention_pattern=("local",), window=3)
  distance = np.arange(12)[:, None] - np.arange(12)
  want = np.abs(distance) < 3
  np.testing.assert_array_equal(
    reads("llama", causal=causal, **pattern), want & (distance >= 0) if causal else want
  )


@pytest.mark.parametrize("style", ["gpt2", "post"])
def test_an_encoder_attends_in_both_directions(style):
  assert reads(style, causal=False).all()


def test_layers_are_scanned_over_the_periods_of_their_pattern():
  def names(**fields):
    return [(s.name, s.kinds, s.repeats) for s in stacks.of(model_of(**fields).cfg)]

  local, full = ("local", "dense"), ("global", "dense")
  assert names(num_layers=3) == [("layers", (full,), 3)]
  pattern = dict(attention_pattern=("local", "local", "global"), window=4)
  assert names(num_layers=8, **pattern) == [
    ("layers", (local, local, full), 2),
    ("last_layers", (local,), 2),
  ]
  assert names(num_layers=4, mlp_pattern=("dense", "moe"), moe=dict(experts=2), **pattern)[0] == (
    "last_layers",
    (local, ("local", "moe"), full, ("local", "moe")),
    1,
  )
  assert names(num_layers=5, mlp_pattern=("moe",), moe=dict(experts=2, first_dense=2)) == [
    ("first_layers", (full,), 2),
    ("layers", (("global", "moe"),), 3),
  ]


@pytest.mark.parametrize(
  "head, shape",
  [
    (dict(head="classifier", num_labels=3, head_transform="tanh"), (2, 3)),
    (dict(head="pooler", head_transform="tanh", pooling="mean"), (2, 32)),
    (dict(head="classifier", num_labels=3, pooling="last"), (2, 3)),
    (dict(head="none"), (2, 12, 32)),
  ],
)
def test_heads_return_one_vector_per_row_or_the_hidden_states(head, shape):
  c = ml_collections.ConfigDict(model_of(**STYLES["post"]).cfg)
  c.update(dict(head_transform="none", head_bias=False, causal=False) | head)
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c))
  params = jax.jit(lambda: transformer.init(model, jax.random.key(0)))()
  tokens, positions = tokens_and_positions()
  segments = jnp.array([[1] * 12, [1] * 7 + [0] * 5])
  out = apply(model, params, tokens, positions, segments)
  assert out.logits.shape == shape
  changed = apply(model, params, tokens.at[1, 7:].set(3), positions, segments)
  np.testing.assert_array_equal(out.logits[:, :7], changed.logits[:, :7])  # padding is not read


def test_token_types_distinguish_the_texts_of_a_pair():
  model, params = make(**STYLES["post"])
  tokens, positions = tokens_and_positions()
  run = lambda types: logits_of(model, params, tokens, positions, token_types_BT=types)
  np.testing.assert_array_equal(run(None), run(jnp.zeros_like(tokens)))
  assert not np.allclose(run(None), run(jnp.ones_like(tokens)))


def test_a_model_with_one_token_type_has_it_for_both_texts():
  """RoBERTa. A lookup of type 1 in a table of one row would be NaN."""
  model, params = make(**STYLES["post"] | {"token_types": 1})
  tokens, positions = tokens_and_positions()
  run = lambda types: logits_of(model, params, tokens, positions, token_types_BT=types)
  np.testing.assert_array_equal(run(None), run(jnp.ones_like(tokens)))


def test_the_outputs_of_all_layers():
  model, params = make(**STYLES["gemma"])
  out = apply(model, params, *tokens_and_positions(), layer_outputs=True)
  assert out.layers.shape == (5, 2, 12, 32)
  first = jax.tree.map(lambda x: x[:1], params["layers"])
  model1, _ = make(**STYLES["gemma"] | {"num_layers": 2})
  two = apply(
    model1,
    {k: v for k, v in params.items() if k != "last_layers"} | {"layers": first},
    *tokens_and_positions(),
    layer_outputs=True,
  )
  np.testing.assert_allclose(out.layers[:2], two.layers, atol=1e-5)


def test_packed_documents_do_not_read_each_other():
  segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
  positions = jnp.array([[*range(5), *range(4), 0, 0, 0]])
  seen = reads("llama", segments, positions)[:9, :9]
  want = np.tril(np.ones((9, 9), bool))
  want[5:, :5] = False
  np.testing.assert_array_equal(seen, want)


@pytest.mark.parametrize("style", quick.first(STYLES, 4))
def test_a_packed_document_is_computed_as_if_alone(style):
  model, params = make(**STYLES[style])
  tokens, _ = tokens_and_positions(batch=1)
  segments = jnp.array([[1] * 5 + [2] * 7])
  positions = jnp.array([[*range(5), *range(7)]])
  packed = logits_of(model, params, tokens, positions, segments)
  alone = logits_of(model, params, tokens[:, 5:], jnp.arange(7)[None])
  np.testing.assert_allclose(packed[:, 5:], alone, atol=2e-5)


@pytest.mark.parametrize("style", quick.first(STYLES, 4))
def test_prefill_and_decode_equal_the_full_forward(style):
  model, params = make(**STYLES[style])
  tokens, positions = tokens_and_positions()
  full = logits_of(model, params, tokens, positions)
  cache = kv_cache.pools(model.cfg, 9, 4, "float32")
  tables = np.arange(1, 9).reshape(2, 4)[:, ::-1]  # blocks of each row, in any order
  for b in range(2):
    table = np.append(tables[b], 0).astype(np.int32)
    for t in (0, 4):
      at = np.s_[b : b + 1, t : t + 4]
      call = paged.Chunk(table[None], np.array([t // 4], np.int32), 16)
      out = apply(model, params, tokens[at], positions[at], cache=cache, call=call)
      cache = out.cache
      np.testing.assert_allclose(out.logits, full[at], atol=2e-5)
  for t in range(8, 12):
    # Each of the two rows sees its first three blocks.
    numbers, starts = np.repeat([0, 1], 3), np.tile([0, 4, 8], 2)
    pad = lambda x: np.pad(x.astype(np.int32), (0, 2))
    of_rows = np.array([[0, 1, 2, 8], [3, 4, 5, 8]], np.int32)
    pairs = paged.Pairs(*map(pad, (numbers, tables[:, :3].ravel(), starts)), of_rows, np.int32(6))
    kinds = dict.fromkeys(model.cfg.attention_pattern, pairs)
    call = paged.Step(
      tables[:, 2:3].astype(np.int32), np.full((2, 1), t - 8, np.int32), kinds, 16, 2
    )
    at = np.s_[:, t : t + 1]
    out = apply(model, params, tokens[at], positions[at], cache=cache, call=call)
    cache = out.cache
    np.testing.assert_allclose(out.logits, full[at], atol=2e-5)


@functools.cache
def gradient(**fields):
  """The gradient of the mean square of a model's logits."""
  tokens, positions = tokens_and_positions()
  model, params = make(**STYLES["llama"] | fields)
  loss = lambda p: jnp.square(logits_of(model, p, tokens, positions)).mean()
  return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize(
  "remat",
  [
    "full",
    "dots",
    "save_qkv",
    "save_attention",
    "save:q,k,v,attention,o,gate,up,down",
    "save:gate,up+offload:q,k,attention",
    "save:q,k,v+offload:input,up",
  ],
)
def test_remat_and_unrolling_do_not_change_gradients(remat):
  got, want = gradient(remat=remat, scan_unroll=2 if remat == "full" else 1), gradient()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize("qk_norm", ["none", "head", "all"])
def test_saved_queries_and_keys_are_not_computed_again(qk_norm):
  tokens, positions = tokens_and_positions()

  def products(remat):
    model, params = make(**STYLES["llama"] | dict(qk_norm=qk_norm, remat=remat))
    loss = lambda p: jnp.square(logits_of(model, p, tokens, positions)).mean()
    return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

  assert products("save:v") - products("save:q,k,v") == 2


@pytest.mark.parametrize("remat", ["full", "dots", "save:q", "offload:q"])
def test_mean_squares_of_norms_are_saved(remat):
  tokens, positions = tokens_and_positions()
  model, params = make(**STYLES["llama"] | dict(remat=remat))
  loss = lambda p: jnp.square(logits_of(model, p, tokens, positions)).mean()
  text = str(jax.make_jaxpr(jax.grad(loss))(params))
  assert "f32[2,2,12]" in text  # a number for each layer, row and token


def test_heads_of_splash_attention_are_saved_scaled_and_padded():
  tokens, positions = tokens_and_positions(length=128)
  fields = STYLES["llama"] | dict(attention="splash", max_len=128, remat="save:q")
  model, params = make(**fields)  # of 4 heads of 8 numbers
  run = lambda p: model.apply({"params": p}, tokens, positions).logits
  text = str(jax.make_jaxpr(run)(params))
  assert "f32[2,4,128,128] = name[name=q]" in text
  assert "f32[2,2,128,128] = name[name=k]" in text


@pytest.mark.parametrize("causal", [True, False])
def test_a_row_that_no_block_of_splash_fits_attends_by_definition(causal):
  """Such as the rows that an encoder's predictions and scores are padded to."""
  tokens, positions = tokens_and_positions(length=48)
  segments = jnp.ones((2, 48), jnp.int32).at[0, 20:].set(2).at[1, 40:].set(0)
  fields = STYLES["gemma"] | dict(causal=causal, max_len=128)
  _, params = make(**fields)
  got, want = (
    logits_of(model_of(**fields, attention=form), params, tokens, positions, segments)
    for form in ("splash", "reference")
  )
  np.testing.assert_allclose(got[segments != 0], want[segments != 0], atol=1e-5)


def test_offloaded_activations_go_to_the_host_and_back():
  tokens, positions = tokens_and_positions()

  def text_of(remat):
    model, params = make(**STYLES["llama"] | dict(remat=remat))
    loss = lambda p: jnp.square(logits_of(model, p, tokens, positions)).mean()
    return str(jax.make_jaxpr(jax.grad(loss))(params))

  def moves(remat):
    text = text_of(remat)
    return text.count("MemorySpace.Host"), text.count("MemorySpace.Device")

  assert moves("save:q,k") == (0, 0)
  assert moves("offload:q,k") == (2, 2)
  assert moves("save:q,k+offload:up") == (1, 1)
  assert moves("offload:input") == (1, 1)
  inputs = "[2,2,12,32]"  # of both layers
  assert f"f32{inputs}" in text_of("full")
  assert f"f32{inputs}" not in text_of("offload:input")
  assert f"f32<host>{inputs}" in text_of("offload:input")


def test_bfloat16_stays_close_to_float32():
  tokens, positions = tokens_and_positions()
  model, params = make(init_std=0.05)
  want = logits_of(model, params, tokens, positions)
  got = logits_of(make(init_std=0.05, dtype="bfloat16")[0], params, tokens, positions)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=0.03 * float(jnp.abs(want).max()))
  assert not np.array_equal(got, want)


def test_dropout_follows_its_key_and_is_off_without_one():
  model, params = make(dropout=0.5)
  tokens, positions = tokens_and_positions()
  run = lambda key: logits_of(model, params, tokens, positions, dropout_key=key)
  np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
  assert not np.array_equal(run(jax.random.key(1)), run(jax.random.key(2)))
  np.testing.assert_array_equal(run(None), logits_of(make()[0], params, tokens, positions))
