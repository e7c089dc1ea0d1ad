"""Files of tuned lenses: found in the run folder, and refused for weights of another checkpoint."""

import jax
import numpy as np
import pytest

from jaxgpt.analysis.interpret import lens_file, tuned_lens
from jaxgpt.commands import main
from jaxgpt.errors import UserError
from jaxgpt.inference import load


@pytest.fixture(scope="module")
def run(trained):
  return load.load(trained, devices=jax.local_devices()[:1])


@pytest.fixture(scope="module")
def maps(run):
  zeros = tuned_lens.none(run.parts.model.cfg)
  return jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), zeros)


def test_a_lens_is_found_in_the_folder_of_its_run(run, maps, tmp_path):
  assert lens_file.find(tmp_path, run) == (None, "")
  path = lens_file.path_of(tmp_path, 8)
  lens_file.write(path, maps, run)
  found, note = lens_file.find(tmp_path, run)
  assert found.path == path == tmp_path / "tuned_lens" / "8.npz" and not note
  jax.tree.map(np.testing.assert_array_equal, found.translators, maps)
  found, note = lens_file.find(tmp_path, run._replace(step=9))
  assert found is None and note == (
    f"no tuned lens for step 9: {tmp_path}/tuned_lens has one of step 8"
  )


def test_a_lens_of_other_weights_is_refused_by_name(run, maps, trained, tmp_path, capsys):
  path = tmp_path / "lens.npz"
  other = load.load(trained, 4, devices=jax.local_devices()[:1])
  lens_file.write(path, maps, other)
  page = tmp_path / "page.html"
  words = ["explain", f"--workdir={trained}", f"--out={page}", "--prompt=a", f"--lens={path}"]
  assert main.main(words) == 2 and not page.exists()
  said = capsys.readouterr().err
  assert f"{path} was trained for other weights: step 4, digest " in said
  assert f"“jaxgpt lens --workdir={trained} --step=8”" in said and said.count("\n") == 1
  assert lens_file.read(path, other, trained).path == path


@pytest.mark.parametrize(
  "content, message",
  [
    (None, "can't be read as a tuned lens"),
    (b"no zip", "can't be read as a tuned lens"),
    ({"a": np.zeros((2, 32, 32))}, "can't be read as a tuned lens"),
    ({"a": np.zeros((2, 32, 32)), "b": np.zeros((2, 32))}, "does not say which weights"),
  ],
)
def test_files_that_are_no_lens_of_a_run_are_refused(run, tmp_path, content, message):
  path = tmp_path / "lens.npz"
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif content:
    np.savez(path, **content)
  with pytest.raises(UserError, match=message):
    lens_file.read(path, run, "RUN")
