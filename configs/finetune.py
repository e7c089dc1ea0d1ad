"""Fine-tuning: continues from the weights of a run, such as one that `jaxgpt import` made.

  jaxgpt data --out=DATA --tokenizer=RUN/tokenizer TEXT...
  jaxgpt train --config=configs/finetune.py:RUN --config.data.path=DATA --workdir=NEW

DATA must be tokenized with the run's own tokenizer, as above.

Size:      that of the run, 1,000 steps of 16 rows of 512 tokens.
"""

from jaxgpt import config
from jaxgpt.run import run_folder


def get_config(arg=""):
  c = config.base()
  c.data.seq_len = 512
  if arg:
    run = run_folder.read_config(arg)
    c.model.update(run.model)
    c.init_from = arg
    c.data.seq_len = min(c.data.seq_len, run.model.max_len)
    if run.model.head != "lm" or not run.model.causal:
      c.objective.name = run.objective.name
  c.data.batch_size = 16
  c.optim.lr = 2e-5
  c.optim.weight_decay = 0.0
  c.schedule.name = "linear"
  c.schedule.warmup_steps = 50
  c.train.steps = 1000
  c.eval.every = 200
  return c
