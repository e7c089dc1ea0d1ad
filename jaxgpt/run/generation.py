"""How a run's texts end and are drawn, in the form of Hugging Face's generation_config.json.

RUN/generation_config.json   end tokens, and sampling defaults if the model came with some
RUN/chat_template.jinja      the template of the conversations that the run was trained on, if any

A run without these files, from an older version or without a language model, ends its texts with
the tokenizer's eos.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from jaxgpt.data import pipeline
from jaxgpt.errors import UserError
from jaxgpt.storage import atomic, strict_json
from jaxgpt.text.prepare import shards
from jaxgpt.text.tokenizers import chat_template
from jaxgpt.text.tokenizers.base import Tokenizer

FILE = "generation_config.json"
TEMPLATE = "chat_template.jinja"
_EOS = "eos_token_id"
_NAME = re.compile(r"\{#- jaxgpt: (\w+) -#\}")  # begins the file


class Generation(NamedTuple):
  """How a run's texts end and are drawn.

  Attributes:
    values: The content of generation_config.json. `eos_token_id` is a list.
    template: Jinja source of the chat template that the run was trained in, or ''. Then the
      tokenizer may have one.
    template_name: The template's name, see `chat_template.load`, or ''.
  """

  values: dict[str, Any]
  template: str = ""
  template_name: str = ""

  @property
  def end_ids(self) -> tuple[int, ...]:
    """Ids of the tokens that end a text."""
    return tuple(self.values[_EOS])

  def without_ends(self) -> "Generation":
    """The same for texts that no token ends."""
    return self._replace(values=self.values | {_EOS: []})


def read(folder: epath.PathLike, tokenizer: Tokenizer) -> Generation:
  """Reads what a run folder, or a folder in Hugging Face's format, says.

  Args:
    folder: The folder. Without generation_config.json, the end tokens are those of a config.json
      in Hugging Face's format, or else the tokenizer's eos.
    tokenizer: The tokenizer of the run or model.

  Raises:
    UserError: A file is broken.
  """
  folder = epath.Path(folder)
  values = _read_json(folder / FILE)
  ends = _ids(values.get(_EOS), folder / FILE)
  if not ends:  # as transformers does
    ends = _ids(_read_json(folder / "config.json").get(_EOS), folder / "config.json")
  values |= {_EOS: ends or [tokenizer.eos_id]}
  path = folder / TEMPLATE
  template = path.read_text(encoding="utf-8") if path.is_file() else ""
  name = _NAME.match(template)
  if name is None:  # a folder in Hugging Face's format: the tokenizer reads it too
    return Generation(values)
  return Generation(values, template[name.end() :], name[1])


def of_run(
  folder: epath.PathLike, c: ml_collections.ConfigDict, tokenizer: Tokenizer
) -> Generation:
  """What a run folder says, or else the data that a run of an older version was trained on.

  Args:
    folder: The run folder.
    c: The run's config.
    tokenizer: The run's tokenizer.
  """
  if not (epath.Path(folder) / FILE).exists() and c.data.path:
    try:
      found, _ = of_training(c, tokenizer, folder)
    except UserError:  # the data is not there any more
      found = None
    if found:
      return found
  return read(folder, tokenizer)


def of_training(
  c: ml_collections.ConfigDict, tokenizer: Tokenizer, folder: epath.PathLike
) -> tuple[Generation | None, list[str]]:
  """What the texts end with that a run is trained on.

  Keeps what the model of `init_from` says, and adds the tokens that end the data's documents: eos
  for texts, the marks of the chat template for conversations.

  Args:
    c: The resolved config. `data.path` names prepared data.
    tokenizer: The tokenizer of the data.
    folder: The run folder.

  Returns:
    (generation, notices for the user). No generation for a run that has one already, or whose model
    writes no text.
  """
  if (epath.Path(folder) / FILE).exists() or not (c.model.causal and c.model.head == "lm"):
    return None, []
  before = read(c.init_from, tokenizer) if c.init_from else Generation({_EOS: []})
  manifests = [shards.read_manifest(folder) for folder in pipeline.folders(c.data.path)]
  used = dict.fromkeys(
    (m.get("chat_template"), strict_json.dumps(m.get("template_variables", {}))) for m in manifests
  )
  ends, notices = list(before.end_ids), list[str]()
  templates = list[chat_template.Template]()
  for name, variables in used:
    if name is None:
      ends.append(tokenizer.eos_id)
      continue
    try:
      templates.append(chat_template.load(name, tokenizer, variables=json.loads(variables)))
    except UserError as e:  # jinja2 is not installed here
      notices.append(f"the end tokens of the chat template {name!r} are not known: {e}")
      continue
    ends += [tokenizer.special_ids[mark] for mark in templates[-1].stops]
    if not templates[-1].stops:
      notices.append(f"the chat template {name!r} ends an answer with no special token")
  if len(templates) > 1:
    notices.append(
      f"the data was written in several chat templates ({', '.join(t.name for t in templates)}); "
      f"generate --chat and export take {templates[0].name!r}"
    )
  values = before.values | {_EOS: list(dict.fromkeys(ends)) or [tokenizer.eos_id]}
  if templates:
    return Generation(values, templates[0].to_jinja(), templates[0].name), notices
  return before._replace(values=values), notices


def write(folder: epath.PathLike, generation: Generation | None) -> None:
  """Writes the files into a run folder, unless there is nothing to write."""
  folder = epath.Path(folder)
  if generation:
    if generation.template:
      name = f"{{#- jaxgpt: {generation.template_name} -#}}"
      atomic.write(folder / TEMPLATE, name + generation.template)
    atomic.write(folder / FILE, strict_json.dumps(generation.values, indent=2) + "\n")


def published(generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
  """The generation_config.json to publish with a model. One end token is not a list."""
  roles = {"bos_token_id": "bos_token", "pad_token_id": "pad_token"}
  names = tokenizer.role_names
  values = {
    key: tokenizer.special_ids[names[role]] for key, role in roles.items() if role in names
  } | generation.values
  ends = values[_EOS]
  return values | {_EOS: ends[0] if len(ends) == 1 else list(ends)}


def _read_json(path: epath.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
      raise ValueError("not an object")
    return values
  except (OSError, ValueError) as e:
    raise UserError(f"{path} can't be read ({e}); restore the file, or remove it") from e


def _ids(value: Any, path: epath.Path) -> list[int]:
  """Token ids in a field that holds one, several or none."""
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
    raise UserError(
      f"{path}: {_EOS}={value!r} is neither a token id nor a list of them; correct it"
    )
  return list(dict.fromkeys(ids))


# Keys of generation_config.json that do not change which token is drawn.
_IDLE = {
  "_from_model_config",
  "transformers_version",
  "bos_token_id",
  _EOS,
  "pad_token_id",
  "do_sample",
  "use_cache",
  "cache_implementation",
  "return_dict_in_generate",
  "output_scores",
  "output_logits",
  "output_attentions",
  "output_hidden_states",
  "num_return_sequences",
}


def sampling_defaults(
  values: Mapping[str, Any], names: Iterable[str]
) -> tuple[dict[str, float], list[str]]:
  """The settings that a generation_config.json gives a sampler.

  Args:
    values: The content of the file.
    names: The sampler's settings by name, `temperature` among them.

  Returns:
    ({name: value}, keys of the file that a sampler with these settings does not follow).

  Raises:
    UserError: A value is not a number.
  """
  names = set(names)
  found = {k: v for k, v in values.items() if k in names and v is not None}
  for key, value in found.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise UserError(f"{FILE}: {key}={value!r} is not a number; correct it, or give --{key}")
  if values.get("do_sample") is False:
    found["temperature"] = 0.0
  ignored = [
    key
    for key, value in values.items()
    if key not in names | _IDLE and value not in (None, False, [], {}, "", _NEUTRAL.get(key))
  ]
  return found, sorted(ignored)


# Values with which a key has no effect, as transformers documents them.
_NEUTRAL: dict[str, float] = {
  "num_beams": 1,
  "num_beam_groups": 1,
  "typical_p": 1.0,
  "epsilon_cutoff": 0.0,
  "eta_cutoff": 0.0,
  "length_penalty": 1.0,
  "encoder_repetition_penalty": 1.0,
  "diversity_penalty": 0.0,
  "no_repeat_ngram_size": 0,
  "encoder_no_repeat_ngram_size": 0,
  "min_length": 0,
  "guidance_scale": 1.0,
}
