"""Published models in and out: tiny random ones of each family, against transformers.

Needs the extra [bench]. Every parameter is random, norms and biases too: ones and zeros would hide
mistakes.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config, exchange, initial, loop, runs
from jaxgpt.errors import UserError
from jaxgpt.hf import parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.numpy")

V, T = 288, 48  # rows of the embedding: no fewer than the byte tokenizer has ids
SMALL = dict(vocab_size=V, bos_token_id=1, eos_token_id=2, pad_token_id=0)
DECODER = dict(SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
               num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=T)
FAMILIES = {
    "gpt2": (transformers.GPT2Config, dict(SMALL, n_positions=T, n_embd=32, n_layer=3, n_head=4)),
    "llama2": (transformers.LlamaConfig, DECODER),
    "llama3": (transformers.LlamaConfig, dict(
        DECODER, head_dim=16, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
}
PROMPTS = ([1, 70, 80, 90], [1, 5, 100, 101, 102, 7, 9], [1, 200])


def make(name, folder):
  """A random model of a family, saved as transformers does."""
  config_class, values = FAMILIES[name]
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config_class(**values))
  for p in model.parameters():
    p.data += 0.1 * torch.randn_like(p)
  model.eval().save_pretrained(folder)
  return model


def logits_of(model, prompts):
  """Their logits [n, T, V] of each prompt on its own."""
  with torch.no_grad():
    return [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]


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
  """Padded, packed and cached, our run computes what their model does."""
  want = logits_of(model, PROMPTS)
  padded, _ = parity.forward(run.parts.model, run.params, PROMPTS)
  for ids, a, b, c in zip(PROMPTS, want, padded, packed(run, PROMPTS)):
    np.testing.assert_allclose(b[:len(ids)], a, atol=atol)
    np.testing.assert_allclose(c, a, atol=atol)


def check_greedy(run, model, new=32):
  for ids in PROMPTS:
    theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new,
                            eos_token_id=None, pad_token_id=0)[0, len(ids):].tolist()
    assert parity.continuation(run.parts.model, run.params, ids, new) == theirs


def train_config(run, corpus, folder):
  c = config.base()
  c.model.update(run.c.model.to_dict() | {"preset": ""})
  c.data.update(dict(path=str(corpus), seq_len=16, batch_size=8))
  c.init_from = str(folder)
  c.optim.lr = 1e-3
  c.schedule.warmup_steps = 1
  c.train.steps = 3
  c.eval.update(dict(every=0, batches=1))
  c.mesh.update(dict(data=-1, fsdp=1))
  return c


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name, tmp_path, corpus):
  theirs = make(name, tmp_path / "theirs")
  exchange.import_model(tmp_path / "theirs", tmp_path / "run", tokenizer=corpus)
  run = runs.load(tmp_path / "run")
  check(run, theirs)
  check_greedy(run, theirs)
  assert runs.evaluate_run(run, data=str(corpus), limit=1)["loss"] > 0

  c = train_config(run, corpus, tmp_path / "run")
  step, _, _ = loop.train(c, tmp_path / "trained", {})
  assert step == 3
  report = json.loads((tmp_path / "trained" / initial.REPORT).read_text())
  assert not report["initialized"] and not report["left"] and not report["changed"]

  trained = runs.load(tmp_path / "trained")
  _, _, certificate = exchange.export_run(tmp_path / "trained", tmp_path / "out")
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert type(back) is type(theirs)
  check(trained, back)
  moved = max(float(jnp.abs(a - b).max()) for a, b in zip(
      jax.tree.leaves(run.params), jax.tree.leaves(trained.params)))
  assert moved > 1e-4  # three steps did something
  assert certificate["greedy"]["equal"] and certificate["logits"]["max_abs"] < 1e-4


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llama") / "theirs"
  return folder, make("llama2", folder)


def changed(folder, out, tensors=None, **values):
  """A copy of a model's folder with other values in its config.json, or other tensors."""
  out.mkdir()
  hf = json.loads((folder / "config.json").read_text()) | values
  (out / "config.json").write_text(json.dumps(hf))
  weights = st.load_file(folder / "model.safetensors")
  st.save_file(tensors(weights) if tensors else weights, out / "model.safetensors")
  return out


@pytest.mark.parametrize("values,message", [
    (dict(model_type="lama"), r"model_type='lama' is not supported; did you mean 'llama'"),
    (dict(hidden_act="tanh"), r"hidden_act='tanh' is not supported: known are"),
    (dict(mlp_bias=True), r"mlp_bias=True is not supported: only False is"),
    (dict(quantization_config={"bits": 4}), r"quantization_config=.* is not supported"),
    (dict(hidden_size=None), r"config.json lacks 'hidden_size'"),
])
def test_what_is_not_supported_is_refused_by_name(llama, tmp_path, values, message):
  folder = changed(llama[0], tmp_path / "m", **values)
  (folder / "model.safetensors").unlink()  # refused before any weight is looked for
  with pytest.raises(UserError, match=message):
    exchange.import_model(folder, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def lost(weights):
  weights.pop("model.layers.1.mlp.up_proj.weight")
  weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
  return weights | {"model.layers.3.surprise": np.zeros(2, np.float32)}


def test_tensors_that_do_not_fit_are_listed(llama, tmp_path, corpus):
  folder = changed(llama[0], tmp_path / "m", lost)
  with pytest.raises(UserError) as e:
    exchange.import_model(folder, tmp_path / "run", tokenizer=corpus)
  message = str(e.value)
  assert "1 missing: model.layers.1.mlp.up_proj.weight [48, 32] (layers/mlp/up)" in message
  assert "model.layers.0.mlp.up_proj.weight is [3, 4], layers/mlp/up needs [48, 32]" in message
  assert "1 that this model does not have: model.layers.3.surprise [2]" in message
  assert not (tmp_path / "run").exists()


def test_old_config_keys_and_bare_models(llama, tmp_path, corpus):
  """rope_theta as transformers 4 wrote it, names without 'model.', a stored copy of a tied head."""
  folder, theirs = llama
  old = changed(folder, tmp_path / "m", lambda w: {k.removeprefix("model."): v for k, v in w.items()
                                                   if k != "lm_head.weight"}
                | {"lm_head.weight": w["model.embed_tokens.weight"] + 0,
                   "layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)},
                rope_parameters=None, rope_theta=10_000.0, tie_word_embeddings=True)
  exchange.import_model(old, tmp_path / "run", tokenizer=corpus)
  theirs.lm_head.weight = theirs.model.embed_tokens.weight
  check(runs.load(tmp_path / "run"), theirs)


def test_export_in_bfloat16_and_in_shards(llama, tmp_path, corpus):
  exchange.import_model(llama[0], tmp_path / "run", tokenizer=corpus, dtype="bfloat16")
  family, files, certificate = exchange.export_run(tmp_path / "run", tmp_path / "out",
                                                   dtype="bfloat16", shard_bytes=30_000)
  assert family == "llama" and "model-00002-of-00003.safetensors" in files
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert back.dtype == torch.bfloat16
  assert certificate["logits"]["max_abs"] < 1e-4 and certificate["greedy"]["equal"]
  assert "| logits |" in (tmp_path / "out" / parity.TEXT).read_text()
  with pytest.raises(UserError, match="exists; choose another folder"):
    exchange.export_run(tmp_path / "run", tmp_path / "out")
  with pytest.raises(UserError, match=r"no published family has .* gpt2: model\."):
    exchange.export_run(tmp_path / "run", tmp_path / "gpt2", family="gpt2")
  with pytest.raises(UserError, match="imported model; train it in another --workdir"):
    loop.train(train_config(runs.load(tmp_path / "run"), corpus, ""), tmp_path / "run", {})


def test_starting_from_part_of_a_model(llama, tmp_path, corpus, capsys):
  """What is missing is initialised, what is too much is left, and both are told."""
  exchange.import_model(llama[0], tmp_path / "run", tokenizer=corpus)
  run = runs.load(tmp_path / "run")
  for source in (tmp_path / "run", llama[0]):
    c = train_config(run, corpus, source)
    c.model.update(dict(tie_embeddings=True, bias=True))
    given = initial.load(source, config.resolve(c).model, loop.build(
        config.resolve(c), run.mesh).state["params"])
    assert "layers/attn/q_bias" in given.report["initialized"]
    assert given.report["left"] in (["head"], ["lm_head.weight"])
    assert given.report["changed"]["tie_embeddings"] == [False, True]
    np.testing.assert_array_equal(given.params["embed"], run.params["embed"])
  c.model.width = 64
  with pytest.raises(UserError, match="of the wrong shape"):
    initial.load(llama[0], config.resolve(c).model, loop.build(
        config.resolve(c), run.mesh).state["params"])
