"""User files: objects that a Python file next to a user's config defines, named FILE.py:NAME.

`c.optim.name = "my_optimizer.py:Sophia"` means the object `Sophia` of the file `my_optimizer.py`.
The file is found in `c.code_folder`, which `config.load` sets to the config file's folder. A run
folder holds copies of the files and reads them from there (`run.run_folder`), so a run can be used
after the originals have gone. Each file must stand alone: it may import installed packages, but not
its neighbours, which no run folder would hold.
"""

import contextlib
import hashlib
import linecache
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator
from typing import TypeVar

import ml_collections
from etils import epath

from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError

T = TypeVar("T")

_SEPARATOR = ".py:"
_MODULES: dict[tuple[str, str], types.ModuleType] = {}  # (path, digest) -> executed module


def is_user_defined(name: str) -> bool:
  """True for FILE.py:NAME, False for the name of a registry's entry."""
  return _SEPARATOR in name


def find(registry: Registry[T], kind: type[T], name: str, folder: epath.PathLike) -> T:
  """The object that a config key names: a registry's entry, or one that a user's file defines.

  Args:
    registry: The built-in objects. Its `setting` is the config key, such as 'optim.name'.
    kind: Class that the object must have.
    name: The key's value: a name of the registry, or FILE.py:NAME.
    folder: The folder that FILE.py is relative to.

  Raises:
    UserError: There is no such entry, file or object, it is not a `kind`, or executing the file
      fails. The message then names the file and the line.
  """
  if not is_user_defined(name):
    return registry.find(name)
  setting = f"{registry.setting}={name!r}"
  file, attribute = _split(setting, name)
  module = _module(setting, file, folder)
  defined = [key for key, value in vars(module).items() if isinstance(value, kind)]
  if not hasattr(module, attribute):
    there = f"the file has {', '.join(defined)}" if defined else "define it"
    raise UserError(
      f"{setting}: {file} has no {attribute!r}; {there}: {attribute} = {kind.__name__}(…)"
    )
  found = getattr(module, attribute)
  if not isinstance(found, kind):
    raise UserError(
      f"{setting}: {attribute} is a {type(found).__name__}, not a {kind.__name__}; write "
      f"{attribute} = {kind.__name__}(…), with {kind.__name__} from {kind.__module__}"
    )
  return found


@contextlib.contextmanager
def reading_options(setting: str, c_section: ml_collections.ConfigDict) -> Iterator[None]:
  """Names an option that a user's function reads in this context but the config does not set.

  As a decorator it makes each call of a function such a context.

  Args:
    setting: The config key that names the object, such as 'optim.name'.
    c_section: Its section, with `name` and `options`.

  Raises:
    UserError: An option is not set.
  """
  try:
    yield
  except AttributeError as e:
    frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
    reader = frames[-1].f_locals  # of ConfigDict.__getattr__
    if reader.get("self") is not c_section.options or "attribute" not in reader:
      raise
    key = f"{setting.removesuffix('.name')}.options.{reader['attribute']}"
    raise UserError(
      f"{key} is not set, but {setting}={c_section.name!r} reads it; add --config.{key}=VALUE"
    ) from e


def files(c: ml_collections.ConfigDict) -> dict[str, str]:
  """Reads the user files that a config names.

  Args:
    c: A config with its `code_folder`.

  Returns:
    {file relative to `c.code_folder`: its text}.

  Raises:
    UserError: A file cannot be read.
  """
  out = {}
  for setting, name in names(c).items():
    file, _ = _split(f"{setting}={name!r}", name)
    out[file] = _read(f"{setting}={name!r}", file, c.code_folder)
  return out


def names(c: ml_collections.ConfigDict) -> dict[str, str]:
  """{flat key: FILE.py:NAME} of the user-defined objects that a config names.

  Args:
    c: A config. Every section may have a key `name`.
  """
  sections = {key: c[key] for key in c if isinstance(c[key], ml_collections.ConfigDict)}
  named = {f"{key}.name": section.get("name", "") for key, section in sections.items()}
  return {setting: name for setting, name in named.items() if is_user_defined(name)}


def digest(text: str) -> str:
  """SHA-256 of a user file, in hexadecimal."""
  return hashlib.sha256(text.encode()).hexdigest()


def _split(setting: str, name: str) -> tuple[str, str]:
  """('a.py', 'B') of 'a.py:B'."""
  file, _, attribute = name.rpartition(":")
  path = pathlib.PurePosixPath(file)
  if path.is_absolute() or ".." in path.parts:
    raise UserError(
      f"{setting}: the file must be relative to the config file and next to it or below, since run "
      "folders keep a copy under the same name; move it there"
    )
  if not attribute.isidentifier():
    raise UserError(f"{setting}: write FILE.py:NAME, with the NAME of an object in the file")
  return file, attribute


def _read(setting: str, file: str, folder: epath.PathLike) -> str:
  path = epath.Path(folder or ".") / file
  try:
    return path.read_text()
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(
      f"{setting}: {path} cannot be read ({getattr(e, 'strerror', None) or e}); the path is "
      "relative to the config file"
    ) from e


def _module(setting: str, file: str, folder: epath.PathLike) -> types.ModuleType:
  """Executes a user file, once per process and content."""
  text, path = _read(setting, file, folder), str(epath.Path(folder or ".") / file)
  key = path, digest(text)
  if key in _MODULES:
    return _MODULES[key]
  # The name is unique, so that two versions of a file do not replace each other. Dataclasses look
  # their module up in sys.modules while the file is executed.
  module = types.ModuleType(f"jaxgpt_user_{key[1][:12]}_{pathlib.PurePosixPath(file).stem}")
  module.__file__ = path
  sys.modules[module.__name__] = module
  # Tracebacks show the lines that were executed, also of a file in a bucket.
  linecache.cache[path] = len(text), None, text.splitlines(keepends=True), path
  try:
    exec(compile(text, path, "exec"), vars(module))
  except Exception as e:  # a user's code may raise anything
    del sys.modules[module.__name__]
    raise UserError(f"{setting}: {_place(e, path)}: {type(e).__name__}: {_one_line(e)}") from e
  _MODULES[key] = module
  return module


def _place(error: Exception, path: str) -> str:
  """'FILE:LINE' of the last line of the file that an exception passed through."""
  if isinstance(error, SyntaxError):
    return f"{path}:{error.lineno}"
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  return f"{path}:{lines[-1]}" if lines else path


def _one_line(error: Exception) -> str:
  return " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
