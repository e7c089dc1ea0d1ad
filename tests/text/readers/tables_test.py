"""An open quote in a .csv file costs one row, and another delimiter is found."""

import pytest

from jaxgpt.text.readers import documents


def read(path, data, **options):
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  dropped = documents.Dropped()
  found = list(documents.documents(documents.find(path), dropped=dropped, **options))
  assert dropped.read == len(found) + sum(dropped.counts.values())
  return found, dropped


ROWS = "".join(f"row {i},{i}\n" for i in range(300))


@pytest.mark.parametrize(
  "after, kept",
  [
    (ROWS, 301),  # never closed
    (ROWS + '"x, y",3\n' + ROWS, 602),  # closed by a quote that opens another field
    (ROWS + 'foo","3"\n' + ROWS, 602),  # closed by chance, with the right number of fields
    (ROWS + '"last' + ROWS, 600),  # two of them
  ],
)
@pytest.mark.parametrize("max_bytes", [1 << 20, 1500])
def test_an_open_quote_costs_one_row(tmp_path, after, kept, max_bytes):
  path, data = (tmp_path / "a.csv", 'text,n\na,1\n"open,2\n' + after)
  found, dropped = read(path, data, max_bytes=max_bytes)
  two = after.count('"last')
  assert len(found) == kept and dropped.counts == {"invalid csv": 1 + two}
  why = dropped.examples["invalid csv"][0]
  assert why.startswith("a.csv:3: a quote is opened in this row and not closed; the ")
  assert [d.source for d in found[:2]] == ["a.csv:2", "a.csv:4"]
  assert found[-1].source == f"a.csv:{3 + after.count(chr(10))}"


def test_an_open_quote_in_a_single_column_or_in_the_first_row(tmp_path):
  many = "".join(f"row {i}\n" for i in range(99))
  found, dropped = read(tmp_path / "a.csv", 'text\na\n"open\n' + many)
  assert len(found) == 100 and dropped.counts == {"invalid csv": 1}
  found, dropped = read(tmp_path / "a.csv", 'text\na\n"a text\ncut off')
  assert len(found) == 1 and "(lines 3 to 4)" in dropped.examples["invalid csv"][0]
  found, dropped = read(tmp_path / "a.csv", '"text,n\n' + ROWS)
  assert not found and "(lines 1 to 301)" in dropped.examples["invalid csv"][0]
  assert dropped.notes == {documents.NO_DOCUMENT: (1, ["a.csv"])}


def test_long_quoted_fields_are_texts(tmp_path):
  text = "a line, with a comma\n" * 15 + "a line\n" * 99
  found, dropped = read(tmp_path / "a.csv", f'text,n\n"{text}",1\n"{text}",2\n')
  assert [d.text for d in found] == [text, text] and not dropped.counts


def test_a_delimiter_is_named_or_suggested(tmp_path):
  path, data = (tmp_path / "a.csv", 'id;text\n1;"a;b"\n2;c,d\n')
  found, dropped = read(path, data)
  assert not found and dropped.examples["missing field"][0].endswith("give --delimiter=';'")
  assert [d.text for d in read(path, data, delimiter=";")[0]] == ["a;b", "c,d"]
