"""Samples text from a run."""

import jax
import numpy as np

from jaxgpt.inference import load, prompts
from jaxgpt.inference import sampling as sampling_lib
from jaxgpt.inference.sampling import Sampling
from jaxgpt.training import uses


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
    uses.check(run.c, "generate")
    self._run, self._num_samples = run, num_samples
    self._context = run.c.data.seq_len
    self._prompts = prompts.Prompts(run)
    self._generate = sampling_lib.make(
      run.parts.model, self._context, run.generation.end_ids, run.tokenizer.vocab_size
    )

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
      seed: Seed of the draws.
      chat: The prompt is a user's message in the run's chat template, and the texts are answers.

    Returns:
      `num_samples` texts, without the prompt.

    Raises:
      UserError: The prompt leaves no room for a new token, or a setting is out of range.
    """
    sampling = load.sampling_defaults(self._run)[0] if sampling is None else sampling
    sampling.check()
    run, tokenizer = self._run, self._run.tokenizer
    message = {"role": "user", "content": prompt}
    ids = self._prompts.chat([message]) if chat else self._prompts.text(prompt)
    self._prompts.check(ids)
    tokens = np.zeros((self._num_samples, self._context), np.int32)
    tokens[:, : len(ids)] = ids
    settings = sampling._replace(top_k=min(sampling.top_k, tokenizer.vocab_size))
    with jax.set_mesh(run.mesh):
      out, lengths = jax.device_get(
        self._generate(
          run.params,
          tokens,
          len(ids),
          min(max_new, self._context - len(ids)),
          jax.random.key(seed),
          settings,
          len(ids),
        )
      )
    return [
      tokenizer.continuation(ids, row[len(ids) : n]) for row, n in zip(out, lengths, strict=True)
    ]
