"""Writes docs/config.md: the keys of the base config with their defaults and comments.

python -m jaxgpt.config.reference > docs/config.md
"""

import inspect
import re

from jaxgpt.config import keys, presets

_SECTION = re.compile(r"  (\w)\.(\w+) = (\w) = ml_collections\.ConfigDict\(\)")
_KEY = re.compile(r"  (\w)\.(\w+) = (.+?)  # (.+)")

_HEAD = """# Config keys

Generated from `jaxgpt/config/keys.py` by `python -m jaxgpt.config.reference > docs/config.md`; a test keeps
the two equal. Any key can be set in a config file (`c.optim.lr = 3e-4`) and on the command line
(`--config.optim.lr=3e-4`, `--noconfig.data.shuffle`). A default of *derived* follows from other
keys, as the comment says. An unknown key is an error that names the nearest one.
"""


def entries():
  """[(section, key, default, comment)] in declaration order, read off the text of `keys`."""
  sections, out = {"c": ""}, []
  for line in inspect.getsource(keys).splitlines():
    if m := _SECTION.fullmatch(line):
      sections[m[3]] = f"{sections[m[1]]}.{m[2]}".lstrip(".")
    elif m := _KEY.fullmatch(line):
      default = "*derived*" if "placeholder" in m[3] else f"`{m[3]}`"
      out.append((sections[m[1]], m[2], default, m[4]))
  return out


def text():
  """docs/config.md as a string."""
  parts, last = [_HEAD], None
  for section, key, default, comment in entries():
    if section != last:
      parts.append(f"\n## {section or 'top level'}\n\n| key | default | meaning |\n|---|---|---|\n")
      last = section
    name = f"{section}.{key}" if section else key
    comment = comment.replace("|", "\\|")
    parts.append(f"| `{name}` | {default} | {comment} |\n")
  parts.append(
    "\n## Presets\n\n`c.model.update(config.preset(NAME))` fills the `model` section "
    "with a published architecture: " + ", ".join(f"`{name}`" for name in presets.PRESETS) + ".\n"
  )
  parts.append(
    "\n## What may change when a run goes on\n\n"
    "A run folder refuses another config, but for the keys under "
    + ", ".join(f"`{key}`" for key in keys.FREE_ON_RESUME)
    + ": they don't change what is computed.\n"
  )
  return "".join(parts)


if __name__ == "__main__":
  print(text(), end="")
