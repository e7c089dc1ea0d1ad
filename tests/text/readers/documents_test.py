"""Documents of each kind, and the account of what was left out."""

import json

import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.readers import documents as documents_lib

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "name": "x"}]


def write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(path, *values):
  path.write_text("".join(json.dumps(value) + "\n" for value in values))
  return path


def test_what_cannot_be_read_is_counted_and_the_rest_goes_on(tmp_path):
  lines = [
    b'{"text": "good"}',
    b"",
    b"{broken",
    b'{"body": "x"}',
    b'{"text": 3}',
    b'{"text": "\xff"}',
    b'{"text": " \\n"}',
    b'{"text": "\\ud800"}',
    b'["text"]',
    b'{"text": "last"}',
  ]
  write(tmp_path, {"a.jsonl": b"\n".join(lines), "b.txt": b"\xff", "c.txt": "", "d.txt": "fine"})
  dropped = documents_lib.Dropped()
  texts = [d.text for d in documents_lib.documents(documents_lib.find(tmp_path), dropped=dropped)]
  assert texts == ["good", "last", "fine"]
  assert dropped.counts == {
    "invalid json": 1,
    "missing field": 2,
    "wrong type": 1,
    "invalid utf-8": 3,
    "empty": 2,
  }
  assert (dropped.read, dropped.kept) == (12, 3)
  report = "\n".join(dropped.lines())
  assert "a.jsonl:3: " in report
  assert "b.txt: invalid start byte at byte 0" in report


@pytest.mark.parametrize("limit", [0, 2, 5])
def test_only_the_first_examples_of_a_rule_are_kept(tmp_path, limit):
  write(tmp_path, {"a.jsonl": "nonsense\n" * 100})
  dropped = documents_lib.Dropped(limit)
  assert list(documents_lib.documents(documents_lib.find(tmp_path), dropped=dropped)) == []
  assert dropped.counts == {"invalid json": 100}
  assert len(dropped.lines()) == 2 + limit, "and that the file gave nothing"


def test_accounts_of_parts_add_up_to_the_account_of_the_whole(tmp_path):
  write(
    tmp_path, {f"{i}.jsonl": '{"text": "x"}\n' + "bad\n" * i + '{"text": ""}\n' for i in range(4)}
  )
  whole, merged = documents_lib.Dropped(3), documents_lib.Dropped(3)
  list(documents_lib.documents(documents_lib.find(tmp_path), dropped=whole))
  for file in documents_lib.find(tmp_path):
    part = documents_lib.Dropped(3)
    list(documents_lib.documents([file], dropped=part))
    merged.merge(json.loads(json.dumps(part.to_json())))
  assert merged.to_json() == whole.to_json()
  assert whole.read == 14 and len(whole.examples["invalid json"]) == 3


@pytest.mark.parametrize(
  "kind, row, text, fields",
  [
    ("text", {"text": "a", "label": 1}, "a", {}),
    ("classification", {"text": "a", "label": "x"}, "a", {"text": "a", "label": "x"}),
    (
      "classification",
      {"text": "a", "text_pair": "b", "label": True},
      "a\nb",
      {"text": "a", "text_pair": "b", "label": 1},
    ),
    ("seq2seq", {"input": "a", "target": "b"}, "a\nb", {"input": "a", "target": "b"}),
    ("chat", {"messages": CHAT}, "hi\nhello", {"messages": CHAT}),
    ("chat", {"messages": json.dumps(CHAT)}, "hi\nhello", {"messages": CHAT}),
    (
      "preference",
      {"prompt": "a", "chosen": "b", "rejected": "c"},
      "a\nb\nc",
      {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    (
      "preference",
      {"chosen": "b", "rejected": "c"},
      "\nb\nc",
      {"prompt": "", "chosen": "b", "rejected": "c"},
    ),
  ],
)
def test_the_values_and_the_text_of_each_kind(tmp_path, kind, row, text, fields):
  path = rows(tmp_path / "a.jsonl", {**row, "id": 7})
  (document,) = documents_lib.documents(documents_lib.find(path), kind=kind)
  assert document == ("a.jsonl:1", text, "7", fields, False, None)
  assert type(document.fields.get("label")) is not bool


def test_other_columns_hold_the_values(tmp_path):
  path = rows(tmp_path / "a.jsonl", {"translation": {"de": "ja", "en": "yes"}, "input": "no"})
  (document,) = documents_lib.documents(
    documents_lib.find(path),
    kind="seq2seq",
    fields={"input": "translation.de", "target": "translation.en"},
  )
  assert document.fields == {"input": "ja", "target": "yes"}


def test_a_text_file_has_its_text_whatever_the_column_is_called(tmp_path):
  write(tmp_path, {"a.jsonl": '{"content": "x", "text": "y"}', "b.txt": "z"})
  found = documents_lib.documents(documents_lib.find(tmp_path), fields={"text": "content"})
  assert [d.text for d in found] == ["x", "z"]


@pytest.mark.parametrize("max_errors, ends", [(None, False), (3, False), (2, True), (0, True)])
def test_errors_end_the_run_where_the_user_says_so(tmp_path, max_errors, ends):
  write(tmp_path, {"a.jsonl": '{"text": ""}\n' * 9 + "bad\n" * 3 + '{"text": "x"}\n'})
  documents = documents_lib.documents(documents_lib.find(tmp_path), max_errors=max_errors)
  if not ends:
    assert [d.text for d in documents] == ["x"]
    return
  with pytest.raises(UserError, match=f"max_errors={max_errors}, such as .*a.jsonl:1"):
    list(documents)
  with pytest.raises(UserError, match=f"max_errors={max_errors}; repair"):
    list(
      documents_lib.documents(
        documents_lib.find(tmp_path), max_errors=max_errors, dropped=documents_lib.Dropped(0)
      )
    )


def test_chunks_join_to_the_text_and_end_after_lines():
  text = "ab\ncdefg\n\nhijklmnop"
  assert list(documents_lib.chunks(text, 4)) == ["ab\n", "cdef", "g\n\n", "hijk", "lmno", "p"]
  assert list(documents_lib.chunks("", 4)) == [""]
