"""Which files a path, a folder, a pattern or an address stands for."""

import os
import pathlib
import sys

import pytest

from jaxgpt.errors import UserError
from jaxgpt.storage import files
from jaxgpt.storage.passed_over import PassedOver
from jaxgpt.text.readers import documents

TREE = {
  "b.txt": "two\r\n",
  "a/z.md": "one",
  "a/__pycache__/x.txt": "no",
  ".git/c.txt": "no",
  ".hidden.txt": "no",
  "image.png": "no",
  "c.py": b"\xef\xbb\xbfthree",
  "a/d/e.jsonl.gz": "x",
  "a[1].txt": "four",
}
LISTED = [
  "corpus/a/d/e.jsonl.gz",
  "corpus/a/z.md",
  "corpus/a[1].txt",
  "corpus/b.txt",
  "corpus/c.py",
]


def write(folder, tree):
  for name, content in tree.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def sources(*args):
  return [file.source for file in documents.find(*args)]


def test_a_folder_is_searched_in_sorted_order_without_hidden_and_unknown_files(tmp_path):
  write(tmp_path / "corpus", TREE)
  assert sources(tmp_path / "corpus") == LISTED
  assert sources(f"file://{tmp_path}/corpus") == LISTED


def test_sources_do_not_depend_on_where_the_folder_is(tmp_path, monkeypatch):
  for place in ("here", "there/deeper"):
    write(tmp_path / place / "corpus", TREE)
    assert sources(tmp_path / place / "corpus") == LISTED
  monkeypatch.chdir(tmp_path / "here" / "corpus")
  assert sources(".") == LISTED


def test_patterns_and_files_given_twice_are_listed_once(tmp_path):
  write(tmp_path, {"a.txt": "a", "d/b.txt": "b", "d/e/c.log": "c", "d/.x/y.txt": "no"})
  paths = [f"{tmp_path}/**/*.txt", tmp_path / "a.txt", f"{tmp_path}/d/*/*.log"]
  assert [pathlib.Path(f.address).name for f in documents.find(paths)] == [
    "a.txt",
    "b.txt",
    "c.log",
  ]


@pytest.mark.parametrize(
  "exclude, left",
  [
    ((), ["keep/a.txt", "src/a.txt", "tests/t.txt", "tests/x/b.txt"]),
    (("tests",), ["keep/a.txt", "src/a.txt"]),
    (("test*",), ["keep/a.txt", "src/a.txt"]),
    (("keep/*",), ["src/a.txt", "tests/t.txt", "tests/x/b.txt"]),
    ("*b*", ["keep/a.txt", "src/a.txt", "tests/t.txt"]),
  ],
)
def test_exclude_matches_any_part_below_the_given_folder(tmp_path, exclude, left):
  root = tmp_path / "test_root"
  write(root, {"keep/a.txt": "x", "src/a.txt": "x", "tests/t.txt": "x", "tests/x/b.txt": "x"})
  assert sources(root, exclude) == [f"test_root/{name}" for name in left]


@pytest.mark.parametrize(
  "path, message",
  [
    ("missing", "no such file or folder"),
    ("*.none", "matches no file"),
    ("empty", "no file to read"),
    ("a\0b", "no such file"),
    ("x" * 300, "can't be read"),
  ],
)
def test_nothing_to_read_is_an_error(tmp_path, path, message):
  write(tmp_path, {"empty/x.bin": "x"})
  with pytest.raises(UserError, match=message):
    documents.find([os.path.join(tmp_path, path)])


def test_an_empty_path_is_not_this_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.txt").write_text("x")
  with pytest.raises(UserError, match="path '' is empty"):
    files.find([""], (), (".txt",))


@pytest.mark.parametrize(
  "address, suffix",
  [
    ("a/B.JSONL.gz", ".jsonl"),
    ("a.txt", ".txt"),
    ("a.gz", ""),
    ("a", ""),
    ("a.b/c", ""),
    ("x.warc.wet.gz", ".wet"),
    ("s3://b/k.v1.parquet", ".parquet"),
    ("https://h/a.csv.zst?sig=x.y", ".csv"),
  ],
)
def test_the_suffix_before_a_compression_tells_the_format(address, suffix):
  assert files.suffix(address) == suffix


def test_size_and_version_change_with_the_content(tmp_path):
  write(tmp_path, {"a.txt": "x"})
  (before,) = documents.find(tmp_path)
  assert before.size == 1
  write(tmp_path, {"a.txt": "xyz"})
  os.utime(tmp_path / "a.txt", ns=(1, 1))
  (after,) = documents.find(tmp_path)
  assert after.size == 3 and after.version != before.version


def test_pipes_are_never_waited_for(tmp_path):
  write(tmp_path, {"a.txt": "x"})
  os.mkfifo(tmp_path / "b.txt")
  assert len(documents.find(tmp_path)) == 1
  assert len(documents.find(f"{tmp_path}/*")) == 1
  with pytest.raises(UserError, match="is a pipe or device"):
    documents.find(tmp_path / "b.txt")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
  write(tmp_path, {"corpus/b/x.txt": "x", "elsewhere/y.txt": "y", "elsewhere/z/z.txt": "z"})
  (tmp_path / "corpus" / "a").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "corpus" / "c").symlink_to(tmp_path / "elsewhere" / "z")
  for name in ("back", "again"):  # without an end there would be 2^40 ways through these
    (tmp_path / "elsewhere" / "z" / name).symlink_to(tmp_path / "corpus")
  assert sources(tmp_path / "corpus") == ["corpus/a/y.txt", "corpus/a/z/z.txt", "corpus/b/x.txt"]


def test_a_name_that_is_no_utf8_is_written_out(tmp_path):
  os.close(os.open(os.fsencode(tmp_path) + b"/\xff.txt", os.O_CREAT))
  (file,) = documents.find(tmp_path)
  assert file.source.endswith(r"/\udcff.txt")
  assert os.path.exists(file.address)


def test_an_address_of_the_web_is_one_file(web):
  address, folder = web
  write(folder, {"a.txt": "x"})
  (file,) = documents.find(f"{address}/ranges/a.txt?key=secret#part")
  assert (file.source, file.size) == ("a.txt", 1)


@pytest.mark.parametrize(
  "path, message",
  [
    ("status/404/a.txt", "Not Found|no such file"),
    ("status/403/a.txt", "Forbidden"),
    ("status/500/a.txt", "Server Error"),
  ],
)
def test_what_the_web_answers_is_said(web, path, message):
  with pytest.raises(UserError, match=message) as e:
    documents.find(f"{web[0]}/{path}")
  assert path in str(e.value)


def test_a_server_that_is_not_there_and_an_unknown_scheme():
  pytest.importorskip("aiohttp")
  with pytest.raises(UserError, match="can't be reached .*Cannot connect") as e:
    documents.find("http://127.0.0.1:9/a.txt")
  assert e.value.exit_code == 75, "it may be there later"
  with pytest.raises(UserError, match="Protocol not known: foo"):
    documents.find("foo://x/a.txt")


@pytest.mark.parametrize("service", ["s3", "gcs", "memory"])
def test_a_bucket_is_listed_as_a_folder_is(service, request):
  if service == "memory":
    filesystem, bucket = pytest.importorskip("fsspec").filesystem("memory"), "memory://bucket"
  else:
    filesystem, bucket = request.getfixturevalue(service)
  for name, content in TREE.items():
    filesystem.pipe(
      f"bucket/corpus/{name}", content if isinstance(content, bytes) else content.encode()
    )
  assert sources(f"{bucket}/corpus") == sources(f"{bucket}/corpus/") == LISTED
  assert sources(f"{bucket}/corpus", "a") == [s for s in LISTED if not s.startswith("corpus/a/")]
  assert sources(f"{bucket}/corpus/**/*.md") == ["corpus/a/z.md"]
  assert sources(f"{bucket}/corpus/a[1].txt") == ["a[1].txt"], "a name like a pattern"
  listed = documents.find(
    [f"{bucket}/corpus/c.py", f"{bucket}/corpus/*.py", f"{bucket}/corpus/b.txt"]
  )
  assert [(d.source, d.text) for d in documents.documents(listed)] == [
    ("c.py", "three"),
    ("b.txt", "two\r\n"),
  ]
  assert all(f.size and f.version for f in listed)
  for wrong, message in (
    (f"{bucket}/none", "no such file"),
    (f"{bucket}/*.zip", "nothing is there"),
    (f"{bucket}x/a.txt", "no such file|NoSuchBucket"),
  ):
    with pytest.raises(UserError, match=message):
      documents.find(wrong)


def test_wrong_credentials_are_one_message(s3, monkeypatch):
  import s3fs

  for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    monkeypatch.delenv(key)
  s3fs.S3FileSystem.clear_instance_cache()
  with pytest.raises(UserError, match="locate credentials.*AWS_ACCESS_KEY_ID"):
    documents.find("s3://bucket/a.txt")


@pytest.mark.parametrize(
  "address, module, extra",
  [
    ("s3://b/x", "fsspec", "data"),
    ("http://h/x", "aiohttp", "data"),
    ("s3://b/x", "s3fs", "data,s3"),
    ("gs://b/x", "gcsfs", "data,gcs"),
  ],
)
def test_a_missing_extra_is_named(monkeypatch, address, module, extra):
  registry = pytest.importorskip("fsspec.registry")
  for name in ("_registry", "registry"):  # where fsspec keeps what it has imported
    monkeypatch.setattr(registry, name, {})
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(UserError, match=rf"pip install 'jaxgpt\[{extra}\]'"):
    documents.find(address)


def test_local_files_need_no_extra(tmp_path, monkeypatch):
  write(tmp_path, TREE)
  for name in ("fsspec", "aiohttp", "pyarrow", "zstandard", "warcio"):
    monkeypatch.setitem(sys.modules, name, None)
  assert len(list(documents.documents(documents.find(tmp_path)))) == 4


def test_what_is_passed_over_is_counted_and_named(tmp_path):
  write(tmp_path / "corpus", TREE | {f"pdf/{i}.PDF": "x" for i in range(9)} | {"LICENSE": "x"})
  write(tmp_path / "corpus" / "done", dict.fromkeys(("manifest.json", "card.json", "x.bin"), "{}"))
  write(tmp_path / "corpus" / "done", {"train.sources.txt": ""})
  os.mkfifo(tmp_path / "corpus" / "pipe.txt")
  account = PassedOver()
  listed = documents.find([tmp_path / "corpus", tmp_path / "corpus" / "b.txt"], ["a"], account)
  assert [file.source for file in listed] == LISTED[2:]
  assert account.counts == {
    "suffix .pdf": 9,
    "suffix .png": 1,
    "no suffix": 1,
    "hidden": 2,
    "excluded": 3,
    "prepared data": 4,
    "pipe or device": 1,
    "found twice": 1,
  }
  assert account.examples["hidden"] == ["corpus/.git", "corpus/.hidden.txt"]
  assert str(account).startswith("9 with suffix .pdf, such as corpus/pdf/0.PDF; 4 prepared data")
  twice = PassedOver()
  twice.merge(account)
  twice.merge(account)
  assert twice.counts["suffix .pdf"] == 18 and len(twice.examples["suffix .pdf"]) == twice.limit
  with pytest.raises(UserError, match=r"passed over: 9 with suffix .pdf, such as pdf/0.PDF"):
    documents.find(tmp_path / "corpus" / "pdf")


def test_a_folder_that_a_pattern_matches_is_not_read_and_counted(tmp_path):
  write(tmp_path, {"a.txt": "x", "sub/b.txt": "x"})
  account = PassedOver()
  assert len(documents.find(f"{tmp_path}/*", (), account)) == 1
  assert account.counts == {"folder that a pattern matches": 1}
  account = PassedOver()
  assert len(documents.find(f"{tmp_path}/**", (), account)) == 2 and not account.counts


def test_an_exclude_that_matches_nothing_is_an_error(tmp_path):
  write(tmp_path, {"a.txt": "x", "tests/b.txt": "x"})
  account = PassedOver()
  documents.find(tmp_path, ["tests", "tset*"], account)
  with pytest.raises(UserError, match=r"exclude='tset\*' matches no file"):
    account.check_exclude()
  documents.find(tmp_path, ["tset*", "a*"], account)
  with pytest.raises(UserError, match=r"exclude='tset\*' matches no file"):
    account.check_exclude()


def test_two_inputs_of_one_name_have_different_names(tmp_path):
  for place in ("x", "y", "z"):
    write(tmp_path / place, {"corpus/a.txt": place, "corpus/b.txt": place, "one.jsonl.gz": place})
  account = PassedOver()
  paths = [tmp_path / place / name for place in "xyz" for name in ("corpus", "one.jsonl.gz")]
  listed = documents.find(paths, (), account)
  assert [file.source for file in listed] == [
    *("corpus/a.txt", "corpus/b.txt", "one.jsonl.gz"),
    *("corpus(2)/a.txt", "corpus(2)/b.txt", "one(2).jsonl.gz"),
    *("corpus(3)/a.txt", "corpus(3)/b.txt", "one(3).jsonl.gz"),
  ]
  assert account.renamed[str(tmp_path / "y" / "corpus")] == "corpus(2)/a.txt"
  assert str(tmp_path / "x" / "corpus") not in account.renamed


def test_names_hold_nothing_that_a_terminal_obeys(tmp_path):
  for name in (b"\x1b[2J.txt", b"a\nb.txt", "\u202egpj.txt".encode(), b"\\x1b[2J.txt"):
    os.close(os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT))
  names = [file.source.partition("/")[2] for file in documents.find(tmp_path)]
  assert sorted(names) == sorted([r"\x1b[2J.txt", r"\x1b[2J.txt(2)", r"a\nb.txt", r"\u202egpj.txt"])


def test_a_subfolder_that_cannot_be_listed_is_counted_like_a_file(tmp_path, monkeypatch):
  write(tmp_path, {"corpus/a.txt": "x", "corpus/sub/b.txt": "x", "corpus/z.txt": "x"})
  scandir = os.scandir

  def guarded(path):
    if os.fspath(path).endswith("sub"):
      raise PermissionError(13, "Permission denied", os.fspath(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", guarded)
  dropped = documents.Dropped()
  found = list(documents.documents(documents.find(tmp_path / "corpus"), dropped=dropped))
  assert [d.source for d in found] == ["corpus/a.txt", "corpus/z.txt"]
  assert dropped.counts == {"unreadable": 1}
  assert dropped.examples["unreadable"][0].startswith("corpus/sub: ")
  with pytest.raises(UserError, match="sub' can't be listed"):
    documents.find(tmp_path / "corpus" / "sub")
