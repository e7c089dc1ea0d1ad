"""A small GPT on the source code of Python's standard library, which needs no download.

  make demo    (or: jaxgpt demo --dir=runs/demo)

Size:      4.2 million parameters, 600 steps of 2,048 tokens (a third of an epoch).
Hardware:  2 CPU cores, about 4 minutes.
Result:    about 1.6 bits per byte on the test files. gzip -9 needs 1.97, xz -9 needs 1.71. The
           figures differ a little between Python versions, because the text does.
"""

from jaxgpt import config


def get_config():
  c = config.base()
  c.model.update(
    dict(
      num_layers=4,
      width=256,
      num_heads=4,
      norm="rmsnorm",
      position="rotary",
      activation="relu2",
      bias=False,
      scan_unroll=4,
    )
  )
  c.data.path = "runs/demo/data"
  c.data.seq_len = 256
  c.data.batch_size = 8
  c.train.steps = 600
  c.optim.name = "muon"
  c.optim.lr = 7e-3
  c.optim.adam_lr = 5e-3
  c.schedule.name = "linear"
  c.schedule.warmup_steps = 20
  c.schedule.final_ratio = 0.0
  c.eval.every = 200
  c.eval.batches = 8
  c.checkpoint.every = 200
  return c
