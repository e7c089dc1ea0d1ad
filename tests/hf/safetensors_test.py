import json

import ml_dtypes
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.hf import safetensors


def arrays():
  rng = np.random.default_rng(0)
  return {
    "a": rng.normal(size=(5, 7)).astype(np.float32),
    "b": rng.normal(size=(3, 4, 2)).astype(ml_dtypes.bfloat16),
    "c": rng.normal(size=(9,)).astype(np.float16),
  }


def write(folder, shard_bytes=1 << 20):
  folder.mkdir(exist_ok=True)
  there = arrays()
  entries = [safetensors.Entry(k, v.shape, v.dtype) for k, v in there.items()]
  return there, safetensors.write(folder, entries, lambda e: there[e.name], shard_bytes)


@pytest.mark.parametrize(
  "shard_bytes,files",
  [
    (1 << 20, ["model.safetensors"]),
    (
      200,
      [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
      ],
    ),
  ],
)
def test_what_is_written_is_read(tmp_path, shard_bytes, files):
  there, names = write(tmp_path / "m", shard_bytes)
  assert names == files and sorted(p.name for p in (tmp_path / "m").iterdir()) == sorted(files)
  found = safetensors.scan(tmp_path / "m")
  assert list(found) == list(there)
  for name, array in there.items():
    np.testing.assert_array_equal(safetensors.read(found[name]), array)
  np.testing.assert_array_equal(
    safetensors.read(found["a"], [(1, 4), (2, 6)]), there["a"][1:4, 2:6]
  )
  np.testing.assert_array_equal(
    safetensors.read(found["b"], [(2, 3), (0, 4), (1, 2)]), there["b"][2:3, :, 1:2]
  )


def test_small_blocks_read_the_same(tmp_path, monkeypatch):
  there, _ = write(tmp_path / "m")
  monkeypatch.setattr(safetensors, "_BLOCK", 60)
  tensor = safetensors.scan(tmp_path / "m")["a"]
  np.testing.assert_array_equal(safetensors.read(tensor, [(0, 5), (3, 7)]), there["a"][:, 3:])


def test_the_safetensors_package_reads_it(tmp_path):
  package = pytest.importorskip("safetensors.numpy")
  there, _ = write(tmp_path / "m")
  found = package.load_file(tmp_path / "m" / "model.safetensors")
  np.testing.assert_array_equal(found["a"], there["a"])
  np.testing.assert_array_equal(found["c"], there["c"])


def test_a_cut_file_is_refused_with_the_tensors_it_lacks(tmp_path):
  write(tmp_path / "m")
  path = tmp_path / "m" / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(UserError, match=r"is truncated: .* lacks 2 of 3 tensors, .*: b, c; download"):
    safetensors.scan(tmp_path / "m")


@pytest.mark.parametrize(
  "damage,message",
  [
    (
      lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
      "lacks 1 of 2 files .* model-00002-of-00002",
    ),
    (lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b"{}"), "not a safetensors"),
    (lambda f: (f / "model.safetensors.index.json").write_text("["), "index.json is broken"),
    (
      lambda f: (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"z": "model-00001-of-00002.safetensors"}})
      ),
      "does not hold z",
    ),
  ],
)
def test_damaged_folders_are_named(tmp_path, damage, message):
  write(tmp_path / "m", 200)
  damage(tmp_path / "m")
  with pytest.raises(UserError, match=message):
    safetensors.scan(tmp_path / "m")


def test_no_weights_and_pickles(tmp_path):
  with pytest.raises(UserError, match="holds neither model.safetensors nor"):
    safetensors.scan(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
    safetensors.scan(tmp_path)
