"""XLA's description of a GPU that is not present."""

import pytest

from jaxgpt.errors import UserError
from jaxgpt.parallel import chips
from jaxgpt.plan import gpu_target_config, topology

CUDA_13 = {
  "jax-cuda13-plugin": "0.12.0",
  "nvidia-cudnn-cu13": "9.12.3.4",
  "nvidia-cuda-runtime": "13.0.96",
}
CUDA_12 = {
  "jax-cuda12-plugin": "0.12.0",
  "nvidia-cudnn-cu12": "9.10.2.21",
  "nvidia-cuda-runtime-cu12": "12.9.79",
}


def install(monkeypatch, versions):
  monkeypatch.setattr(gpu_target_config.installed, "version", versions.get)


def test_a_description_has_the_installed_versions(monkeypatch):
  install(monkeypatch, CUDA_13)
  text = gpu_target_config.target_config(chips.CHIPS["a100"].gpu)
  assert "dnn_version_info { major: 9 minor: 12 patch: 3 }" in text
  assert "runtime_version { major: 13 minor: 0 patch: 96 }" in text
  assert "cuda_compute_capability { major: 8 minor: 0 feature_extension: NONE }" in text
  assert "shared_memory_per_block_optin: 166912" in text and "core_count: 108" in text
  assert "major: 9 minor: 0 feature_extension: ACCELERATED" in gpu_target_config.target_config(
    chips.CHIPS["h100"].gpu
  )


def test_the_versions_are_those_of_the_plugins_own_libraries(monkeypatch):
  # PyTorch may bring the libraries of another CUDA.
  install(monkeypatch, CUDA_12 | {"nvidia-cudnn-cu13": "9.12.3.4"})
  text = gpu_target_config.target_config(chips.CHIPS["a100"].gpu)
  assert "dnn_version_info { major: 9 minor: 10 patch: 2 }" in text
  assert "runtime_version { major: 12 minor: 9 patch: 79 }" in text


@pytest.mark.parametrize(
  "versions, words",
  [
    ({}, r"needs JAX's CUDA plugin and NVIDIA's libraries: pip install 'jaxgpt\[cuda\]'"),
    (
      {"jax-cuda12-plugin": "0.12.0", "nvidia-cudnn-cu12": "9.10.2.21"},
      r"jax-cuda12-plugin reads the version of nvidia-cuda-runtime-cu12, which is not installed: "
      "pip install nvidia-cuda-runtime-cu12",
    ),
  ],
)
def test_what_is_not_installed_is_named(versions, words, monkeypatch):
  install(monkeypatch, versions)
  with pytest.raises(UserError, match=words):
    topology.devices(topology.parse("h100x8"))
