"""Llama 3 8B (arXiv:2407.21783), or another preset of its family, trained from scratch.

  jaxgpt data --out=DATA --tokenizer=TOKENIZER.model TEXT...
  jaxgpt train --config=configs/llama3_8b.py --config.data.path=DATA --workdir=RUN
  jaxgpt train --config=configs/llama3_8b.py:llama2_7b ...    (another preset)

Size:      8.0 billion parameters, 100,000 steps of 256 rows of 8,192 tokens (2.1 million tokens).
Hardware:  256 TPU v5e chips or 64 GPUs of 80 GB, for weeks. Parameters and optimizer state, about
           96 GB in float32, are sharded over all devices. Activations are recomputed from the saved
           queries, keys and values.
Result:    not run yet, but compiled for TPUs (docs/plan.md).
"""

from jaxgpt import config


def get_config(arg="llama3_8b"):
  c = config.base()
  c.model.update(config.preset(arg))
  c.model.dtype = "bfloat16"
  c.model.remat = "save_qkv"
  c.data.seq_len = c.model.max_len
  c.data.batch_size = 256
  c.objective.z_loss = 1e-4
  c.train.steps = 100_000
  c.optim.lr = 3e-4
  c.schedule.warmup_steps = 2000
  c.eval.every = 1000
  c.checkpoint.every = 1000
  c.checkpoint.keep_every = 10_000
  c.mesh.fsdp = -1  # all devices
  return c
