"""No damaged file of a run or of its data goes unnoticed."""

import pytest

from tests.faults import corruption


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  return corruption.make_site(tmp_path_factory.mktemp("corruption"))


def check(found):
  bad = [c for c in found if c.outcome in (corruption.SILENT, corruption.CRASH)]
  assert not bad, "\n".join(corruption.summary(found))


@pytest.mark.slow
def test_damage_is_never_silent(site):
  found = corruption.cases(site, len(corruption.KINDS), seed=1)  # one of each kind
  check(found)
  assert {c.outcome for c in found} - {corruption.NO_EFFECT}


@pytest.mark.slow
def test_much_damage_is_never_silent(site):
  found = corruption.cases(site, 400, seed=0)
  check(found)
  wanted = {corruption.REFUSED, corruption.SAID, corruption.VERIFY}
  assert {c.outcome for c in found} >= wanted
