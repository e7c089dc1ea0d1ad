"""Distillation: a model of half the layers learns from a teacher and from the data.

  jaxgpt data --out=DATA --tokenizer=TEACHER/tokenizer TEXT...
  jaxgpt train --config=configs/distillation.py:TEACHER --config.data.path=DATA --workdir=RUN

TEACHER is a run folder, such as one that `jaxgpt import` made. The student may have any other
width and depth: --config.model.width=256. It starts from random weights.

Size:      half the layers of the teacher, 1,000 steps of 16 rows of 512 tokens.
"""

from jaxgpt import config
from jaxgpt.run import run_folder


def get_config(arg=""):
  c = config.base()
  c.data.seq_len = 512
  if arg:
    teacher = run_folder.read_config(arg)
    c.model.update(teacher.model)
    c.model.num_layers = max(teacher.model.num_layers // 2, 1)
    c.model.lora.rank = 0
    c.objective.teacher = arg
    c.data.seq_len = min(c.data.seq_len, teacher.model.max_len)
  c.objective.name = "distillation"
  c.objective.teacher_share = 0.8
  c.data.batch_size = 16
  c.train.steps = 1000
  c.eval.every = 200
  return c
