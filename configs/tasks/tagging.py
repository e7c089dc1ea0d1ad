"""Tags of words, such as the names in a text: a small encoder from scratch, or a pretrained model.

  jaxgpt data --kind=tagging --out=DATA WORDS_AND_TAGS...
  jaxgpt train --config=configs/tasks/tagging.py --config.data.path=DATA \
      --config.model.num_labels=9 --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/tagging.py:RUN. DATA
must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 131 thousand parameters and the vocabulary,
           300 steps of 32 rows of 128 tokens.
"""

from jaxgpt.tasks import recipes


def get_config(arg=""):
  c = recipes.encoder(arg)
  if not arg:
    c.train.steps = 300
  c.model.update(dict(head="token_classifier", head_transform="none", head_bias=True, num_labels=2))
  c.model.label_names = ()
  c.objective.name = "token_classification"
  c.data.seq_len = 128
  c.data.batch_size = 32
  c.eval.every = 100
  return c
