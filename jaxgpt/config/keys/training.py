"""Config keys of training: data, objective, optimizer, schedule, evaluation, checkpoints."""

from jaxgpt.config import checks
from jaxgpt.config.keys import conditions, spike
from jaxgpt.config.keys.conditions import (
  STARTS_FROM_WEIGHTS,
  WHOLE_WEIGHTS,
  above_0,
  one_of,
  set_to_something,
)
from jaxgpt.config.schema import (
  ABOVE_0,
  AT_LEAST_0,
  AT_LEAST_1,
  BELOW_1,
  FRACTION,
  OF_DATA,
  Key,
  Section,
)


def most_overlap(seq_len: int) -> int:
  """The largest `data.overlap`: a question has at most half of a row, and each window goes on."""
  return seq_len - seq_len // 2 - 2


DATA = Section(
  "Training data: prepared folders or a stream, and how documents become batches.",
  dict(
    path=Key(
      "",
      "Folder written by `jaxgpt data`. Several folders, separated by commas, form a mixture.",
      free_on_resume=True,
    ),
    weights=Key(
      (),
      "Share of the rows from each folder of the mixture. (): in proportion to their rows.",
      check=checks.data_weights,
      needs=conditions.SEVERAL_FOLDERS,
    ),
    weight_changes=Key(
      (),
      "A curriculum: ((step, weights), ...), each with the weights from that step on.",
      check=checks.data_weight_changes,
      needs=conditions.SEVERAL_FOLDERS,
    ),
    stream=Key(
      "",
      "Files to read and tokenize during training, in place of the training split of `path`. "
      "Addresses as for `jaxgpt data`, separated by commas.",
    ),
    stream_field=Key(
      "text",
      "Streams: the column that holds the text, in files with columns.",
      needs=set_to_something("data.stream"),
    ),
    stream_window=Key(
      512,
      "Streams: rows of a reader that are packed and shuffled together.",
      interval=AT_LEAST_1,
      needs=set_to_something("data.stream"),
    ),
    stream_readers=Key(
      0,
      "Streams: readers that share the files and the rows of each batch. A run goes on with each "
      "number of hosts that divides them. 0 means one for each host on which the run begins.",
      interval=AT_LEAST_0,
      needs=set_to_something("data.stream"),
    ),
    seq_len=Key(
      256,
      "Tokens per row (T).",
      interval=AT_LEAST_1,
      stored=True,
    ),
    batch_size=Key(
      8,
      "Rows per step, over all hosts and accumulation steps (global B).",
      interval=AT_LEAST_1,
    ),
    stages=Key(
      (),
      "((steps, batch_size, seq_len), ...): first steps with another batch size or length of rows, "
      "before those with `batch_size` and `seq_len`.",
      check=checks.data_stages,
    ),
    packing=Key(
      "best_fit",
      "How documents fill the rows.",
      choices={
        "best_fit": "whole documents together",
        "concat": "one stream of tokens, cut into rows",
        "one_per_row": "one document per row",
      },
      needs=one_of(
        "objective.name", "causal_lm", "masked_lm", "token_classification", "distillation"
      ),
      stored=True,
    ),
    overlap=Key(
      None,
      "question_answering: tokens that consecutive windows of a long passage share.",
      value_type=int,
      derive=lambda c: max(min(c.data.seq_len // 3, most_overlap(c.data.seq_len)), 0),
      unset="a third of `data.seq_len`",
      interval=AT_LEAST_0,
      needs=one_of("objective.name", "question_answering"),
    ),
    shuffle=Key(True, "Permute the rows in each epoch, seeded by `seed`."),
    threads=Key(4, "Reader threads per host.", interval=AT_LEAST_1, free_on_resume=True),
    prefetch=Key(4, "Batches kept ready per host.", interval=AT_LEAST_1, free_on_resume=True),
  ),
  fixed=OF_DATA,
)


def user_options(kind: str, if_changed: str = "") -> Section:
  return Section(
    f"Options of {kind}s that you define: any keys with plain values.",
    {},
    user_keys=True,
    if_changed=if_changed,
  )


_OF_STATE = "the optimizer's state in the checkpoint belongs to the old value"
_MOMENT_DTYPES = {"float32": "", "bfloat16": ""}

OPTIM = Section(
  "The optimizer, gradient accumulation, and which parameters it updates.",
  dict(
    name=Key(
      "adamw",
      "Optimizer, or FILE.py:NAME for your own.",
      registered=True,
      fixed=_OF_STATE,
    ),
    lr=Key(
      1e-3,
      "Peak learning rate.",
      interval=AT_LEAST_0,
      if_changed="the learning rate",
    ),
    adam_lr=Key(
      None,
      "muon: peak learning rate of the parameters that adamw updates.",
      value_type=float,
      derive=lambda c: c.optim.lr,
      unset="`optim.lr`",
      interval=AT_LEAST_0,
      needs=one_of("optim.name", "muon"),
      if_changed="the learning rate of the parameters that adamw updates",
    ),
    b1=Key(
      0.9,
      "Decay of the first moment: adamw (also for the rest under muon) and lion.",
      interval=BELOW_1,
      needs=one_of("optim.name", "adamw", "lion", "muon"),
      if_changed="the decay of the first moment",
    ),
    b2=Key(
      0.95,
      "Decay of the second moment (of the momentum in lion). adafactor has its own.",
      interval=BELOW_1,
      needs=one_of("optim.name", "adamw", "lion", "muon"),
      if_changed="the decay of the second moment",
    ),
    eps=Key(
      1e-8,
      "Added to the root of the second moment: adamw, also for the rest under muon.",
      interval=ABOVE_0,
      needs=one_of("optim.name", "adamw", "muon"),
      if_changed="the division by the second moment",
    ),
    first_dtype=Key(
      "float32",
      "dtype of the first moment: adamw, lion, muon.",
      choices=_MOMENT_DTYPES,
      fixed=_OF_STATE,
    ),
    second_dtype=Key(
      "float32",
      "dtype of the second moment: adamw. bfloat16 needs `optim.b2` <= 0.98.",
      choices=_MOMENT_DTYPES,
      fixed=_OF_STATE,
    ),
    muon_momentum=Key(
      0.95,
      "muon: decay of the momentum that is orthogonalized.",
      interval=BELOW_1,
      needs=one_of("optim.name", "muon"),
      if_changed="the decay of the momentum",
    ),
    weight_decay=Key(
      0.1,
      "Decoupled weight decay, times the learning rate. On matrices, not on norms and biases.",
      interval=AT_LEAST_0,
      if_changed="weight decay",
    ),
    clip_norm=Key(
      1.0,
      "Gradients are scaled down to this global norm. 0: no clipping.",
      interval=AT_LEAST_0,
      if_changed="clipping of gradients",
    ),
    qk_clip=Key(
      0.0,
      "QK-clip (MuonClip, arXiv:2507.20534): after a step, weights of queries and keys of heads "
      "whose largest attention logit was above this are scaled down to it. 0: no clipping.",
      interval=AT_LEAST_0,
      if_changed="QK-clip",
    ),
    skip_nonfinite=Key(
      0,
      "Steps in a row that are skipped at most if their loss or gradient is not finite. The run "
      "ends at the next one, and with 0 at the first.",
      interval=AT_LEAST_0,
      if_changed="what happens at steps that are not finite",
    ),
    trainable=Key(
      (),
      'Patterns of the parameters to train, such as "layers/*". (): all, or only the adapters with '
      "LoRA.",
      check=checks.patterns,
      fixed=_OF_STATE,
    ),
    frozen=Key(
      (),
      "Patterns of parameters that stay fixed although `trainable` matches them.",
      check=checks.patterns,
      fixed=_OF_STATE,
    ),
    keep_zeros=Key(
      False,
      "Weights that are zero stay zero: what `jaxgpt prune` removed stays removed.",
      needs=STARTS_FROM_WEIGHTS,
      if_changed="which weights are trained",
    ),
    prune=Section(
      "Gradual pruning by magnitude during training. Weights that were pruned stay zero.",
      dict(
        sparsity=Key(
          0.0,
          "Share of zeros in each matrix of a layer in the end. 0: no pruning.",
          interval=BELOW_1,
          needs=WHOLE_WEIGHTS,
          fixed=_OF_STATE,
        ),
        start=Key(
          0,
          "Step at which pruning starts.",
          interval=AT_LEAST_0,
          needs=above_0("optim.prune.sparsity"),
          if_changed="when weights are pruned",
        ),
        end=Key(
          None,
          "Step at which `sparsity` is reached, by a cubic schedule (arXiv:1710.01878).",
          value_type=int,
          derive=lambda c: max(1, c.train.steps // 2) if c.optim.prune.sparsity else None,
          unset="half of `train.steps`",
          interval=AT_LEAST_1,
          needs=above_0("optim.prune.sparsity"),
          if_changed="when weights are pruned",
        ),
        every=Key(
          100,
          "Steps between two prunings.",
          interval=AT_LEAST_1,
          needs=above_0("optim.prune.sparsity"),
          if_changed="when weights are pruned",
        ),
      ),
    ),
    layer_decay=Key(
      1.0,
      "Learning rate of a layer relative to the next layer's. Embeddings count as the layer "
      "before the first.",
      interval=ABOVE_0,
      if_changed="the learning rates of layers",
    ),
    lr_scales=Key(
      (),
      "((pattern, factor), ...): factors on the learning rate of matching parameters. The first "
      "match counts.",
      check=checks.optim_lr_scales,
      if_changed="the learning rates of the parameters that match",
    ),
    accumulate=Key(
      1,
      "Microbatches per step. Their gradients are summed before the one update.",
      interval=AT_LEAST_1,
      if_changed="the order of sums: losses differ by rounding",
    ),
    ema=Key(
      0.0,
      "Decay of the moving average of the weights, which evaluation then uses. 0: no average.",
      interval=BELOW_1,
      if_changed="the decay of the moving average",
    ),
    ema_debias=Key(
      False,
      "Leave the initial weights out of the average, as Adam corrects its moments. False: after N "
      "steps they are `ema`^N of it.",
      needs=above_0("optim.ema"),
      fixed="the average so far was made with the old value",
    ),
    options=user_options("optimizer", if_changed="the options of your optimizer"),
  ),
)

SCHEDULE = Section(
  "The learning rate over the run.",
  dict(
    name=Key(
      "cosine",
      "Schedule after warmup, or FILE.py:NAME for your own.",
      registered=True,
    ),
    warmup_steps=Key(
      100, "Steps of linear warmup. The step after them has the peak rate.", interval=AT_LEAST_0
    ),
    decay_fraction=Key(
      0.2,
      "wsd: last fraction of the run, in which the rate falls.",
      interval=FRACTION,
      needs=one_of("schedule.name", "wsd"),
    ),
    final_ratio=Key(
      0.1,
      "cosine, linear, wsd: last rate as a fraction of the peak.",
      interval=FRACTION,
      needs=one_of("schedule.name", "cosine", "linear", "wsd"),
    ),
    options=user_options("schedule"),
  ),
  if_changed="the learning rate is that of the new schedule at the run's step",
)

TRAIN = Section(
  "The length of training.",
  dict(
    steps=Key(
      1000,
      "Optimizer steps.",
      interval=AT_LEAST_1,
      if_changed="the run ends at the new step, and schedules have the new length",
    ),
    spike=spike.SPIKE,
  ),
)

EVAL = Section(
  "Evaluation on the validation split.",
  dict(
    every=Key(250, "Steps between evaluations. 0: only at the end.", interval=AT_LEAST_0),
    batches=Key(
      20,
      "Batches per evaluation during training. 0: the whole split.",
      interval=AT_LEAST_0,
      needs=above_0("eval.every"),
    ),
    batch_size=Key(
      None,
      "Rows per batch.",
      value_type=int,
      derive=lambda c: c.data.batch_size,
      unset="`data.batch_size`",
      interval=AT_LEAST_1,
    ),
    tasks=Key(
      "",
      "Tasks of EleutherAI's harness, separated by commas, that each evaluation also runs. Empty: "
      "none.",
    ),
    tasks_path=Key(
      "",
      "Folder with more tasks, as YAML files.",
      needs=set_to_something("eval.tasks"),
    ),
    tasks_limit=Key(
      100,
      "Examples of each task per evaluation, the first ones. 0: all.",
      interval=AT_LEAST_0,
      needs=set_to_something("eval.tasks"),
    ),
    patience=Key(
      0,
      "End the run after this many evaluations in a row without a better `checkpoint.best`. 0: "
      "never.",
      interval=AT_LEAST_0,
      needs=set_to_something("checkpoint.best"),
    ),
  ),
  free_on_resume=True,
)

TASK = Section(
  "A task whose metrics each evaluation also computes, on rows of a file.",
  dict(
    name=Key(
      "",
      "Task, such as summarization, or FILE.py:NAME for your own. Its metrics are called task/… "
      "in the log. Empty: none.",
    ),
    data=Key(
      "",
      "Files of rows with answers, as for `jaxgpt data`, separated by commas. Not those that the "
      "run is trained on.",
      needs=set_to_something("task.name"),
    ),
    fields=Key(
      (),
      "NAME=COLUMN for columns of `data` that are not called like the field, as `--field` of "
      "`jaxgpt data`.",
      check=checks.fields,
      needs=set_to_something("task.name"),
    ),
    format=Key(
      "",
      "Format of `data`, as `--format` of `jaxgpt data`. Empty: by the suffix.",
      needs=set_to_something("task.name"),
    ),
    rows=Key(
      500,
      "Rows per evaluation, a random sample of the files that is always the same. 0: all.",
      interval=AT_LEAST_0,
      needs=set_to_something("task.name"),
    ),
    batch_size=Key(
      32,
      "Rows of a batch on each device.",
      interval=AT_LEAST_1,
      needs=set_to_something("task.name"),
    ),
    max_new=Key(
      200,
      "Most tokens of a generated text.",
      interval=AT_LEAST_1,
      needs=set_to_something("task.name"),
    ),
  ),
  free_on_resume=True,
)

CHECKPOINT = Section(
  "Checkpoints in the run folder.",
  dict(
    every=Key(
      500, "Steps between checkpoints. The last step is always saved.", interval=AT_LEAST_1
    ),
    every_minutes=Key(
      0.0,
      "Also save when this many minutes have passed since the last checkpoint began. 0: only by "
      "steps.",
      interval=AT_LEAST_0,
    ),
    on_failure=Key(
      "continue",
      "What a run does when a checkpoint cannot be written. Either way it says so and tries again "
      "with growing pauses. Several processes always end.",
      choices={
        "continue": "train on, and try again until it works",
        "stop": "end with exit code 75 or 2 after 5 failures in a row",
      },
    ),
    keep=Key(2, "Newest checkpoints to keep.", interval=AT_LEAST_1),
    keep_every=Key(
      0,
      "Also keep every checkpoint whose step is a multiple of this. 0: none.",
      interval=AT_LEAST_0,
    ),
    best=Key(
      "",
      "Also keep the weights of the evaluation with the best value of this metric, such as loss, "
      "accuracy or task/rougeL. `--step=best` uses them. Empty: none.",
    ),
  ),
  free_on_resume=True,
)
