"""Llama-3-8B (arXiv:2407.21783), or another preset of its family, trained from scratch.

  jaxgpt data --out=DATA --tokenizer=TOKENIZER.model TEXT…
  jaxgpt train --config=configs/llama3_8b.py --config.data.path=DATA --workdir=RUN
  jaxgpt train --config=configs/llama3_8b.py:llama2_7b …    (another preset)

Made for 256 TPU v5e chips or 64 GPUs of 80 GB: parameters and optimizer state are sharded over all
devices (about 96 GB of them in float32), activations are recomputed from the saved q, k and v.
A step is 256 rows of 8,192 tokens, 2.1 million in all. Expect a run of weeks; it has not been
run, but compiled for TPUs (docs/plan.md).
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
  c.mesh.fsdp = -1  # what is left of the devices
  return c
