"""What each format's reader hands out: values, places, and faults that don't end the file."""

import csv
import gzip
import json
import sys

import pytest

from jaxgpt.errors import UserError
from jaxgpt.storage import files, streams
from jaxgpt.text.readers import documents, formats


def read_all(path, **options):
  dropped = documents.Dropped()
  found = list(documents.documents(documents.find(path), dropped=dropped, **options))
  assert dropped.read == len(found) + sum(dropped.counts.values())
  return found, dropped


def write(path, data):
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


def table(path, columns, **options):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  parquet.write_table(pyarrow.table(columns), path, **options)
  return path


def test_jsonl_ids_and_nested_columns(tmp_path):
  path = write(
    tmp_path / "a.ndjson",
    '\ufeff{"t": {"en": "hello"}, "n": 5}\n\n{"t": {"de": "hallo"}}\n{"t.en": "dotted"}',
  )
  found, dropped = read_all(path, fields={"text": "t.en", "id": "n"})
  assert [d[:3] for d in found] == [("a.ndjson:1", "hello", "5"), ("a.ndjson:4", "dotted", "")]
  assert dropped.examples == {"missing field": ["a.ndjson:3: no 't.en' in 't'"]}


def test_a_line_that_is_too_long_is_dropped_and_the_next_is_read(tmp_path):
  lines = [json.dumps({"text": c * n}) for c, n in (("a", 5), ("b", 5_000_000), ("c", 6))]
  found, dropped = read_all(write(tmp_path / "a.jsonl", "\n".join(lines)), max_bytes=2000)
  assert [(d.source, d.text) for d in found] == [("a.jsonl:1", "aaaaa"), ("a.jsonl:3", "cccccc")]
  assert dropped.examples == {"too long": ["a.jsonl:2: more than 2,000 bytes"]}
  exact = json.dumps({"text": "d" * 2000})
  found, _ = read_all(write(tmp_path / "b.jsonl", exact + "\n" + exact), max_bytes=len(exact))
  assert len(found) == 2, "the limit itself is allowed, with and without a line end"


def test_a_long_text_file_is_several_documents_cut_after_lines(tmp_path):
  text = "".join(f"Line {i} of à long tèxt.\n" for i in range(300)) + "a" + "€" * 2000
  found, _ = read_all(write(tmp_path / "a.txt", text), max_bytes=1500)
  assert "".join(d.text for d in found) == text
  assert all(len(d.text.encode()) <= 1500 for d in found)
  line = text[: text.index(found[1].text)].count("\n") + 1
  assert [d.source for d in found[:2]] == ["a.txt:1", f"a.txt:{line}"]


@pytest.mark.parametrize(
  "content",
  [
    '[{"text": "a", "id": 1}, {"text": "b]"}\n,\n{"x": [1, "]"], "text": "c"}]\n',
    '\ufeff [{"text": "a", "id": 1},{"text": "b]"},{"text": "c"}]',
    '{"text": "a", "id": 1}\n{"text": "b]"}\n{"text": "c"}',
  ],
)
def test_json_files_may_be_arrays_or_lines(tmp_path, content):
  found, dropped = read_all(write(tmp_path / "a.json", content))
  assert [(d.source, d.text) for d in found] == [
    ("a.json:1", "a"),
    ("a.json:2", "b]"),
    ("a.json:3", "c"),
  ]
  assert found[0].id == "1" and not dropped.counts


@pytest.mark.parametrize(
  "content",
  ['{"name": "x"}', "[1, 2]", "{", "[", '{"a": [1], "b": {"text": "x"}}', "not json at all"],
)
def test_other_json_files_are_texts(tmp_path, content):
  found, dropped = read_all(write(tmp_path / "a.json", content))
  assert [d.text for d in found] == [content]
  assert dropped.lines() == ["JSON files without records, each read as one text: 1, such as a.json"]


def test_arrays_are_read_in_parts_and_end_where_they_break(tmp_path):
  rows = [json.dumps({"text": str(i) * 400}) for i in range(9000)]
  path = write(tmp_path / "a.json", "[" + ",\n".join(rows))  # 4 buffers, no closing bracket
  found, dropped = read_all(path)
  assert [d.text for d in found] == [str(i) * 400 for i in range(9000)]
  assert dropped.counts == {"invalid json": 1}
  found, dropped = read_all(write(path, '[{"text": "a"}, {"text": "b" "c"}, {"text": "d"}]'))
  assert [d.text for d in found] == ["a"] and "left out" in dropped.examples["invalid json"][0]
  found, dropped = read_all(write(path, b'[{"text": "\xff"}, 3, {"text": "e"}]'))
  assert [d.text for d in found] == ["e"]
  assert dropped.counts == {"invalid utf-8": 1, "missing field": 1}


def test_a_number_between_two_parts_of_an_array_is_one(tmp_path):
  start = '[{"text": "a"}, {"x": "'
  filler = "x" * (streams.BUFFER - len(start) - 6)
  path = write(tmp_path / "a.json", start + filler + '"}, 123456, {"text": "b"}]')
  found, dropped = read_all(path)
  assert [d.text for d in found] == ["a", "b"] and dropped.counts == {"missing field": 2}


def test_csv_fields_may_hold_commas_quotes_and_line_ends(tmp_path):
  rows = [["id", "text"], ["1", 'a, "b"\nc'], ["2", "d"], ["3", ""]]
  with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as f:
    csv.writer(f).writerows(rows)
  found, dropped = read_all(tmp_path / "a.csv")
  assert [d[:3] for d in found] == [("a.csv:2", 'a, "b"\nc', "1"), ("a.csv:4", "d", "2")]
  assert dropped.examples == {"empty": ["a.csv:5: no text but white space"]}


def test_broken_csv_rows_are_named_and_the_next_are_read(tmp_path):
  content = (
    b'text,n\na,1\nb\n"c"x,3\n\xff,4\n\0,5\n\n'
    + b"d" * 3000
    + b',6\n"'
    + b"e" * 900
    + b"\n"
    + b"e" * 900
    + b'",7\nf,8\n"half'
  )
  found, dropped = read_all(write(tmp_path / "a.csv", content), max_bytes=1024)
  assert [(d.source, d.text) for d in found] == [("a.csv:2", "a"), ("a.csv:11", "f")]
  assert dropped.counts == {"invalid csv": 3, "invalid utf-8": 1, "binary": 1, "too long": 2}
  assert dropped.examples["invalid csv"][0] == "a.csv:3: 1 fields, the first row has 2"


def test_a_quote_in_a_tsv_file_is_a_character(tmp_path):
  found, _ = read_all(
    write(tmp_path / "a.tsv", 'text\tlabel\n"a\tx\nb"\ty\n'), kind="classification"
  )
  assert [(d.text, d.fields["label"]) for d in found] == [('"a', "x"), ('b"', "y")]


@pytest.mark.parametrize(
  "header, why",
  [("body,n", "no column 'text' in 'body', 'n'"), ("text,text", "more than one column 'text'")],
)
def test_a_table_without_the_column_is_named_once(tmp_path, header, why):
  found, dropped = read_all(write(tmp_path / "a.csv", f"{header}\na,1\nb,2\n"))
  assert not found and dropped.examples == {"missing field": [f"a.csv:1: {why}"]}


def test_parquet_rows_are_numbered_across_row_groups(tmp_path):
  path = table(
    tmp_path / "a.parquet",
    {"text": [f"t{i}" for i in range(1000)], "n": range(1000)},
    row_group_size=300,
  )
  found, _ = read_all(path, fields={"id": "n"})
  assert [d[:3] for d in found] == [(f"a.parquet:{i + 1}", f"t{i}", str(i)) for i in range(1000)]


def test_parquet_nested_values_and_nulls(tmp_path):
  path = table(
    tmp_path / "a.parquet",
    {
      "messages": [[{"role": "user", "content": "hi"}], None, []],
      "meta": [{"id": "x"}, None, None],
    },
  )
  found, dropped = read_all(path, kind="chat", fields={"id": "meta.id"})
  assert [(d.text, d.id) for d in found] == [("hi", "x")]
  assert found[0].fields == {"messages": [{"role": "user", "content": "hi"}]}
  assert dropped.counts == {"missing field": 1, "empty": 1}


def test_a_parquet_file_without_the_column_drops_all_its_rows(tmp_path):
  _, dropped = read_all(table(tmp_path / "a.parquet", {"body": ["a", "b", "c"]}))
  assert dropped.counts == {"missing field": 3}
  assert dropped.examples["missing field"] == ["a.parquet: no column 'text' in 'body'"]


def test_a_broken_row_group_leaves_the_others(tmp_path):
  texts = [f"{i} " + str(i * 7919) * 20 for i in range(600)]
  path = table(
    tmp_path / "a.parquet",
    {"text": texts},
    row_group_size=200,
    compression="none",
    use_dictionary=False,
    write_page_checksum=True,
  )
  data = bytearray(path.read_bytes())
  at = data.index(b"300 ")
  data[at - 40_000 : at + 2000] = bytes(42_000)
  path.write_bytes(data)
  found, dropped = read_all(path)
  assert {d.source for d in found} >= {f"a.parquet:{i}" for i in range(401, 601)}
  assert dropped.read == 600 and list(dropped.counts) == ["unreadable"]
  path.write_bytes(data[:-100])
  found, dropped = read_all(path)
  assert not found and dropped.counts == {"unreadable": 1}


def test_a_parquet_string_that_is_no_utf8_costs_one_row(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  strings = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
  found, dropped = read_all(table(tmp_path / "a.parquet", {"text": strings}))
  assert [d.source for d in found] == ["a.parquet:1", "a.parquet:3"]
  assert dropped.counts == {"invalid utf-8": 1}


def warc(kind, payload, http=None, **headers):
  """One record as a WARC file holds it."""
  if http is not None:
    payload = f"HTTP/1.1 {http}\r\n\r\n".encode() + payload
  names = {
    "WARC-Type": kind,
    "WARC-Record-ID": f"<urn:uuid:{len(payload)}>",
    "Content-Type": "application/http; msgtype=response" if http else "text/plain",
    "Content-Length": len(payload),
    **headers,
  }
  head = "WARC/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in names.items()) + "\r\n"
  return head.encode() + payload + b"\r\n\r\n"


def test_wet_records_are_texts(tmp_path):
  pytest.importorskip("warcio")
  data = (
    warc("warcinfo", b"software: x")
    + warc("conversion", "Grüße\n".encode())
    + warc("conversion", b"\xff")
    + warc("conversion", b"x" * 3000)
    + warc("conversion", b"last")
  )
  members = b"".join(gzip.compress(r) for r in (data[:100], data[100:]))
  found, dropped = read_all(write(tmp_path / "a.warc.wet.gz", members), max_bytes=1024)
  assert [d[:3] for d in found] == [
    ("a.warc.wet.gz:2", "Grüße\n", "urn:uuid:8"),
    ("a.warc.wet.gz:5", "last", "urn:uuid:4"),
  ]
  assert dropped.counts == {"invalid utf-8": 1, "too long": 1}


def test_warc_responses_are_marked_as_html_and_decoded(tmp_path):
  pytest.importorskip("warcio")
  html = "200 OK\r\nContent-Type: text/html"
  data = (
    warc("request", b"", "200")
    + warc("response", "é".encode(), html)
    + warc("response", "é".encode("latin-1"), html + "; charset=ISO-8859-1")
    + warc("response", "<meta charset='cp1251'>Ж".encode("cp1251"), html)
    + warc("response", "“".encode("cp1252"), html)
    + warc("response", gzip.compress(b"zipped"), html + "\r\nContent-Encoding: gzip")
    + warc("response", b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", html + "\r\nTransfer-Encoding: chunked")
    + warc("response", b"gone", "404 Not Found\r\nContent-Type: text/html")
    + warc("response", b"GIF89a", "200 OK\r\nContent-Type: image/gif")
    + warc("response", b"plain", "200 OK\r\nContent-Type: text/plain")
  )
  found, dropped = read_all(write(tmp_path / "a.warc", data))
  assert [d.text for d in found] == [
    "é",
    "é",
    "<meta charset='cp1251'>Ж",
    "“",
    "zipped",
    "abc",
    "plain",
  ]
  assert [d.html for d in found] == [True] * 6 + [False]
  assert dropped.counts == {"http status": 1, "not text": 1}


def test_a_cut_warc_file_keeps_what_came_before(tmp_path):
  pytest.importorskip("warcio")
  data = warc("conversion", b"first") + warc("conversion", b"second is cut")
  found, dropped = read_all(write(tmp_path / "a.warc", data[:-10]))
  assert [d.text for d in found] == ["first"] and dropped.counts == {"unreadable": 1}
  found, dropped = read_all(write(tmp_path / "b.warc", data[:-20].replace(b"WARC/1.0", b"x", 1)))
  assert not found and dropped.counts == {"invalid warc": 1}


@pytest.mark.parametrize("cut", [1, 9, 200, 3000])
def test_a_compressed_warc_file_that_is_cut_keeps_all_records_before_the_cut(tmp_path, cut):
  pytest.importorskip("warcio")
  texts = [f"{i} {i * 7919} " * 20 for i in range(100)]
  members = [gzip.compress(warc("conversion", text.encode())) for text in texts]
  data = b"".join(members)[:-cut]
  whole = sum(sum(map(len, members[: i + 1])) <= len(data) for i in range(100))
  found, dropped = read_all(write(tmp_path / "a.warc.gz", data))
  assert [d.text for d in found][:whole] == texts[:whole] and len(found) <= whole + 1
  assert dropped.counts == {"unreadable": 1}
  one = gzip.compress(b"".join(warc("conversion", text.encode()) for text in texts), 0)
  found, dropped = read_all(write(tmp_path / "b.warc.gz", one[:-cut]))
  assert [d.text for d in found] == texts[: len(found)]
  assert dropped.counts == {"unreadable": 1} and (len(found) > 90 or cut > 9)


def test_html_files_are_marked(tmp_path):
  found, _ = read_all(write(tmp_path / "a.html", "<p>x"))
  assert [(d.source, d.text, d.html) for d in found] == [("a.html", "<p>x", True)]


def test_a_named_format_overrides_the_suffix(tmp_path):
  path = write(tmp_path / "download", '{"text": "x"}')
  assert read_all(path)[0][0].text == '{"text": "x"}'
  assert read_all(path, form="jsonl")[0][0].text == "x"
  with pytest.raises(UserError, match="format='xls': choose one of text, jsonl"):
    documents.documents(documents.find(path), form="xls")


@pytest.mark.parametrize("size", [1, 700, 3000, 10**6])
@pytest.mark.parametrize("end", ["\n", ""])
def test_ranges_of_a_file_hold_the_same_documents(tmp_path, size, end):
  lines = [json.dumps({"text": f"{i} " * (i % 60) + "x"}) for i in range(200)]
  lines[7:9] = ["", "{broken"]
  path = write(tmp_path / "a.jsonl", "\n".join(lines) + end)
  whole, dropped = read_all(path)
  ranges = formats.split(documents.find(path), size)
  assert sum(r.size for r in ranges) == path.stat().st_size
  assert (len(ranges) > 1) == (size < 10**6)
  account, found = documents.Dropped(), []
  for r in json.loads(json.dumps(ranges)):
    part = documents.Dropped()
    found += documents.documents([files.File(*r)], dropped=part)
    account.merge(part.to_json())
  assert found == whole and account.to_json() == dropped.to_json()


def test_only_plain_local_json_lines_are_cut(tmp_path):
  write(tmp_path / "a.txt", "x\n" * 1000)
  write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000))
  write(tmp_path / "c.jsonl", gzip.compress(b'{"text": "x"}\n' * 1000))
  listed = documents.find(tmp_path)
  assert formats.split(listed, 10) == listed
  assert len(read_all(tmp_path)[0]) == 2001


def test_a_file_is_cut_by_the_format_that_reads_it(tmp_path):
  write(tmp_path / "a.jsonl", '{"text": "x"}\n' * 1000)
  write(tmp_path / "b.txt", '{"text": "x"}\n' * 1000)
  for form, count in ((None, 1001), ("text", 2), ("csv", 0), ("jsonl", 2000)):
    listed = documents.find(tmp_path)
    ranges = formats.split(listed, 3000, name=form)
    assert (len(ranges) > 2) == (form in (None, "jsonl"))
    found = list(documents.documents(ranges, form=form))
    assert found == read_all(tmp_path, form=form)[0] and len(found) == count


def test_a_missing_extra_is_said_before_the_first_document(tmp_path, monkeypatch):
  write(tmp_path / "a.parquet", b"")
  for name in ("pyarrow", "pyarrow.parquet"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(UserError, match=r"a.parquet needs .*pip install 'jaxgpt\[data\]'"):
    documents.documents(documents.find(tmp_path))
