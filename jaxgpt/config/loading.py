"""Loading a config file: its values, overrides from the command line, and where each came from."""

import ast
import importlib.util
import json
import os
import pathlib
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxgpt.config import mesh_rules, user_code
from jaxgpt.config.keys import KEYS, SECTIONS, base
from jaxgpt.config.presets import PRESETS
from jaxgpt.config.resolution import flatten, from_dict, is_key, is_user_option
from jaxgpt.errors import UserError, nearest


def preset(name: str) -> dict[str, Any]:
  """The `model` section of a published architecture.

  Args:
    name: A key of `presets.PRESETS`.

  Raises:
    UserError: There is no preset of that name.
  """
  if name not in PRESETS:
    raise UserError(
      f"no preset {name!r}; {nearest(name, PRESETS)}there are: {', '.join(sorted(PRESETS))}"
    )
  return dict(PRESETS[name], preset=name)


def load(
  path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[ml_collections.ConfigDict, dict[str, str]]:
  """Reads a config file and applies overrides.

  Example:
    >>> c, origin = config.load("configs/char_level.py", ["--config.optim.lr=3e-4"])
    >>> origin["optim.lr"]
    'command line'

  Args:
    path: A Python file with `get_config()`. For FILE.py:ARG, `get_config(ARG)` is called. Or the
      config.json of a run folder.
    overrides: Flags such as `--config.optim.lr=3e-4` or `--noconfig.data.shuffle`.

  Returns:
    (config, origin). `origin` says for each flat key where its value came from: 'base',
    'preset NAME', 'file' or 'command line'.

  Raises:
    UserError: No such file, an unknown key, or a value of the wrong type.
  """
  file, _, arg = str(path).partition(":")
  if not pathlib.Path(file).is_file():
    near = sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
    hint = nearest(file, near) + (f"there are: {', '.join(near)}" if near else "")
    raise UserError(f"--config={file}: no such file; {hint}".rstrip("; "))
  # Wrong names are reported before the file is executed, and with the nearest key.
  given = {_flat_key(override) for override in overrides}
  for key in given:
    mesh_rules.check_not_fixed(key)
    if not is_key(key) and key not in SECTIONS:
      raise UserError(
        f"unknown config key --config.{key}; {nearest(key, KEYS)}docs/config.md lists them all"
      )
  c = _from_run(file) if file.endswith(".json") else _from_file(file, arg)
  defaults, from_file = flatten(base()), flatten(c)
  c = _override(c, overrides)
  if c.model.preset != from_file["model.preset"]:
    preset(c.model.preset)  # an unknown name is reported as such
    raise UserError(
      f"--config.model.preset={c.model.preset!r}: the name alone fills in nothing; write "
      f"c.model.update(config.preset({c.model.preset!r})) in the config file, or give a file that "
      f"takes a preset, such as --config=configs/llama3_8b.py:{c.model.preset}"
    )
  if user_code.names(c) and not c.code_folder:
    c.code_folder = os.path.dirname(file) or "."
  # A preset's values count as such only if the file did not change them afterwards.
  from_preset = flatten({"model": PRESETS.get(c.model.preset, {})})

  def origin(key: str) -> str:
    if key in given:
      return "command line"
    if key in from_preset and from_file[key] == from_preset[key]:
      return f"preset {c.model.preset}"
    return "base" if key in defaults and from_file[key] == defaults[key] else "file"

  return c, {key: origin(key) for key in flatten(c)}


def _flat_key(override: str) -> str:
  """'optim.lr' of '--config.optim.lr=3e-4', 'data.shuffle' of '--noconfig.data.shuffle'."""
  return override.split("=", 1)[0].lstrip("-").removeprefix("no").removeprefix("config.")


def _from_run(path: str) -> ml_collections.ConfigDict:
  """The config in a run folder's config.json. Values that no user set are left to be derived."""
  try:
    found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    values, origin = dict(flatten(found["config"])), found.get("origin", {})
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
    raise UserError(
      f"--config={path}: not the config.json of a run folder ({type(e).__name__}: {e}); give that, "
      "or a Python file with get_config()"
    ) from e
  for key in KEYS:
    if KEYS[key].default is None and origin.get(key) == "base":
      values[key] = None
  try:
    c = from_dict(values)
  except UserError as e:
    raise UserError(f"--config={path}: {e}") from e
  if c.code_folder:
    c.code_folder = os.path.join(os.path.dirname(path), c.code_folder)
  return c


def call(path: str, function: str, arg: str = "") -> Any:
  """Calls a function of a Python file that is named by --config.

  Args:
    path: The file.
    function: Its name, such as 'get_config'.
    arg: Its argument. "": it gets none.

  Raises:
    UserError: There is no such function, or the user's code raises an exception. The message then
      names the line.
  """
  spec = importlib.util.spec_from_file_location("jaxgpt_config_file", os.path.abspath(path))
  if spec is None or spec.loader is None:
    raise UserError(f"--config={path}: not a Python file; give FILE.py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, function):
      raise UserError(f"--config={path}: no {function}() in it; define it, or give another file")
    return getattr(module, function)(*([arg] if arg else []))
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


def _from_file(path: str, arg: str) -> ml_collections.ConfigDict:
  """Calls the file's `get_config` and checks the keys of its result."""
  c = call(path, "get_config", arg)
  if not isinstance(c, ml_collections.ConfigDict):
    raise UserError(
      f"{path}: get_config() returned a {type(c).__name__}; return config.base() with your changes"
    )
  # The file may have replaced or unlocked the config, so its keys are compared with the declared.
  given, defaults = flatten(c), flatten(base())
  for key in sorted(given.keys() | KEYS.keys()):
    if not is_key(key):
      raise UserError(f"{path}: unknown key {key!r}; {nearest(key, KEYS)}start from config.base()")
    if key not in given:
      raise UserError(f"{path}: lacks the key {key!r}; start from config.base()")
    if given[key] is None and defaults.get(key) is not None:
      raise UserError(f"{path}: {key}=None; give it a value, such as {defaults[key]!r}")
  return c


def _override(c: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
  """Applies overrides through ml_collections' flag parser, which converts them to the key's type.

  That parser needs keys that exist. An option of the user's own that the file does not set takes
  the type that its value has as a Python literal.
  """
  known = []
  for override in overrides:
    key = _flat_key(override)
    if is_user_option(key) and key not in flatten(c):
      c.update_from_flattened_dict({key: _literal(override)})
    else:
      known.append(override)
  values = flags.FlagValues()
  argv = ["jaxgpt", *known]
  config_flags.DEFINE_config_dict("config", c, flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except (flags.Error, TypeError, ValueError) as e:
    raise UserError(str(e).removeprefix("flag ")) from e
  return values.config


def _literal(override: str) -> Any:
  """The value of '--config.objective.options.gamma=2': a Python literal, else a string."""
  _, equals, text = override.partition("=")
  if not equals:  # '--config.a.b' and '--noconfig.a.b' set booleans
    return not override.lstrip("-").startswith("no")
  if text in ("true", "false"):
    return text == "true"
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
