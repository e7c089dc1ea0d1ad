"""Samples text from a run: prompts in, whole texts out."""

from jaxgpt.inference import load, prompts
from jaxgpt.inference.engine.engine import Engine
from jaxgpt.inference.engine.requests import Request
from jaxgpt.inference.sampling import Sampling

_MOST_ROWS = 8  # texts that are drawn together


class Sampler:
  """Samples text from a run, compiled once for all prompts and settings."""

  def __init__(self, run: load.Run, num_samples: int = 1):
    """Prepares a sampler.

    Args:
      run: From `load`.
      num_samples: Number of texts per call.

    Raises:
      UserError: The model cannot continue a text, see `uses`.
    """
    self._run, self._num_samples = run, num_samples
    self._prompts = prompts.Prompts(run)
    self._engine = Engine(run, max_rows=min(num_samples, _MOST_ROWS))

  def __call__(
    self,
    prompt: str,
    max_new: int = 200,
    sampling: Sampling | None = None,
    seed: int = 0,
    chat: bool = False,
  ) -> list[str]:
    """Continues a prompt.

    Args:
      prompt: Text. May be empty.
      max_new: Largest number of new tokens. The context is the other limit.
      sampling: How tokens are drawn. None: as in `sampling_defaults`.
      seed: Seed of the first text's draws. That of each further one is higher by 1.
      chat: The prompt is a user's message in the run's chat template, and the texts are answers.

    Returns:
      `num_samples` texts, without the prompt.

    Raises:
      UserError: The prompt leaves no room for a new token, or a setting is out of range.
    """
    sampling = load.sampling_defaults(self._run)[0] if sampling is None else sampling
    message = {"role": "user", "content": prompt}
    ids = tuple(self._prompts.chat([message]) if chat else self._prompts.text(prompt))
    wanted = [Request(ids, max_new, sampling, seed + i) for i in range(self._num_samples)]
    return [text for text, _ in self._engine.texts(wanted)]
