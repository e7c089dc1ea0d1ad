"""Entries of a family's config table: how keys of config.json correspond to fields of `model`.

An entry converts in both directions. `read(hf)` takes config.json and returns fields of the
config's `model` section under flat names such as 'rope.theta'. `write(model)` takes those fields
and returns keys of config.json. Both are plain dicts, and a family's table is a tuple of entries:

    same("rms_norm_eps", "norm_eps", 1e-6)         one key, another name, with a default
    sames(hidden_size="width", ...)                several required keys
    mapped("hidden_act", "activation", {...})      one key whose values are spelled differently
    must("attention_bias", False)                  a key that must have this value
    ours(norm="rmsnorm", ...)                      constants of the family, absent from config.json
    derived("embed_scale", lambda hf: ...)         a field computed from config.json, never written
    unless("head_dim", "head_dim", default)        as same, written only where it is not the default
    Entry(read, write)                             anything else
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from jaxgpt.config.architecture import each_layer
from jaxgpt.errors import UserError
from jaxgpt.hf import labels

HfConfig = dict[str, Any]  # config.json
Fields = dict[str, Any]  # fields of `model`, by flat names

_REQUIRED = object()


class ConfigJson(HfConfig):
  """A config.json that remembers the keys that were read, and collects notes for the user.

  Attributes:
    seen: Keys that were looked up, present or not.
    notes: Sentences on values that have no effect.
  """

  def __init__(self, values: HfConfig):
    super().__init__(values)
    self.seen: set[str] = set()
    self.notes: list[str] = []

  def get(self, key: str, default: Any = None) -> Any:
    """As `dict.get`."""
    self.seen.add(key)
    return super().get(key, default)

  def __getitem__(self, key: str) -> Any:
    self.seen.add(key)
    return super().__getitem__(key)


def note(hf: HfConfig, text: str) -> None:
  """Adds a note for the user if somebody collects them."""
  if isinstance(hf, ConfigJson) and text not in hf.notes:
    hf.notes.append(text)


class Entry(NamedTuple):
  """A correspondence between config.json and `model`, as two functions."""

  read: Callable[[HfConfig], Fields]
  write: Callable[[Fields], HfConfig]


def get(hf: HfConfig, key: str, default: Any = _REQUIRED) -> Any:
  """Returns a value of config.json. null counts as missing.

  Args:
    hf: config.json.
    key: The key.
    default: Value for a missing key, or a function from config.json to it.

  Returns:
    The value or the default.

  Raises:
    UserError: The key is missing and has no default.
  """
  value = hf.get(key)
  if value is not None:
    return value
  if default is _REQUIRED:
    raise UserError(f"config.json: {key!r} is missing; download the model's folder again")
  return default(hf) if callable(default) else default


def refuse(key: str, value: Any, reason: str) -> NoReturn:
  """Raises the UserError for a value of config.json that `model` cannot express."""
  raise UserError(f"config.json: {key}={value!r} is not supported: {reason}")


def _forbidden(key: str, reason: str) -> Entry:
  """A key that changes the model in a way that no family here supports, unless it is empty."""

  def read(hf: HfConfig) -> Fields:
    if hf.get(key):
      refuse(key, hf[key], reason)
    return {}

  return Entry(read, lambda model: {})


# Keys of every family.
EVERYWHERE = (
  _forbidden("quantization_config", "convert it to bfloat16 first"),
  _forbidden("compression_config", "convert it to bfloat16 first"),
  _forbidden("per_layer_config", "all layers have the same sizes here"),
  _forbidden("pruned_heads", "all layers have the same heads here"),
  _forbidden("is_encoder_decoder", "there are no encoder-decoder models here"),
)

# Keys that do not change the outputs of a trained model: file formats, training, generation.
_HARMLESS = re.compile(
  r"_.*|model_type|architectures|auto_map|transformers(_js)?_version|.*version|torch_dtype|dtype"
  r"|.*_token_ids?|id2label|label2id|num_labels|problem_type|finetuning_task|tokenizer_class"
  r"|name_or_path|task_specific_params|use_cache|cache_implementation|torchscript|return_dict"
  r"|output_(attentions|hidden_states|router_logits)|attn_implementation|use_bfloat16"
  r"|initializer_(range|cutoff_factor)|.*dropout.*|.*_pdrop|gradient_checkpointing"
  r"|router_(aux_loss_coef|jitter_noise)|aux_loss_alpha|seq_aux|ep_size|num_nextn_predict_layers"
  r"|num_mtp_layers|pretraining_tp|chunk_size_feed_forward|reorder_and_upcast_attn|n_ctx"
  r"|summary_.*|deterministic_flash_attn|reference_compile|repad_logits_with_grad"
  r"|sparse_(prediction|pred_ignore_index)|rope_theta|rope_scaling|rope_parameters"
  r"|global_attn_every_n_layers|sliding_window(_pattern)?|max_window_layers"
  r"|(max|min)_length|max_new_tokens|do_sample|early_stopping|num_beams|num_beam_groups"
  r"|diversity_penalty|temperature|top_[kp]|typical_p|repetition_penalty|length_penalty"
  r"|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|num_return_sequences"
  r"|output_scores|return_dict_in_generate|prefix|suppress_tokens|begin_suppress_tokens"
)


def unread(hf: ConfigJson) -> list[str]:
  """Lists keys that were not looked up and may say something, as 'key=value'."""
  return [
    f"{key}={str(value)[:40]}"
    for key, value in sorted(hf.items())
    if key not in hf.seen and value not in (None, False, "", [], {}) and not is_harmless(key)
  ]


def is_harmless(key: str) -> bool:
  """Whether a key of config.json has no effect on the outputs of a trained model."""
  return bool(_HARMLESS.fullmatch(key))


def same(theirs: str, ours: str, default: Any = _REQUIRED) -> Entry:
  """A key whose value is stored unchanged under another name. `default` is as in `get`."""
  return Entry(lambda hf: {ours: get(hf, theirs, default)}, lambda model: {theirs: model[ours]})


def unless(theirs: str, ours: str, default: Callable[[HfConfig], Any]) -> Entry:
  """As `same`. The key is written only if its value is not the default.

  For keys that the family's config class does not declare, though its model reads them.
  """

  def write(model: Fields) -> HfConfig:
    sizes = {"hidden_size": model["width"], "num_attention_heads": model["num_heads"]}
    return {} if model[ours] == default(sizes) else {theirs: model[ours]}

  return Entry(lambda hf: {ours: get(hf, theirs, default)}, write)


def sames(**names: str) -> Entry:
  """Several required keys, each as in `same`, written as theirs=ours."""
  entries = [same(theirs, ours) for theirs, ours in names.items()]
  return Entry(
    lambda hf: _union(e.read(hf) for e in entries),
    lambda model: _union(e.write(model) for e in entries),
  )


def _union(dicts: Iterable[dict[str, Any]]) -> dict[str, Any]:
  return {k: v for d in dicts for k, v in d.items()}


def mapped(theirs: str, ours: str, table: dict[Any, Any], default: Any = _REQUIRED) -> Entry:
  """A key whose values are spelled differently.

  Args:
    theirs: Key of config.json.
    ours: Field of `model`.
    table: {their value: our value}. Of several spellings of one value, the first is written.
    default: As in `get`.
  """

  def read(hf: HfConfig) -> Fields:
    value = get(hf, theirs, default)
    if value not in table:
      refuse(theirs, value, f"known are {', '.join(map(repr, table))}")
    return {ours: table[value]}

  def write(model: Fields) -> HfConfig:
    return {theirs: next((k for k, v in table.items() if v == model[ours]), model[ours])}

  return Entry(read, write)


def must(theirs: str, value: Any, default: Any = _REQUIRED) -> Entry:
  """A key that must have one value, which is also its default unless `default` says otherwise."""

  def read(hf: HfConfig) -> Fields:
    found = get(hf, theirs, value if default is _REQUIRED else default)
    if found != value:
      refuse(theirs, found, f"only {value!r} is")
    return {}

  return Entry(read, lambda model: {theirs: value})


def ours(**values: Any) -> Entry:
  """Constants of a family: fields of `model`, with '__' for '.'."""
  values = {key.replace("__", "."): value for key, value in values.items()}
  return Entry(lambda hf: values, lambda model: {})


def derived(name: str, function: Callable[[HfConfig], Any]) -> Entry:
  """A field of `model` that is computed from config.json and never written to it."""
  return Entry(lambda hf: {name: function(hf)}, lambda model: {})


def repeated(*keys: str) -> Entry:
  """Keys that repeat what follows from others. They are neither used nor written."""

  def read(hf: HfConfig) -> Fields:
    for key in keys:
      hf.get(key)
    return {}

  return Entry(read, lambda model: {})


def biases(default: bool = False) -> Entry:
  """`attention_bias` and `mlp_bias`. They must be equal, since `model.bias` covers both."""

  def read(hf: HfConfig) -> Fields:
    attention, mlp = get(hf, "attention_bias", default), get(hf, "mlp_bias", default)
    if attention != mlp:
      refuse("attention_bias", attention, f"mlp_bias={mlp!r} differs")
    return {"bias": attention}

  return Entry(read, lambda model: {"attention_bias": model["bias"], "mlp_bias": model["bias"]})


ACTIVATIONS = {
  "gelu_new": "gelu",
  "gelu_pytorch_tanh": "gelu",
  "gelu_fast": "gelu",
  "gelu": "gelu_exact",
  "gelu_python": "gelu_exact",
  "silu": "silu",
  "swish": "silu",
  "relu": "relu",
  "relu2": "relu2",
}


def activation(key: str, default: Any = _REQUIRED) -> Entry:
  """The activation of the MLP."""
  return mapped(key, "activation", ACTIVATIONS, default)


def old_gemma_activation() -> Entry:
  """Gemma's activation: 'gelu' in its published files means the tanh approximation."""
  table = {"gelu_pytorch_tanh": "gelu", "gelu": "gelu"}
  table |= _without(ACTIVATIONS, table)
  return mapped("hidden_act", "activation", table, "gelu_pytorch_tanh")


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
  return {k: v for k, v in values.items() if k not in names}


def head_dim(hf: HfConfig) -> int:
  """The default of `head_dim` in most families: hidden_size / num_attention_heads."""
  return get(hf, "hidden_size") // get(hf, "num_attention_heads")


class _Names(NamedTuple):
  """How the names of a head's classes are read and written, see `labels`."""

  read: Callable[[HfConfig, int], tuple[str, ...]]
  write: Callable[[tuple[str, ...], int], HfConfig]


_NAMED = {
  "classifier": _Names(labels.read, labels.write),
  "token_classifier": _Names(labels.read_tags, labels.write_tags),
}


def classes(**fields: Mapping[str, Any]) -> Entry:
  """The head of a model, given by the name of its class in `architectures`.

  Args:
    **fields: {class name: fields of `model`}. The first class is the default. A model is written as
      the first one whose fields it has. Classes have names unless the fields say otherwise.
  """

  def read(hf: HfConfig) -> Fields:
    name = (hf.get("architectures") or [next(iter(fields))])[0]
    if name not in fields:
      refuse("architectures", name, f"of {hf['model_type']} are {', '.join(fields)}")
    found = dict(fields[name])
    if found["head"] in _NAMED and "label_names" not in found:
      found["num_labels"] = hf.get("num_labels") or len(hf.get("id2label") or (0, 1))
      found["label_names"] = _NAMED[found["head"]].read(hf, found["num_labels"])
    return found

  def write(model: Fields) -> HfConfig:
    fits = [name for name, f in fields.items() if all(model[k] == v for k, v in f.items())]
    bare = [name for name, f in fields.items() if model["head"] == "none" and f["head"] == "pooler"]
    name = next(iter([*fits, *bare, *fields]))
    out: HfConfig = {"architectures": [name]}
    found = fields[name]
    if found["head"] in _NAMED and "label_names" not in found:
      out |= _NAMED[found["head"]].write(model["label_names"], model["num_labels"])
    return out

  return Entry(read, write)


_KINDS = {"sliding_attention": "local", "full_attention": "global"}


def shortest(kinds: Sequence[str]) -> tuple[str, ...]:
  """Returns the shortest pattern whose repetition begins with the given kinds of layers."""
  n = next(
    n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds))
  )
  return tuple(kinds[:n])


class WindowKey(NamedTuple):
  """The key of config.json with the size of the attention window, and conversions of its value."""

  default: int | None  # for a missing key
  name: str = "sliding_window"
  to_ours: Callable[[int], int] = lambda n: n
  to_theirs: Callable[[int], int] = lambda n: n
  nullable: bool = True  # whether a model without local layers has null there, instead of no key


def layer_types(
  default: Callable[[HfConfig], Sequence[str]],
  window: WindowKey,
  also: Callable[[Fields], HfConfig] = lambda model: {},
) -> Entry:
  """The layers that attend within a window: `layer_types`, or the keys of older files.

  Args:
    default: Function from a config.json without `layer_types` to a list of 'local' and 'global'.
    window: Key with the size of the window.
    also: Function from `model` to further keys of config.json.
  """

  def read(hf: HfConfig) -> Fields:
    given = per_layer(hf, "layer_types")
    unknown = [kind for kind in given or () if kind not in _KINDS]
    if unknown:
      refuse("layer_types", unknown[0], f"known are {', '.join(_KINDS)}")
    pattern = shortest([_KINDS[kind] for kind in given] if given else default(hf))
    size = hf.get(window.name, window.default)
    if "local" not in pattern:
      return {"attention_pattern": pattern}
    if not size:
      refuse(window.name, size, "some layers attend within a window")
    return {"attention_pattern": pattern, "window": window.to_ours(size)}

  def write(model: Fields) -> HfConfig:
    names = {v: k for k, v in _KINDS.items()}
    kinds = each_layer(model["attention_pattern"], model["num_layers"])
    size = window.to_theirs(model["window"]) if "local" in kinds else None
    return {
      "layer_types": [names.get(kind, kind) for kind in kinds],
      **({window.name: size} if size is not None or window.nullable else {}),
      **also(model),
    }

  return Entry(read, write)


def check_layer_types(hf: ConfigJson, found: Fields) -> None:
  """Refuses `layer_types` that a family does not read and that differ from its layers.

  Args:
    hf: config.json, after all entries have read it.
    found: What they found.
  """
  if "layer_types" in hf.seen or hf.get("layer_types") is None:
    return
  kinds = each_layer(found.get("attention_pattern", ("global",)), found["num_layers"])
  if len(hf["layer_types"]) != len(kinds):
    refuse("layer_types", hf["layer_types"], f"the model has {len(kinds)} layers")
  for name, kind in zip(hf["layer_types"], kinds, strict=True):
    if _KINDS.get(name) != kind:
      refuse("layer_types", name, f"all layers of this {hf['model_type']} are {kind}")


def per_layer(hf: HfConfig, key: str) -> Sequence[Any] | None:
  """Returns a list with one value for each layer, or None if the key is missing.

  Raises:
    UserError: The list has another length.
  """
  given = hf.get(key)
  if given is not None and len(given) != (layers := get(hf, "num_hidden_layers")):
    refuse(key, given, f"it has {len(given)} entries for num_hidden_layers={layers}")
  return given


def moe(experts: str, per_token: str, width: str = "moe_intermediate_size", **more: str) -> Entry:
  """The keys of a mixture of experts.

  Args:
    experts: Key with the number of experts.
    per_token: Key with the number of experts that each token is routed to.
    width: Key with the hidden size of an expert.
    **more: Further keys, as theirs=field of `model.moe`.
  """
  return sames(
    **{experts: "moe.experts", per_token: "moe.per_token", width: "moe.width"},
    **{theirs: f"moe.{ours}" for theirs, ours in more.items()},
  )
