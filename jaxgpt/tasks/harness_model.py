"""A run as EleutherAI's lm-evaluation-harness sees a model.

Texts become tokens as in the harness's `hf` backend, so that the scores of a run are those of its
exported checkpoint: with bos where the tokenizer puts one, and with names of special tokens as
special tokens. (Elsewhere in jaxgpt no text of a user becomes one.)

All processes evaluate all requests. The devices of all of them share each batch.
"""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.prompts import Prompts
from jaxgpt.tasks.token_requests import Requests
from jaxgpt.text.tokenizers import chat_template

# Generation settings of a task that change nothing here.
_IDLE = {"until", "do_sample", "temperature", "max_gen_toks", "use_cache"}


class Encoder:
  """Texts to tokens and back, as the harness's `hf` backend has them."""

  def __init__(self, run: load.Run):
    """Args: run: From `load.load`."""
    self._tokenizer = run.tokenizer
    self.prefix_id = self._tokenizer.bos_id
    names = {i: name for name, i in self._tokenizer.special_ids.items()}
    self._bos = names.get(self.prefix_id, "")
    self.end = names.get(self._tokenizer.eos_id, "")

  def encode(self, text: str, specials: bool | None = None) -> list[int]:
    """The ids of a text.

    Args:
      text: The text. Names of special tokens become their ids.
      specials: Put bos in front, if the tokenizer does that. None: unless the text begins with it.
    """
    ids = self._tokenizer.encode_rendered([text], [[]])[0].ids.tolist() if text else []
    if specials is None:
      specials = not (self._bos and text.startswith(self._bos))
    return [self.prefix_id, *ids] if specials and self._tokenizer.adds_bos else ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    return self._tokenizer.decode(ids)


def windows(ids: Sequence[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
  """Cuts a text into (context, continuation) so that each token is predicted once.

  The first window begins with the prefix. Each later one predicts as many tokens as there are, at
  most `length`, after one token of context, and the last one as many tokens of context as fit.

  Args:
    ids: The text.
    prefix: The token before it.
    length: The model's context.
  """
  before, out = [prefix, *ids], []
  for start in range(0, len(ids), length):
    end = min(start + length, len(ids))
    first = 0 if start == 0 else max(end - length, 0)
    out.append((before[first : start + 1], list(ids[start:end])))
  return out


def settings(given: Mapping[str, Any], own: load.Sampling) -> load.Sampling:
  """How a task wants tokens drawn.

  Args:
    given: The task's `generation_kwargs`, normalized by the harness.
    own: The settings of the model's generation_config.json.

  Raises:
    UserError: A setting is not one that sampling has.
  """
  unknown = given.keys() - _IDLE - set(load.Sampling._fields)
  if unknown:
    raise UserError(
      f"a task's generation_kwargs set {', '.join(sorted(unknown))}, which jaxgpt does not have; "
      f"it has {', '.join(sorted({*_IDLE, *load.Sampling._fields}))}"
    )
  chosen = {name: given[name] for name in load.Sampling._fields if given.get(name) is not None}
  temperature = float(given.get("temperature") or 0.0)
  if not given.get("do_sample"):
    temperature = 0.0
  elif not temperature:
    temperature = 1.0
  out = own._replace(**{**chosen, "temperature": temperature})
  out.check()
  return out


def cut_at(text: str, stops: Sequence[str]) -> str:
  """The text before the first stop string."""
  for stop in stops:
    text = text.split(stop)[0] if stop else text
  return text


def generated(
  requests: Requests, encoder: Encoder, texts: Sequence[str], given: Sequence[Mapping[str, Any]]
) -> list[str]:
  """Continues texts, those with equal settings together.

  Args:
    requests: The model.
    encoder: Its texts as tokens.
    texts: The prompts.
    given: For each the task's `generation_kwargs`, normalized by the harness.

  Raises:
    UserError: See `settings` and `Requests.generate`.
  """
  own = load.sampling_defaults(requests.run)[0]
  groups: dict[str, list[int]] = {}
  for i, one in enumerate(given):
    groups.setdefault(repr(sorted(one.items())), []).append(i)
  out = [""] * len(texts)
  for numbers in groups.values():
    asked = given[numbers[0]]
    until = asked.get("until") or []
    stops = [*([until] if isinstance(until, str) else until), encoder.end]
    found = requests.generate(
      [encoder.encode(texts[i]) or [encoder.prefix_id] for i in numbers],
      int(asked["max_gen_toks"]),
      settings(asked, own),
      lambda new, stops=stops: any(s and s in encoder.decode(new) for s in stops),  # type: ignore[misc]
    )
    for i, new in zip(numbers, found):
      out[i] = cut_at(encoder.decode(new), stops)
  return out


def model(run: load.Run, batch_size: int | None = None) -> Any:
  """A run as an `lm_eval.api.model.LM`.

  Args:
    run: From `load.load`, a causal language model.
    batch_size: See `Requests`.

  Raises:
    UserError: lm-eval is not installed, or the run is not a causal language model.
  """
  check()
  return _model_class()(run, batch_size)


def check() -> None:
  """Raises a UserError if lm-eval is not installed."""
  if importlib.util.find_spec("lm_eval") is None:
    raise UserError("tasks of the harness need lm-eval: pip install 'jaxgpt[harness]'")


@functools.cache
def _model_class() -> type:
  import lm_eval.api.model
  import lm_eval.models.utils

  class JaxgptLM(lm_eval.api.model.TemplateLM):
    """A run as the harness sees a model."""

    def __init__(self, run: load.Run, batch_size: int | None):
      super().__init__()
      self._run, self._encoder = run, Encoder(run)
      self.requests = Requests(run, batch_size)
      self._prompts = Prompts(run)

    @property
    def eot_token_id(self) -> int:
      return self._run.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
      return self._encoder.prefix_id

    @property
    def max_length(self) -> int:
      return self.requests.context

    @property
    def max_gen_toks(self) -> int:
      return 256  # as the `hf` backend has it

    @property
    def tokenizer_name(self) -> str:
      return self._run.tokenizer.digest[:12]

    def tok_encode(
      self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
      return self._encoder.encode(string, add_special_tokens)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
      return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
      found = self.requests.log_likelihoods([(ids, more) for _, ids, more in requests])
      for (text, _, _), answer in zip(requests, found):
        self.cache_hook.add_partial("loglikelihood", text, answer)
      return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
      texts = [request.args[0] for request in requests]
      cut = [windows(self.tok_encode(t), self.prefix_token_id, self.max_length) for t in texts]
      found = iter(self.requests.log_likelihoods([pair for pairs in cut for pair in pairs]))
      out = [sum(next(found)[0] for _ in pairs) for pairs in cut]
      for text, total in zip(texts, out):
        self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
      return out

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
      normal = lm_eval.models.utils.normalize_gen_kwargs
      given = [normal(request.args[1], self.max_gen_toks) for request in requests]
      texts = [request.args[0] for request in requests]
      out = generated(self.requests, self._encoder, texts, given)
      for request, text in zip(requests, out):
        self.cache_hook.add_partial("generate_until", request.args, text)
      return out

    def chat_template(self, chat_template: bool | str = False) -> str | None:
      return self._prompts.template.to_jinja() if chat_template else None

    def apply_chat_template(
      self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
      return chat_text(self._prompts.template, chat_history, add_generation_prompt)

  return JaxgptLM


def chat_text(
  template: chat_template.Template, messages: Sequence[Mapping[str, Any]], answer: bool
) -> str:
  """A conversation as the text of a prompt.

  Args:
    template: The template.
    messages: The messages. A template without a place for system messages gets none, as in the
      harness's `hf` backend.
    answer: End with the beginning of an answer. False: end inside the last message, for the model
      to continue it.
  """
  try:
    text = "".join(piece.text for piece in template(messages, generate=answer))
  except UserError:
    others = [message for message in messages if message["role"] != "system"]
    if len(others) == len(messages):
      raise
    text = "".join(piece.text for piece in template(others, generate=answer))
  if answer:
    return text
  last = str(messages[-1]["content"]).strip()
  return text[: text.rindex(last) + len(last)]
