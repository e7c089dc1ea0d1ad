"""The law of imports (docs/design.md), annotations of public functions, and sizes of files."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "jaxgpt"

# The law of imports. `run` comes before `training`, whose loop writes the run folder.
PACKAGES = (
  "errors",
  "tree",
  "config",
  "storage",
  "text",
  "data",
  "parallel",
  "model",
  "run",
  "training",
  "inference",
  "tasks",
  "analysis",
  "hf",
  "plan",
  "commands",
  "__main__",
)
TEXT_ROOMS = ("readers", "filters", "tokenizers", "prepare")
WITHOUT_JAX = ("errors", "config", "storage", "text", "data")
MOST_FILES = 16  # in a folder
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 500, 80, 11
TABLES = ("hf.families", "config.presets")  # tables, which may be longer
SPECIAL = ("__init__", "__call__", "__enter__", "__exit__", "__iter__", "__getitem__", "__len__")
# Imported inside the function that needs them, with an error that names the extra to install.
OPTIONAL = {
  "qwix",
  "tensorboardX",
  "tokenizers",
  "tiktoken",
  "jinja2",
  "torch",
  "transformers",
  "llguidance",
  "lm_eval",
}


def modules() -> dict[str, pathlib.Path]:
  """{dotted name below `jaxgpt`: its file}, `__init__` files under the name of their package."""
  out = {}
  for path in sorted(ROOT.rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__")
    if name:
      out[name.rstrip(".")] = path
  return out


MODULES = modules()


def imports(path):
  """Names of all modules that a file imports, at the top and inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path):
  """The modules of jaxgpt that a file imports: the most specific name that is a module."""
  names = {name.removeprefix("jaxgpt.") for name in imports(path) if name.startswith("jaxgpt.")}
  names &= set(MODULES)
  return {n for n in names if not any(other.startswith(n + ".") for other in names)}


def test_every_module_has_a_package():
  tops = {name.split(".")[0] for name in MODULES}
  assert tops <= set(PACKAGES)
  assert [p for p in PACKAGES if p in tops] == sorted(tops, key=PACKAGES.index)
  files = [p.stem for p in ROOT.glob("*.py") if p.name != "__init__.py"]
  assert len(files) <= 3 and len(tops) - len(files) <= 15


def test_no_folder_is_crowded():
  for folder in {path.parent for path in MODULES.values()}:
    assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_from_above(name):
  rank = PACKAGES.index(name.split(".")[0])
  below = [n for n in ours(MODULES[name]) if PACKAGES.index(n.split(".")[0]) > rank]
  assert not below, f"{name} imports {below}, which come after it"


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("text.")])
def test_rooms_of_text_keep_their_order(name):
  room = name.split(".")[1]
  below = [
    n
    for n in ours(MODULES[name])
    if n.startswith("text.") and TEXT_ROOMS.index(n.split(".")[1]) > TEXT_ROOMS.index(room)
  ]
  assert not below, f"{name} imports {below}"


def test_no_import_cycles():
  edges = {name: ours(path) - {name} for name, path in MODULES.items()}
  done, path = set(), []

  def visit(name):
    assert name not in path, f"cycle: {' -> '.join([*path[path.index(name) :], name])}"
    if name in done:
      return
    path.append(name)
    for other in edges[name]:
      visit(other)
    done.add(path.pop())

  for name in edges:
    visit(name)


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] in WITHOUT_JAX])
def test_text_and_data_do_without_jax(name):
  heavy = [n for n in imports(MODULES[name]) if n.split(".")[0] in ("jax", "flax", "optax")]
  assert not heavy


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] != "commands"])
def test_imports_stand_at_the_top(name):
  inner = [
    n
    for f in ast.walk(ast.parse(MODULES[name].read_text()))
    if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
    for n in ast.walk(f)
    if isinstance(n, (ast.Import, ast.ImportFrom))
  ]
  optional = [
    n for n in inner if isinstance(n, ast.Import) and n.names[0].name.split(".")[0] in OPTIONAL
  ]
  assert len(inner) == len(optional), f"{name} imports inside a function"


def functions(path):
  """Yields (dotted name, node, whether it is public) for each function and method of a file."""

  def visit(node, prefix, public):
    for child in node.body:
      if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
        here = public and (not child.name.startswith("_") or child.name in SPECIAL)
        yield f"{prefix}{child.name}", child, here
      elif isinstance(child, ast.ClassDef):
        yield from visit(child, f"{prefix}{child.name}.", public and not child.name.startswith("_"))

  yield from visit(ast.parse(path.read_text()), "", True)


def unannotated(function):
  """Names of the arguments of a function that lack an annotation, and 'return'."""
  a = function.args
  arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
  out = [x.arg for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
  return out + (["return"] if function.returns is None and function.name != "__init__" else [])


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_annotated(name):
  lacking = {
    function: missing
    for function, node, public in functions(MODULES[name])
    if public and (missing := unannotated(node))
  }
  assert not lacking


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short(name):
  lines = len(MODULES[name].read_text().splitlines())
  assert name in TABLES or lines <= MOST_LINES
  for function, node, _ in functions(MODULES[name]):
    long = node.end_lineno - node.lineno + 1
    assert long <= MOST_FUNCTION_LINES, f"{function} has {long} lines"
    parameters = [x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    count = len([x for x in parameters if x not in ("self", "cls")])
    assert count <= MOST_PARAMETERS, f"{function} has {count} parameters"
