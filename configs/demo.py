"""A small GPT on the Python standard library: the main job in five minutes, nothing to download.

  make demo    (or: jaxgpt demo --dir=runs/demo)

2 CPU cores.
"""

from jaxgpt import config


def get_config():
  c = config.base()
  c.model.update(dict(
      num_layers=4, width=256, num_heads=4, norm="rmsnorm", position="rotary",
      activation="relu2", bias=False))
  c.data.path = "runs/demo/data"
  c.data.seq_len = 256
  c.data.batch_size = 16
  c.train.steps = 300
  c.optim.lr = 3e-3
  c.schedule.warmup_steps = 20
  return c
