"""A small language model of bytes, from any text file, without training a tokenizer.

  jaxgpt data --out=DATA --tokenizer=bytes my_text.txt
  jaxgpt train --config=configs/char_level.py --config.data.path=DATA --workdir=RUN
  jaxgpt generate --workdir=RUN --prompt="Once"

Size:      10.7 million parameters, 1,000 steps of 2,048 bytes.
Hardware:  2 CPU cores take about 0.7 s per step, so 12 minutes. On a GPU, train longer:
           --config.data.batch_size=64 --config.train.steps=5000.
Result:    about 3.9 bits per byte after 40 steps on 20 kB of text, and much less on a megabyte
           after all 1,000.

With --tokenizer=sentencepiece:200:char the tokens are characters instead of bytes.
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
