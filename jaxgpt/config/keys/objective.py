"""Config keys of the objective and the loss."""

from jaxgpt.config.keys import conditions
from jaxgpt.config.keys.conditions import one_of, set_to_something
from jaxgpt.config.keys.training import user_options
from jaxgpt.config.schema import (
  ABOVE_0,
  AT_LEAST_0,
  AT_LEAST_1,
  BELOW_1,
  FRACTION,
  Interval,
  Key,
  Section,
)

_MASKED_LM = one_of("objective.name", "masked_lm")
_DISTILLATION = one_of("objective.name", "distillation")

OBJECTIVE = Section(
  "The training objective and the loss.",
  dict(
    name=Key(
      "causal_lm",
      "Objective, or FILE.py:NAME for your own.",
      registered=True,
      values_need={"masked_lm": one_of("model.causal", False)},
      stored=True,
    ),
    loss=Key(
      "dpo",
      "preference: the loss of a pair of answers.",
      choices={
        "dpo": "likelihoods of whole answers, relative to the reference",
        "dpo_norm": "the same per token",
        "ipo": "a squared distance from a fixed gain, per token",
        "orpo": "cross entropy and odds ratio, without a reference",
        "simpo": "likelihoods per token with a margin, without a reference",
      },
      needs=one_of("objective.name", "preference"),
    ),
    beta=Key(
      0.1,
      "preference: weight of staying close to the reference, the model before the first step "
      "(without adapters). Smaller values let the model move further away. orpo: weight of the "
      "odds ratio. simpo: scale of the likelihoods, such as 2.0.",
      interval=ABOVE_0,
      needs=one_of("objective.name", "preference"),
      if_changed="the loss",
    ),
    gamma=Key(
      0.5,
      "simpo: margin by which the chosen answer should be better.",
      interval=AT_LEAST_0,
      needs=one_of("objective.loss", "simpo"),
      if_changed="the loss",
    ),
    teacher=Key(
      "",
      "distillation: run folder or Hugging Face folder of the model to learn from, with the same "
      "vocabulary.",
      needs=_DISTILLATION,
    ),
    teacher_config=Key(
      "",
      "distillation: the teacher's architecture as JSON. Training fills it in.",
      needs=_DISTILLATION,
    ),
    teacher_share=Key(
      0.5,
      "distillation: weight of the teacher's predictions in the loss. The data's have the rest.",
      interval=Interval(0, 1, open_low=True),
      needs=_DISTILLATION,
      if_changed="the loss",
    ),
    temperature=Key(
      1.0,
      "distillation: divides the logits of both models. Above 1, unlikely tokens count more.",
      interval=ABOVE_0,
      needs=_DISTILLATION,
      stored=True,
    ),
    stored=Key(
      "",
      "Folder for what the reference (preference) or the teacher (distillation) says of each row. "
      "It is computed once before the first step, and used by later runs with the same data, rows "
      "and model. Empty: the model stays in memory and is asked in each step.",
      needs=conditions.FIXED_MODEL,
    ),
    top_k=Key(
      32,
      "distillation with `stored`: tokens per position whose probabilities are kept. All others "
      "are one outcome.",
      interval=AT_LEAST_1,
      needs=set_to_something("objective.stored"),
      stored=True,
    ),
    divergence=Key(
      "forward",
      "distillation: which divergence from the teacher.",
      choices={
        "forward": "KL(teacher || student), which covers all that the teacher expects",
        "reverse": "KL(student || teacher), which avoids what the teacher does not expect",
      },
      needs=_DISTILLATION,
    ),
    mask_rate=Key(
      0.15,
      "masked_lm: fraction of tokens to predict.",
      interval=Interval(0, 1, open_low=True),
      needs=_MASKED_LM,
      if_changed="the masks",
    ),
    mask_replace=Key(
      0.8,
      "masked_lm: fraction of these that the mask token replaces.",
      interval=FRACTION,
      needs=_MASKED_LM,
      if_changed="the masks",
    ),
    mask_random=Key(
      0.1,
      "masked_lm: fraction of these that a random token replaces. The others stay.",
      interval=FRACTION,
      needs=_MASKED_LM,
      if_changed="the masks",
    ),
    mask_whole_words=Key(
      False, "masked_lm: choose whole words, with all of their tokens.", needs=_MASKED_LM
    ),
    similarity_temperature=Key(
      0.05,
      "contrastive: cosine similarities are divided by this.",
      interval=ABOVE_0,
      needs=one_of("objective.name", "contrastive"),
      if_changed="the loss",
    ),
    symmetric=Key(
      False,
      "contrastive: also find the query of each positive.",
      needs=one_of("objective.name", "contrastive"),
      if_changed="the loss",
    ),
    loss_chunk=Key(
      0,
      "causal_lm, masked_lm: tokens per device whose logits are in memory at once, such as 2048. "
      "0: all.",
      interval=AT_LEAST_0,
      free_on_resume=True,
    ),
    z_loss=Key(
      0.0,
      "Weight of log(Z)^2, which keeps the normalizer Z of the softmax near 1 (PaLM: 1e-4).",
      interval=AT_LEAST_0,
      needs=one_of("objective.name", "causal_lm", "masked_lm"),
      if_changed="the loss",
    ),
    label_smoothing=Key(
      0.0,
      "Share of the target distribution that is spread over all tokens or classes.",
      interval=BELOW_1,
      needs=conditions.SMOOTHED,
      if_changed="the loss",
    ),
    options=user_options("objective", if_changed="the options of your objective"),
  ),
  fixed="it would be another training; start one with --config.init_from=RUN",
)
