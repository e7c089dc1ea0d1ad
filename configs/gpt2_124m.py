"""GPT-2 124M (Radford et al. 2019), trained from scratch.

  jaxgpt data --out=DATA --tokenizer=sentencepiece:50257 TEXT...
  jaxgpt train --config=configs/gpt2_124m.py --config.data.path=DATA --workdir=RUN

Size:      124 million parameters, 19,073 steps of 524,288 tokens: 10 billion tokens.
Hardware:  8 GPUs of 80 GB or 8 TPU v4 chips, data parallel, 8 microbatches per step. On fewer
           devices raise --config.optim.accumulate: the step stays the same and microbatches get
           smaller.
Result:    not run to its end yet. nanoGPT reports 2.85 nats per token for this model on OpenWebText
           after 300 billion tokens. Expect more after 10 billion.
"""

from jaxgpt import config


def get_config():
  c = config.base()
  c.model.update(config.preset("gpt2_124m"))
  c.model.vocab_size = 50304  # 50257, rounded up to a multiple of 128 for the matrix units
  c.model.dtype = "bfloat16"
  c.data.seq_len = 1024
  c.data.batch_size = 512
  c.train.steps = 19_073
  c.optim.accumulate = 8
  c.optim.lr = 6e-4
  c.optim.weight_decay = 0.1
  c.schedule.warmup_steps = 700
  c.eval.every = 1000
  c.checkpoint.every = 1000
  c.mesh.data = -1
  c.mesh.fsdp = 1
  return c
