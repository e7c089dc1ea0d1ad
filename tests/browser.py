"""A headless Chromium for tests of pages, by Playwright."""

import shutil

import pytest

CHROMIUM = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


@pytest.fixture(scope="module")
def browser():
  """Chromium, without a window."""
  playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'"
  )
  if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt-get install chromium")
  with playwright.sync_playwright() as p:
    found = p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    yield found
    found.close()
