"""Prompts: texts and conversations as the token ids that a run's model continues."""

import functools
from collections.abc import Sequence

from jaxgpt.errors import UserError
from jaxgpt.inference.load import Run
from jaxgpt.text.tokenizers import chat_template, examples
from jaxgpt.text.tokenizers.base import Message
from jaxgpt.text.tokenizers.jinja_template import Tools


class Prompts:
  """Encodes prompts for a run."""

  def __init__(self, run: Run):
    """Prepares the encoder. `run` is from `load.load`."""
    self._run = run

  def text(self, prompt: str) -> list[int]:
    """The ids of a text to continue.

    They begin as the run's documents do: with bos after training on texts, as the chat template
    begins after training on conversations, and as the tokenizer encodes a text for a model that was
    imported.
    """
    run, tokenizer = self._run, self._run.tokenizer
    ids = tokenizer.encode(prompt)
    if run.generation.template:
      begins = self.template.begins_with_bos()
    else:
      begins = bool(run.data_digest) or tokenizer.adds_bos
    return [tokenizer.bos_id, *ids] if begins or not ids else ids

  def chat(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
    """The ids of a conversation up to where the assistant's answer begins.

    Args:
      messages: See `chat_template.Template`.
      tools: JSON schemas of the tools that the assistant may call, see there.

    Raises:
      UserError: The run has no chat template, or the template refuses the messages or the tools.
    """
    template = self.template
    pieces = template(messages, generate=True, tools=tools)
    return examples.encode_pieces(pieces, self._run.tokenizer, template.in_one_go)

  @functools.cached_property
  def template(self) -> chat_template.Template:
    """The chat template that the run was trained in, or else the tokenizer's own.

    Raises:
      UserError: There is none.
    """
    run = self._run
    if not run.generation.template and not run.tokenizer.chat_template:
      raise UserError(
        "this run has no chat template: it was not trained on conversations, and its tokenizer "
        "came without one; give a text to continue, without --chat"
      )
    return chat_template.load(
      run.generation.template_name or chat_template.OWN, run.tokenizer, run.generation.template
    )

  def check(self, ids: Sequence[int]) -> None:
    """Checks that a prompt leaves room for a new token, and that the model has all its tokens.

    Args:
      ids: From `text` or `chat`.

    Raises:
      UserError: It does not.
    """
    c = self._run.c
    self._run.tokenizer.check_rows(ids, c.model.vocab_size)
    if len(ids) >= c.data.seq_len:
      raise UserError(
        f"the prompt has {len(ids)} tokens, the model's context {c.data.seq_len} (data.seq_len): "
        f"shorten it by at least {len(ids) - c.data.seq_len + 1}"
      )
