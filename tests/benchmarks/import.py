"""Peak host memory of `jaxgpt import`, relative to the bytes of the parameters.

  python tests/benchmarks/import.py [GB]

Writes a synthetic Llama of that many GB in float32 (default 3) to the system's temporary folder,
imports it in a process of its own and prints the figures. Fails above 1.25 times the parameters.
"""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from jaxgpt.hf import convert, families, safetensors
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.text.tokenizers.tokenizer import ByteTokenizer
from jaxgpt.training import build as build_lib

LIMIT = 1.25


def write_model(folder, gigabytes):
  """Writes a model with random weights, a tensor at a time. Returns its bytes."""
  width = 2048
  hf = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=32000,
    hidden_size=width,
    intermediate_size=5632,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_theta=1e4,
  )
  ends, layer = 2 * 32000 * width, 2 * width * width * 5 // 4 + 3 * width * 5632
  hf["num_hidden_layers"] = max(1, round((gigabytes * 1e9 / 4 - ends) / layer))
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(hf))
  c = convert.configured(convert.read(hf)[1])
  shapes = build_lib.build(c, mesh_lib.make(c.mesh)).state["params"]
  published = convert.publish(families.FAMILIES["llama"], c.model, shapes)
  rng = np.random.default_rng(0)
  entries = [safetensors.Entry(p.name, p.shape, np.dtype("float32")) for p in published]
  safetensors.write(folder, entries, lambda e: rng.random(e.shape, np.float32), 1 << 30)
  ByteTokenizer().save(folder / "tokenizer")
  return sum(e.nbytes for e in entries), max(e.nbytes for e in entries)


def main():
  gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
  folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxgpt_import_"))
  try:
    size, largest = write_model(folder / "model", gigabytes)
    command = [
      sys.executable,
      "-m",
      "jaxgpt",
      "import",
      f"--from={folder / 'model'}",
      f"--workdir={folder / 'run'}",
    ]
    start = time.time()
    subprocess.run(
      command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL
    )
    seconds = time.time() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  finally:
    shutil.rmtree(folder)
  print(
    f"import of {size / 1e9:.2f} GB (largest tensor {largest / 1e9:.2f} GB): "
    f"{seconds:.0f} s, peak {peak / 1e9:.2f} GB of host memory, "
    f"{peak / size:.2f} times the parameters (limit {LIMIT})"
  )
  if peak > LIMIT * size:
    sys.exit(f"more than {LIMIT} times the parameters' bytes")


if __name__ == "__main__":
  main()
