"""Config keys of logs: metric writers, traces, hangs."""

from jaxgpt.config import checks
from jaxgpt.config.keys.conditions import above_0
from jaxgpt.config.keys.training import user_options
from jaxgpt.config.schema import AT_LEAST_0, AT_LEAST_1, Key, Section

_SAMPLES = Section(
  "Texts that the model writes as training goes on: samples.jsonl of the run folder, and trackers.",
  dict(
    every=Key(0, "Steps between samples. 0: none.", interval=AT_LEAST_0),
    prompts=Key(
      ("",),
      "The texts to continue, one sample each. An empty one is the beginning of a document.",
      check=checks.texts,
      needs=above_0("log.samples.every"),
    ),
    max_new=Key(
      64, "Most tokens of a sample.", interval=AT_LEAST_1, needs=above_0("log.samples.every")
    ),
    temperature=Key(
      0.8,
      "Divides the logits. 0: always the likeliest token. The seed is that of the run, the same "
      "at each step.",
      interval=AT_LEAST_0,
      needs=above_0("log.samples.every"),
    ),
  ),
)

LOG = Section(
  "Metrics during training.",
  dict(
    every=Key(
      10, "Steps between log lines. Metrics are means over these steps.", interval=AT_LEAST_1
    ),
    hang_minutes=Key(
      30.0,
      "Print the stacks of all threads on standard error if a step or a batch of an evaluation "
      "takes longer than this. 0: never.",
      interval=AT_LEAST_0,
    ),
    tensorboard=Key(False, "Also write TensorBoard event files. Needs the extra [track]."),
    csv=Key(False, "Also write metrics.csv: a line per number, with step, kind, metric and value."),
    wandb=Key(
      "",
      "Also log to this project of Weights & Biases. Needs the extra [wandb]. WANDB_MODE=offline "
      "keeps the log in the run folder. Empty: not used.",
    ),
    mlflow=Key(
      "",
      "Also log to this tracking store of MLflow: a folder such as file:mlruns, a server, "
      "or sqlite:///mlflow.db (with SQLAlchemy). Needs the extra [mlflow]. Empty: not used.",
    ),
    profile_steps=Key(
      (),
      "(first, last): write a trace of these steps to the folder `profile` of the run, for XProf, "
      "TensorBoard and Perfetto. (): none.",
      check=checks.profile_steps,
    ),
    samples=_SAMPLES,
    options=user_options("metric writer"),
  ),
  free_on_resume=True,
)
