"""Text in other encodings than UTF-8."""

import json

import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.readers import documents


def read(path, data, **options):
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  dropped = documents.Dropped()
  found = list(documents.documents(documents.find(path), dropped=dropped, **options))
  assert dropped.read == len(found) + sum(dropped.counts.values())
  return found, dropped


@pytest.mark.parametrize(
  "encoding, mark", [("utf-16", True), ("utf-32", True), ("utf-16-be", False), ("cp1251", False)]
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_text_in_other_encodings(tmp_path, encoding, mark, suffix):
  text = "Жук" * 500
  content = {
    ".txt": text,
    ".jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n",
    ".json": json.dumps([{"text": text}], ensure_ascii=False),
    ".csv": f"text,n\r\n{text},1\r\n",
    ".tsv": f"n\ttext\n1\t{text}\n",
  }[suffix]
  path, data = (tmp_path / f"a{suffix}", content.encode(encoding))
  found, dropped = read(path, data, encoding=None if mark else encoding)
  assert [d.text for d in found] == [text] and not dropped.counts
  data = b"\xef\xbb\xbf" + content.encode()
  assert [d.text for d in read(path, data, encoding="cp1251")[0]] == [text], "a mark decides"


def test_bytes_that_an_encoding_does_not_allow_cost_their_record(tmp_path):
  path, data = (tmp_path / "a.jsonl", b'{"text": "\x82\xa0"}\n{"text": "\xff"}\n{"text": "x"}')
  found, dropped = read(path, data, encoding="shift_jis")
  assert [d.text for d in found] == ["あ", "x"] and dropped.counts == {"invalid utf-8": 1}
  assert "not --encoding=shift_jis" in dropped.examples["invalid utf-8"][0]


def test_the_way_out_of_another_encoding_is_said(tmp_path):
  _, dropped = read(tmp_path / "a.txt", "Grüße".encode("latin-1"))
  assert "--encoding, such as latin-1" in dropped.examples["invalid utf-8"][0]
  _, dropped = read(tmp_path / "a.txt", "Hello".encode("utf-16-be"))
  assert "--encoding=utf-16-be" in dropped.examples["binary"][0]
  for name in ("utf9", "base64", "a b", "utf-8\0", ""):
    if name:
      with pytest.raises(UserError, match="no such encoding"):
        read(tmp_path / "a.txt", "x", encoding=name)
