"""XLA's description of a GPU that is not present."""

from jaxgpt.parallel import chips
from jaxgpt.plan import gpu_target_config


def test_a_description_has_the_installed_versions(monkeypatch):
  monkeypatch.setattr(
    gpu_target_config.installed,
    "version",
    {"nvidia-cudnn-cu13": "9.12.3.4", "nvidia-cuda-runtime": "13.0.96"}.get,
  )
  text = gpu_target_config.target_config(chips.CHIPS["a100"].gpu)
  assert "dnn_version_info { major: 9 minor: 12 patch: 3 }" in text
  assert "runtime_version { major: 13 minor: 0 patch: 96 }" in text
  assert "cuda_compute_capability { major: 8 minor: 0 feature_extension: NONE }" in text
  assert "shared_memory_per_block_optin: 166912" in text and "core_count: 108" in text
  assert "major: 9 minor: 0 feature_extension: ACCELERATED" in gpu_target_config.target_config(
    chips.CHIPS["h100"].gpu
  )
