"""A small model of bytes: any one text file, no tokenizer to train.

  jaxgpt data --out=DATA --tokenizer=bytes my_text.txt
  jaxgpt train --config=configs/char_level.py --config.data.path=DATA --workdir=RUN
  jaxgpt generate --workdir=RUN --prompt="Once"

(--tokenizer=sentencepiece:200:char makes tokens of characters instead.) 2 CPU cores: 10.7 million
parameters, 2,048 bytes and about 0.7 s a step. Expect 3.9 bits per byte after the README's 40 steps
on 20 kB of text, and much less on a megabyte after all 1,000; a GPU takes
--config.data.batch_size=64 --config.train.steps=5000 as well.
"""

from jaxgpt import config


def get_config():
  c = config.base()
  c.model.update(
    dict(
      num_layers=6,
      width=384,
      num_heads=6,
      norm="rmsnorm",
      position="rotary",
      activation="relu2",
      bias=False,
      dropout=0.1,
      scan_unroll=6,
    )
  )
  c.data.seq_len = 256
  c.data.batch_size = 8
  c.train.steps = 1000
  c.optim.lr = 1e-3
  c.schedule.warmup_steps = 50
  return c
