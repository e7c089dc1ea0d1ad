"""Prompts: texts and conversations as the token ids that a run's model continues."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.inference.load import Run
from jaxgpt.text.tokenizers import chat_template, examples
from jaxgpt.text.tokenizers.base import Message
from jaxgpt.text.tokenizers.jinja_template import Tools


class Prompts:
  """Encodes prompts for a run."""

  def __init__(self, run: Run, variables: Mapping[str, Any] | None = None):
    """Prepares the encoder.

    Args:
      run: From `load.load`.
      variables: Variables of the chat template for all conversations that do not set them, such as
        {'enable_thinking': False}.
    """
    self._run, self._variables = run, dict(variables or {})

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

  def chat(
    self,
    messages: Sequence[Message],
    tools: Tools | None = None,
    variables: Mapping[str, Any] | None = None,
  ) -> list[int]:
    """The ids of a conversation up to where the assistant's answer begins.

    Args:
      messages: See `chat_template.Template`.
      tools: JSON schemas of the tools that the assistant may call, see there.
      variables: Variables of the template for this conversation, see there.

    Raises:
      UserError: The run has no chat template, or the template refuses the messages, the tools or a
        variable.
    """
    template = self.template
    pieces = template(messages, generate=True, tools=tools, variables=variables)
    return examples.encode_pieces(pieces, self._run.tokenizer, template.in_one_go)

  def row(self, fields: Mapping[str, Any]) -> list[int]:
    """The ids of a row of kind chat, with its tools and the variables of its template.

    Args:
      fields: 'messages', whose last one is left out if it is the assistant's, and optionally
        'tools' and 'chat_template_kwargs'.

    Raises:
      UserError: See `chat`.
    """
    messages = list(fields["messages"])
    if messages and messages[-1].get("role") == "assistant":  # the answer to compare with
      messages.pop()
    return self.chat(messages, fields.get("tools"), fields.get("chat_template_kwargs"))

  @functools.cached_property
  def template(self) -> chat_template.Template:
    """The chat template that the run was trained in, or else the tokenizer's own.

    Raises:
      UserError: There is none, or it does not read one of the variables.
    """
    run = self._run
    if not run.generation.template and not run.tokenizer.chat_template:
      raise UserError(
        "this run has no chat template: it was not trained on conversations, and its tokenizer "
        "came without one; give a text to continue, without --chat"
      )
    return chat_template.load(
      run.generation.template_name or chat_template.OWN,
      run.tokenizer,
      run.generation.template,
      self._variables,
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
