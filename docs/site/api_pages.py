"""MkDocs hook: one API page per package, from the docstrings of its public modules."""

import ast
import pathlib

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "jaxgpt"


def modules_by_package() -> dict[str, list[str]]:
  """{package: dotted names of its public modules}; modules at the top belong to `jaxgpt`."""
  pages: dict[str, list[str]] = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
      parts = parts[:-1]
    if any(part.startswith("_") for part in parts) or len(parts) == 1:
      continue
    if not ast.get_docstring(ast.parse(path.read_text())):
      continue  # an empty __init__
    package = parts[1] if (PACKAGE / parts[1]).is_dir() else "jaxgpt"
    pages.setdefault(package, []).append(".".join(parts))
  return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Replaces the navigation's entry `API: api/` by the generated pages."""
  pages = [{package: f"api/{package}.md"} for package in modules_by_package()]
  for section in config.nav:
    for entry in next(iter(section.values())):
      if isinstance(entry, dict) and entry.get("API") == "api/":
        entry["API"] = pages
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the generated pages."""
  for package, modules in modules_by_package().items():
    title = f"jaxgpt.{package}" if package != "jaxgpt" else "jaxgpt"
    text = f"---\nsearch:\n  boost: 0.5\n---\n\n# API: {title}\n\n" + "".join(
      f"::: {name}\n\n" for name in modules
    )
    files.append(File.generated(config, f"api/{package}.md", content=text))
  return files
