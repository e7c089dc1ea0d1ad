"""A trained run, opened for compression, and calibration text of its data."""

import pytest

from jaxgpt.analysis.compression import compressed_run


@pytest.fixture(scope="module")
def opened(trained):
  return compressed_run.opened(trained)


@pytest.fixture(scope="module")
def text(opened):
  return compressed_run.calibrated(opened, compressed_run.Calibration(rows=16))[0]
