"""A small model of bytes: any one text file, no tokenizer to train.

  jaxgpt data --out=DATA --tokenizer=bytes my_text.txt
  jaxgpt train --config=configs/char_level.py --config.data.path=DATA --workdir=RUN
  jaxgpt generate --workdir=RUN --prompt="Once"

(--tokenizer=sentencepiece:200:char makes tokens of characters instead.) 2 CPU cores: 10.7 million
parameters, 2,048 bytes a step. On 1 MB of prose expect about 2.2 bits per byte after
1,000 steps; a GPU takes --config.data.batch_size=64 --config.train.steps=5000 as well.
"""

from jaxgpt import config


def get_config():
  c = config.base()
  c.model.update(dict(
      num_layers=6, width=384, num_heads=6, norm="rmsnorm", position="rotary",
      activation="relu2", bias=False, dropout=0.1, scan_unroll=6))
  c.data.seq_len = 256
  c.data.batch_size = 8
  c.train.steps = 1000
  c.optim.lr = 1e-3
  c.schedule.warmup_steps = 50
  return c
