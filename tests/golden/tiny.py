"""The config file of the golden runs: a model small enough to keep in git."""

from jaxgpt import config


def get_config():
  c = config.base()
  c.model.update(
    dict(
      num_layers=2,
      width=8,
      num_heads=2,
      num_kv_heads=1,
      mlp_width=16,
      norm="rmsnorm",
      position="rotary",
      activation="silu",
      gated=True,
      bias=False,
      dropout=0.1,
    )
  )
  c.data.update(dict(path="data/text", seq_len=32, batch_size=8))
  c.optim.lr = 1e-2
  c.schedule.warmup_steps = 2
  c.train.steps = 8
  c.eval.every = 4
  c.checkpoint.every = 100
  c.log.every = 1
  c.mesh.data = -1
  c.mesh.fsdp = 1
  return c
