"""Logits equal Hugging Face's on tiny random models (needs the extra [bench])."""

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.model import transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, T, L, D, N, K, F = 61, 24, 3, 32, 4, 2, 48
H = D // N


def stack(state, name, shape=None, transpose=False):
  """A weight of all layers as [L, …]; torch's Linear stores [out, in]."""
  out = np.stack([state[name.format(i)].numpy() for i in range(L)])
  out = out.swapaxes(1, 2) if transpose else out
  return jnp.asarray(out.reshape(L, *shape) if shape else out)


def randomised(model):
  """Adds noise to every parameter: norms of 1 and biases of 0 would hide errors."""
  for p in model.parameters():
    p.data += 0.1 * torch.randn_like(p)
  return model.eval()


def gpt2():
  model = randomised(
    transformers.GPT2LMHeadModel(
      transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=N, bos_token_id=0, eos_token_id=0
      )
    )
  )
  s = model.state_dict()
  layer = "transformer.h.{}."
  norm = lambda name: {
    "scale": stack(s, layer + name + ".weight"),
    "bias": stack(s, layer + name + ".bias"),
  }
  qkv = jnp.split(stack(s, layer + "attn.c_attn.weight"), 3, axis=2)
  biases = jnp.split(stack(s, layer + "attn.c_attn.bias"), 3, axis=1)
  attn = {n: w.reshape(L, D, N, H) for n, w in zip("qkv", qkv, strict=True)}
  attn |= {f"{n}_bias": b.reshape(L, N, H) for n, b in zip("qkv", biases, strict=True)}
  attn |= {
    "o": stack(s, layer + "attn.c_proj.weight", (N, H, D)),
    "o_bias": stack(s, layer + "attn.c_proj.bias"),
  }
  mlp = {
    "up": stack(s, layer + "mlp.c_fc.weight"),
    "up_bias": stack(s, layer + "mlp.c_fc.bias"),
    "down": stack(s, layer + "mlp.c_proj.weight"),
    "down_bias": stack(s, layer + "mlp.c_proj.bias"),
  }
  one = lambda name: jnp.asarray(s[name].numpy())
  params = {
    "embed": one("transformer.wte.weight"),
    "pos_embed": one("transformer.wpe.weight"),
    "final_norm": {"scale": one("transformer.ln_f.weight"), "bias": one("transformer.ln_f.bias")},
    "layers": {"attn_norm": norm("ln_1"), "mlp_norm": norm("ln_2"), "attn": attn, "mlp": mlp},
  }
  return model, params, dict(config.preset("gpt2_124m"), num_kv_heads=N, mlp_width=4 * D)


def llama():
  model = randomised(
    transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
        vocab_size=V,
        max_position_embeddings=T,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
      )
    )
  )
  s = model.state_dict()
  layer = "model.layers.{}."
  heads = {"q": (D, N, H), "k": (D, K, H), "v": (D, K, H), "o": (N, H, D)}
  params = {
    "embed": jnp.asarray(s["model.embed_tokens.weight"].numpy()),
    "head": jnp.asarray(s["lm_head.weight"].numpy().T),
    "final_norm": {"scale": jnp.asarray(s["model.norm.weight"].numpy())},
    "layers": {
      "attn_norm": {"scale": stack(s, layer + "input_layernorm.weight")},
      "mlp_norm": {"scale": stack(s, layer + "post_attention_layernorm.weight")},
      "attn": {
        n: stack(s, layer + f"self_attn.{n}_proj.weight", shape, transpose=True)
        for n, shape in heads.items()
      },
      "mlp": {
        n: stack(s, layer + f"mlp.{n}_proj.weight", transpose=True) for n in ("gate", "up", "down")
      },
    },
  }
  return model, params, dict(config.preset("llama3_8b"), num_kv_heads=K, mlp_width=F)


@pytest.mark.parametrize("family", [gpt2, llama], ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", ["reference", "batched"])
def test_logits_agree(family, form):
  torch.manual_seed(0)
  theirs, params, fields = family()
  c = config.base()
  c.model.update(
    fields | dict(vocab_size=V, max_len=T, num_layers=L, width=D, num_heads=N, attention=form)
  )
  c.data.seq_len = T
  ours = transformer.Transformer(ml_collections.FrozenConfigDict(config.resolve(c).model))
  tokens = np.random.default_rng(0).integers(0, V, (2, T))
  with torch.no_grad():
    want = theirs(torch.from_numpy(tokens)).logits.numpy()
  positions = jnp.broadcast_to(jnp.arange(T), (2, T))
  got = ours.apply({"params": params}, jnp.asarray(tokens), positions).logits
  np.testing.assert_allclose(got, want, atol=1e-4)
