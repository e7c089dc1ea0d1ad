"""The part of the build that pyproject.toml cannot express: wheels carry the experiments.

`configs/` of a checkout becomes `jaxgpt/configs/` in a wheel, so that `jaxgpt demo` works without a
checkout and every installation has configs to start from.
"""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
  """Builds the package and adds the experiments."""

  def run(self) -> None:
    super().run()
    if self.editable_mode:  # an editable installation reads the checkout
      return
    folder = pathlib.Path(self.build_lib, "jaxgpt", "configs")
    for path in sorted(pathlib.Path("configs").rglob("*.py")):
      to = folder / path.relative_to("configs")
      to.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, to)


setup(cmdclass={"build_py": BuildWithConfigs})
