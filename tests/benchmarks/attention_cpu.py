"""Attention on CPUs with its gradients: `batched` against `reference` and PyTorch, with a softcap.

  python tests/benchmarks/attention_cpu.py [--rounds=N]

The forms take turns, and each figure is the median of all rounds. PyTorch computes a softcap by
plain operations, as its `scaled_dot_product_attention` has none.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgpt.model.attention import batched, masks, reference

SHAPES = ((4, 1024), (8, 512))  # rows, tokens of a row
HEADS, KEY_HEADS, SIZE = 8, 4, 64  # Gemma 2's shape of heads, small
SCALE = SIZE**-0.5


def of_jax(attention, arrays, softcap):
  """A function that computes the gradients of queries, keys and values once."""
  mask = masks.visible(jnp.ones(arrays[0].shape[:2], jnp.int32), causal=True)

  def loss(q, k, v):
    return jnp.sin(attention(q, k, v, mask, scale=SCALE, softcap=softcap)).sum()

  step = jax.jit(jax.grad(loss, (0, 1, 2)))
  return lambda: [np.asarray(x) for x in step(*arrays)]


def of_torch(arrays, softcap):
  """The same by PyTorch."""
  heads_first = [torch.tensor(np.asarray(x)).transpose(1, 2) for x in arrays]
  q, k, v = (x.contiguous().requires_grad_() for x in heads_first)
  T = q.shape[2]
  hidden = torch.ones(T, T, dtype=torch.bool).triu(1)

  def step():
    if softcap is None:
      out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=SCALE, enable_gqa=True
      )
    else:
      grow = lambda x: x.repeat_interleave(HEADS // KEY_HEADS, 1)
      logits = softcap * torch.tanh(q @ grow(k).transpose(2, 3) * SCALE / softcap)
      out = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1) @ grow(v)
    grads = torch.autograd.grad(torch.sin(out).sum(), (q, k, v))
    return [x.transpose(1, 2).numpy() for x in grads]

  return step


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--rounds", type=int, default=9)
  rounds = parser.parse_args().rounds
  for rows, length in SHAPES:
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    shapes = [(rows, length, n, SIZE) for n in heads]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    for softcap in (None, 50.0):
      steps = {
        "batched": of_jax(functools.partial(batched.attention, causal=True), arrays, softcap),
        "reference": of_jax(reference.attention, arrays, softcap),
        "PyTorch": of_torch(arrays, softcap),
      }
      want = steps["reference"]()
      for name, step in steps.items():
        for a, b in zip(step(), want, strict=True):
          np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)
      took = {name: [] for name in steps}
      for _ in range(rounds):
        for name, step in steps.items():
          began = time.perf_counter()
          step()
          took[name].append(time.perf_counter() - began)
      middle = {name: statistics.median(seconds) for name, seconds in took.items()}
      peers = ", ".join(
        f"{name} {middle[name]:.3f} s (ratio {middle[name] / middle['batched']:.2f})"
        for name in ("reference", "PyTorch")
      )
      print(
        f"{rows} x {length} tokens, softcap {softcap}: batched {middle['batched']:.3f} s, {peers}"
      )


if __name__ == "__main__":
  main()
