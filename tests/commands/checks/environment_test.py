"""The doctor's findings on JAX's packages, the cluster and the devices."""

import importlib.metadata
import subprocess
import sys
import threading

import pytest

from jaxgpt.commands.checks import environment
from jaxgpt.commands.checks.finding import OK, PROBLEM, WARNING


@pytest.fixture
def versions(monkeypatch):
  """The installed distributions with these in place; None: not installed."""
  changed = {}
  original = importlib.metadata.version

  def version(name):
    if name in changed and changed[name] is None:
      raise importlib.metadata.PackageNotFoundError(name)
    return changed.get(name) or original(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  return changed


@pytest.fixture
def tpu(monkeypatch, versions):
  """A machine with TPU chips and libtpu."""
  monkeypatch.setattr(environment.cluster_lib, "has_tpu_chips", lambda: True)
  versions["libtpu"] = "0.0.1"
  return versions


def said(findings, status, topic):
  return " | ".join(f.text for f in findings if (f.status, f.topic) == (status, topic))


def test_parts_of_jax_that_do_not_fit_are_a_problem(versions):
  assert not [f for f in environment.versions() if f.status == PROBLEM]
  versions["libtpu"] = "0.0.1"
  versions["jaxlib"] = "99.0"
  text = said(environment.versions(), PROBLEM, "versions")
  assert "libtpu 0.0.1 does not fit" in text and "pip install 'libtpu==" in text
  assert "jaxlib 99.0 does not fit" in text


@pytest.mark.parametrize(
  "version, wanted, want",
  [
    ("0.10.2", "<=0.10.2,>=0.10.0", True),
    ("0.10.3", "<=0.10.2,>=0.10.0", False),
    ("0.9.9", "<=0.10.2,>=0.10.0", False),
    ("0.0.42.1", "==0.0.42.*", True),
    ("0.0.421", "==0.0.42.*", False),
    ("0.12.0.1", "<=0.12.0.1,>=0.12.0.1", True),
    ("0.10.2.dev20260101", "<=0.10.2", True),
    ("0.0.42.dev20260101+nightly", "==0.0.42.*", True),
  ],
)
def test_versions_are_compared_as_numbers(version, wanted, want):
  assert environment.fits(version, wanted) == want


def test_tpu_chips_that_are_not_used(tpu, monkeypatch, tmp_path):
  assert "JAX_PLATFORMS=cpu leaves out" in said(environment.devices(), WARNING, "devices")
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(environment, "_LOCK", str(tmp_path / "lock"))
  assert "delete" in said(environment.devices(), PROBLEM, "devices")
  holder = subprocess.Popen(
    [sys.executable, "-c", f"f = open('{tmp_path}/lock', 'w'); print(1, flush=True); input()"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  try:
    holder.stdout.readline()
    assert f"process {holder.pid} (" in said(environment.devices(), PROBLEM, "devices")
  finally:
    holder.communicate(b"\n")
  tpu["libtpu"] = None
  assert "jaxgpt[tpu]" in said(environment.devices(), WARNING, "devices")


def test_a_libtpu_without_chips(versions, monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS")
  versions["libtpu"] = "0.0.1"
  assert "set JAX_PLATFORMS=cpu" in said(environment.devices(), WARNING, "devices")


@pytest.mark.parametrize(
  "plugin, platforms, words",
  [
    (None, None, "pip install 'jaxgpt[cuda]'"),
    ("0.1", "cpu", "JAX_PLATFORMS leaves it out"),
    ("0.1", None, "run nvidia-smi"),
  ],
)
def test_a_gpu_that_is_not_used(versions, monkeypatch, plugin, platforms, words):
  monkeypatch.setattr(environment.glob, "glob", lambda p: ["/dev/nvidia0"] if "nvidia" in p else [])
  versions["jax-cuda13-plugin"] = plugin
  monkeypatch.delenv("JAX_PLATFORMS")
  if platforms:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
  assert words in said(environment.devices(), WARNING, "devices")


def test_a_backend_that_does_not_start(monkeypatch):
  def broken():
    raise RuntimeError("Unable to initialize backend 'cuda'\nmore")

  monkeypatch.setattr(environment.jax, "devices", broken)
  assert "finds no device: Unable to initialize" in said(environment.devices(), PROBLEM, "devices")
  monkeypatch.setattr(environment.jax, "devices", threading.Event().wait)
  assert "does not start within 0.1 s" in environment._start_backend(0.1)[1]


def test_several_processes_are_told(monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
  assert "--coordinator" in said(environment.cluster(), PROBLEM, "processes")
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
  monkeypatch.setenv("JAX_PROCESS_ID", "1")
  assert "process 1 of 4" in said(environment.cluster(), OK, "processes")


def test_devices_are_named_with_their_memory(monkeypatch):
  class Device:
    device_kind, platform = "TPU v5 lite", "tpu"

    def memory_stats(self):
      return {"bytes_limit": 16_900_000_000}

  monkeypatch.setattr(environment.jax, "devices", lambda: [Device()] * 4)
  text = said(environment.devices(), OK, "devices")
  assert "4 x TPU v5 lite (tpu), 16.9 GB each" in text
