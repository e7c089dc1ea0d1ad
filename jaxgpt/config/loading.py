"""A config: the base, its merge with presets, files and the command line, and its checks.

A config file is the experiment. Its keys are those of `keys.base`.
"""

import importlib.util
import os
import pathlib
import traceback

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxgpt.config import checks
from jaxgpt.config.keys import FREE_ON_RESUME, MESH_AXES, base
from jaxgpt.config.presets import PRESETS
from jaxgpt.errors import UserError, nearest


def preset(name):
  """The `model` section of a published architecture.

  Args:
    name: a key of `presets.PRESETS`.

  Raises:
    UserError: there is no preset of that name.
  """
  if name not in PRESETS:
    raise UserError(
      f"no preset {name!r}; {nearest(name, PRESETS)}there are: {', '.join(sorted(PRESETS))}"
    )
  return dict(PRESETS[name], preset=name)


def flatten(c):
  """{'model.width': 384, …} of a nested ConfigDict or dict."""
  out = {}
  for key, value in c.items():
    if isinstance(value, (dict, ml_collections.ConfigDict)):
      out.update({f"{key}.{k}": v for k, v in flatten(value).items()})
    else:
      out[key] = _as_tuples(value)
  return out


def _as_tuples(value):
  """Lists, which JSON makes of tuples, as tuples again."""
  return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def from_dict(tree):
  """A locked config from a plain nested dict, such as a run folder's `config.json` holds.

  Raises:
    UserError: a key that `base` does not have.
  """
  c = base()
  known = flatten(c)
  for key, value in flatten(tree).items():
    if key not in known:
      raise UserError(f"unknown config key {key!r}; {nearest(key, known)}".rstrip("; "))
    if value is not None:
      c.update_from_flattened_dict({key: value})
  return c


def load(path, overrides=()):
  """Reads a config file and applies overrides as JAX users type them.

  Args:
    path: a Python file with `get_config()`; of `FILE.py:ARG`, `get_config(ARG)` is called.
    overrides: strings `--config.optim.lr=3e-4`.

  Returns:
    (config, provenance): the locked config, and for each flat key where its value came from:
    'base', 'preset NAME', 'file' or 'command line'.

  Raises:
    UserError: no such file, an unknown key, or a value of the wrong type.
  """
  path, _, arg = str(path).partition(":")
  if not pathlib.Path(path).is_file():
    near = sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
    hint = nearest(path, near) + (f"there are: {', '.join(near)}" if near else "")
    raise UserError(f"--config={path}: no such file; {hint}".rstrip("; "))
  flat = flatten(base())
  for item in overrides:
    key = _overridden(item)
    row = key.removeprefix("mesh.rules.")
    if row != key and row in checks.FIXED_RULES:
      names, by = checks.FIXED_RULES[row]
      raise UserError(
        f"--config.{key} cannot be set: {by} is written for {row!r} over "
        f"{' x '.join(f'mesh.{name}' for name in names)}; set the sizes of these"
      )
    if key not in flat and not any(k.startswith(key + ".") for k in flat):
      raise UserError(
        f"unknown config key --config.{key}; {nearest(key, flat)}docs/config.md lists them all"
      )
  c, from_file = _parse(path, arg, overrides)
  final = flatten(c)
  preset_values = flatten({"model": PRESETS.get(c.model.preset, {})})
  given = {_overridden(item) for item in overrides}

  def origin(key):
    if key in given:
      return "command line"
    if key in preset_values and from_file[key] == preset_values[key]:
      return f"preset {c.model.preset}"
    return "base" if from_file[key] == flat[key] else "file"

  return c, {key: origin(key) for key in final}


def _overridden(item):
  """'optim.lr' of '--config.optim.lr=3e-4', 'data.shuffle' of '--noconfig.data.shuffle'."""
  return item.split("=", 1)[0].lstrip("-").removeprefix("no").removeprefix("config.")


def _parse(path, arg, overrides):
  """(config with overrides, flat values before them), through ml_collections' own flag parser."""
  spec = importlib.util.spec_from_file_location("jaxgpt_config_file", os.path.abspath(path))
  if spec is None:
    raise UserError(f"--config={path}: a config is a Python file, FILE.py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    c = module.get_config(arg) if arg else module.get_config()
  except UserError:
    raise
  except Exception as e:  # the user's own code may raise anything; ml_collections names bad keys
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(e.__traceback__)
      if frame.filename == os.path.abspath(path)
    ]
    where = f"{path}:{lines[-1]}" if lines else path
    raise UserError(f"{where}: {type(e).__name__}: {' '.join(str(e).split())}") from e
  if not isinstance(c, ml_collections.ConfigDict):
    raise UserError(
      f"{path}: get_config() returned a {type(c).__name__}; return config.base() with your changes"
    )
  known, given = flatten(base()), flatten(c)
  for key in sorted(given.keys() ^ known.keys()):
    what = "unknown key" if key in given else "lacks the key"
    hint = nearest(key, known) if key in given else ""
    raise UserError(f"{path}: {what} {key!r}; {hint}start from config.base()")
  for key, value in given.items():
    if value is None and known[key] is not None:
      raise UserError(f"{path}: {key}=None; give it a value, such as {known[key]!r}")
  before = flatten(c)
  values = flags.FlagValues()
  argv = ["jaxgpt", *overrides]
  config_flags.DEFINE_config_dict("config", c, flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except (flags.Error, TypeError, ValueError) as e:
    raise UserError(f"{str(e).removeprefix('flag ')}") from e
  return values.config, before


def resolve(c, vocab_size=None):
  """Fills the placeholders in and checks what can be checked without devices or data.

  Args:
    c: a config from `load`; unchanged.
    vocab_size: the tokenizer's, for a config that leaves `model.vocab_size` open.

  Returns:
    A locked copy in which every key that the model reads has a value.

  Raises:
    UserError: values that exclude each other, named.
  """
  c = c.copy_and_resolve_references()
  m = c.model
  defaults = [  # in this order: some read what others fill in
    (m, "vocab_size", lambda: vocab_size),
    (m, "max_len", lambda: c.data.seq_len),
    (m, "num_kv_heads", lambda: m.num_heads),
    (m, "head_dim", lambda: m.width // m.num_heads),
    (m, "mlp_width", lambda: 4 * m.width),
    (m, "qkv_bias", lambda: m.bias),
    (m, "attn_scale", lambda: m.head_dim**-0.5),
    (m.rope, "original_len", lambda: m.max_len),
    (m.moe, "width", lambda: m.mlp_width),
    (m.latent, "v_dim", lambda: m.head_dim),
    (c.optim, "adam_lr", lambda: c.optim.lr),
    (c.eval, "batch_size", lambda: c.data.batch_size),
  ]
  checks.values(flatten(c))
  checks.rules(c.mesh.rules, MESH_AXES)
  if m.head_dim is None and m.width % m.num_heads:
    raise UserError(
      f"model.num_heads={m.num_heads} does not divide model.width={m.width}; "
      "choose a divisor, or set model.head_dim"
    )
  for section, key, value in defaults:
    if section[key] is None:
      section[key] = value()
  checks.combinations(c)
  return c.lock()


def difference(old, new):
  """Keys, outside FREE_ON_RESUME, whose values differ: [(key, old value, new value)].

  Args:
    old, new: nested dicts or ConfigDicts.
  """
  a, b = flatten(old), flatten(new)
  return [
    (key, a.get(key), b.get(key))
    for key in sorted(a.keys() | b.keys())
    if not is_free_on_resume(key) and a.get(key) != b.get(key)
  ]


def is_free_on_resume(key):
  """Whether a flat key may differ between a run and its continuation."""
  return any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
