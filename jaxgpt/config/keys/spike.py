"""Config keys of `train.spike`: losses at which a run goes back to an earlier checkpoint."""

from jaxgpt.config.keys.conditions import above_0
from jaxgpt.config.schema import AT_LEAST_0, AT_LEAST_1, Interval, Key, Section

SPIKE = Section(
  "Spikes of the loss: the run goes back to a checkpoint and leaves out the batches at fault.",
  dict(
    factor=Key(
      0.0,
      "A loss this many standard deviations above the median of the last losses is a spike. A step "
      "that is not finite is one too. 0: nothing is looked for.",
      interval=AT_LEAST_0,
    ),
    window=Key(
      128,
      "Losses that the median and the deviation are of. Before as many have been seen, only steps "
      "that are not finite are found.",
      interval=Interval(2),
      needs=above_0("train.spike.factor"),
    ),
    patience=Key(
      1,
      "Losses above the limit in a row that make a spike.",
      interval=AT_LEAST_1,
      needs=above_0("train.spike.factor"),
    ),
    before=Key(
      1,
      "Batches before the first loss above the limit that are left out too. The update from the "
      "batch before it made the weights of that loss.",
      interval=AT_LEAST_0,
      needs=above_0("train.spike.factor"),
    ),
    rewinds=Key(
      3,
      "Spikes after which the run goes back at most. It ends at the next one.",
      interval=AT_LEAST_1,
      needs=above_0("train.spike.factor"),
    ),
  ),
  if_changed="at which losses the run goes back",
)
