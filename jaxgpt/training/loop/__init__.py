"""The training loop: trains a config and leaves a run folder.

`start` makes everything that a run needs, `steps` trains it.
"""

from jaxgpt.training.loop.start import train
from jaxgpt.training.loop.steps import Outcome

__all__ = ["Outcome", "train"]
