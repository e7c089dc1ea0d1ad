"""Texts that a causal language model writes after a prompt. B rows, S cache slots."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.inference import load, sampling
from jaxgpt.inference.prompts import Prompts
from jaxgpt.tasks.predict import batching
from jaxgpt.tasks.predict.devices import Devices
from jaxgpt.tasks.predict.protocol import Prediction, Settings
from jaxgpt.tasks.predict.rows import Row
from jaxgpt.training import uses
from jaxgpt.tree import PyTree


class Texts:
  """Texts that a causal language model writes after a prompt."""

  def __init__(self, run: load.Run, kind: str, settings: Settings):
    self.kind, self._run, self._settings = kind, run, settings
    self._devices = Devices(run.mesh)
    uses.check(run.c, "generate")
    self._prompts = Prompts(run)
    self._compiled: dict[int, Callable[..., Any]] = {}

  def prompt_ids(self, fields: Any) -> list[int]:
    """The ids of a row's prompt, as the run's documents begin.

    Raises:
      UserError: The chat template refuses the messages.
    """
    tokenizer = self._run.tokenizer
    if self.kind == "seq2seq":
      return [tokenizer.bos_id, *tokenizer.encode(fields["input"] + "\n")]
    if self.kind == "chat":
      messages = list(fields["messages"])
      if messages and messages[-1].get("role") == "assistant":  # the answer to compare with
        messages.pop()
      return self._prompts.chat(messages)
    return self._prompts.text(fields["text"])

  def __call__(
    self, params: PyTree, rows: Sequence[Row], chunk: int = 0
  ) -> list[Prediction | UserError]:
    context, tokenizer = self._run.c.data.seq_len, self._run.tokenizer
    prompts, out = [], list[Prediction | UserError]()
    for row in rows:
      try:
        ids = self.prompt_ids(row.fields)
        tokenizer.check_rows(ids, self._run.c.model.vocab_size)
        if len(ids) >= context:
          raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context {context} (data.seq_len): no "
            "room for a new token"
          )
      except UserError as e:
        ids = []
        out.append(e)
      else:
        out.append({})
      prompts.append(ids)
    there = [i for i, ids in enumerate(prompts) if ids]
    for number, text in self._texts(params, [prompts[i] for i in there], chunk):
      out[there[number]] = {"text": text}
    return out

  def _texts(
    self, params: PyTree, prompts: Sequence[list[int]], chunk: int
  ) -> list[tuple[int, str]]:
    """(number, text) for each prompt."""
    s, d, context = self._settings, self._devices, self._run.c.data.seq_len
    top_k = min(s.sampling.top_k, self._run.tokenizer.vocab_size)
    key = jax.random.fold_in(jax.random.key(s.seed), chunk)
    found = []
    with jax.set_mesh(d.mesh):
      planned = batching.steps([len(ids) for ids in prompts], s.rows, d.shards, context)
      for number, step in enumerate(planned):
        slots = min(step.length + s.max_new, context)
        tokens_BS = np.zeros((d.shards * s.rows, slots), np.int32)
        lengths_B = np.ones(len(tokens_BS), np.int32)
        places = {
          shard * s.rows + place: i
          for shard, numbers in enumerate(step.batches)
          for place, i in enumerate(numbers)
        }
        for at, i in places.items():
          tokens_BS[at, : len(prompts[i])] = prompts[i]
          lengths_B[at] = len(prompts[i])
        # Rows of padding are done at once.
        room_B = np.where(np.isin(np.arange(len(tokens_BS)), list(places)), s.max_new, 0)
        batch = d.put({"tokens": tokens_BS, "lengths": lengths_B, "room": room_B.astype(np.int32)})
        settings = s.sampling._replace(top_k=top_k)
        result = self._generate(slots)(
          params,
          batch["tokens"],
          batch["lengths"],
          batch["room"],
          jax.random.fold_in(key, number),
          settings,
          batch["lengths"],
        )
        tokens_BS, ends_B = d.get(result)
        for at, i in places.items():
          new = tokens_BS[at, len(prompts[i]) : ends_B[at]]
          found.append((i, self._run.tokenizer.continuation(prompts[i], new)))
    return found

  def _generate(self, slots: int) -> Callable[..., Any]:
    """The compiled sampler of a number of cache slots."""
    if slots not in self._compiled:
      run = self._run
      self._compiled[slots] = self._devices.jit(
        sampling.make(run.parts.model, slots, run.generation.end_ids, run.tokenizer.vocab_size)
      )
    return self._compiled[slots]
