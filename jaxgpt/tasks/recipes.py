"""Where the recipes of `configs/tasks/` start: the model of a run, or a small one from scratch.

A recipe's file then sets its objective, its data and, from scratch, its steps.
"""

import ml_collections

from jaxgpt import config
from jaxgpt.run import run_folder


def encoder(run: str = "", *, num_layers: int = 2, width: int = 64) -> ml_collections.ConfigDict:
  """A config for tasks that read texts: from a run, or with a small encoder from scratch.

  Args:
    run: Run folder, which may be imported. Its model, which may be a decoder, is fine-tuned. Empty:
      random weights.
    num_layers: Layers of the model from scratch.
    width: Its width.

  Raises:
    UserError: The folder holds no run.
  """
  c = _start(run, num_layers, width)
  if run:
    c.optim.lr = 3e-5
    c.optim.weight_decay = 0.01
    c.schedule.warmup_steps = 100
  else:
    c.model.causal = False
    c.optim.lr = 3e-3
    c.schedule.warmup_steps = 20
  return c


def decoder(run: str = "", *, num_layers: int = 2, width: int = 128) -> ml_collections.ConfigDict:
  """A config for tasks that write texts: from a run, or with a small decoder from scratch.

  Args:
    run: Run folder, which may be imported. Its model is fine-tuned. Empty: random weights.
    num_layers: Layers of the model from scratch.
    width: Its width.

  Raises:
    UserError: The folder holds no run.
  """
  c = _start(run, num_layers, width)
  c.schedule.warmup_steps = 50
  if run:
    c.optim.lr = 2e-5
    c.optim.weight_decay = 0.0
  else:
    c.optim.lr = 3e-3
  return c


def _start(run: str, num_layers: int, width: int) -> ml_collections.ConfigDict:
  c = config.base()
  if run:
    c.model.update(run_folder.read_config(run).model)
    c.init_from = run
    c.train.steps = 1000
  else:
    c.model.update(
      dict(
        num_layers=num_layers,
        width=width,
        num_heads=4,
        norm="rmsnorm",
        position="rotary",
        activation="silu",
        gated=True,
        bias=False,
      )
    )
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c
