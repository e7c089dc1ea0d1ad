"""Which layouts of a .json file are records, and which are one text."""

import pytest

from jaxgpt.storage import streams
from jaxgpt.text.readers import documents


def read(path, data, **options):
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  dropped = documents.Dropped()
  found = list(documents.documents(documents.find(path), dropped=dropped, **options))
  assert dropped.read == len(found) + sum(dropped.counts.values())
  return found, dropped


@pytest.mark.parametrize(
  "content, texts, missing",
  [
    ('[{"id": 1}, {"text": "a"}]', {2: "a"}, 1),
    ('[{"name": "x"}]', {}, 1),
    ('["a", "b", 3]', {1: "a", 2: "b"}, 1),
    ("[]", {}, 0),
    ('{"id": 1}\n{"text": "a"}', {2: "a"}, 1),
    ('{\n "text": "a"\n}', {1: "a"}, 0),
    ('{\n "id": 1\n}\n{\n "text": "a"\n} {"text": "b"}', {2: "a", 3: "b"}, 1),
    ('{"version": 2, "data": [{"id": 1}, {"text": "a"}]}', {2: "a"}, 1),
    ('{"Data": [{"question": "a"}], "more": [1]}', {}, 1),
    ('{"data": ["a", "b"]}', {1: "a", 2: "b"}, 0),
    (
      '{"notes": ["x"], "mine": [{"id": 1}, {"text": "a"}], "test": [{"text": "b"}]}',
      {2: "a", 3: "b"},
      1,
    ),
    ('{"x": "' + "x" * streams.BUFFER + '", "rows": [{"text": "a"}]}', {1: "a"}, 0),
    ('{"mine": [{"x": "' + "x" * streams.BUFFER + '"}], "rows": [{"text": "a"}]}', {1: "a"}, 0),
    ('{"rows": [{"x": "' + "x" * streams.BUFFER + '"}, {"text": "a"}]}', {2: "a"}, 1),
    (
      '{\n"text": "' + "x" * streams.BUFFER + '"}\n{"text": "a"}',
      {1: "x" * streams.BUFFER, 2: "a"},
      0,
    ),
    (
      '{"text": "' + "x" * streams.BUFFER + '"}\n{"text": "a"}',
      {1: "x" * streams.BUFFER, 2: "a"},
      0,
    ),
  ],
)
def test_records_of_a_json_file_in_any_layout(tmp_path, content, texts, missing):
  found, dropped = read(tmp_path / "a.json", content)
  assert {int(d.source.removeprefix("a.json:")): d.text for d in found} == texts
  assert dropped.counts == ({"missing field": missing} if missing else {})
  assert bool(dropped.notes) == (not texts)


def test_json_that_breaks_off_in_an_object_or_goes_on_after_it(tmp_path):
  for content in (
    '{"data": [{"text": "a"}], "x"',
    '{"data": [{"text": "a"}]} {"data": []}',
    '["a"] 1',
  ):
    found, dropped = read(tmp_path / "a.json", content)
    if content.startswith("{") and content.endswith("}"):  # objects without a column `text`
      assert not found and dropped.counts == {"missing field": 2}
    else:
      assert [d.text for d in found] == ["a"] and dropped.counts == {"invalid json": 1}
