"""A file's bytes: decompressed, in bounded memory, and with all that came before an error."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc

import pytest

from jaxgpt.storage import files, streams
from jaxgpt.text.readers import documents
from tests import quick

DATA = b"".join(b"%d some words\n" % i for i in range(50_000))


def zstd(data, **options):
  return pytest.importorskip("zstandard").ZstdCompressor(**options).compress(data)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def stream_of(path, data):
  path.write_bytes(data)
  return streams.open_stream(files.File(os.fspath(path), path.name, len(data)))


def read_up_to_error(stream):
  lines = []
  with pytest.raises(OSError) as error:
    while line := stream.readline():
      lines.append(line)
  return lines, error.value


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt{}", "without_suffix", "wrong.gz"])
def test_compression_is_told_by_the_first_bytes(tmp_path, suffix, name):
  compress = COMPRESS[suffix]
  members = compress(DATA[:1000]) + compress(DATA[1000:])
  with stream_of(tmp_path / name.format(suffix), members) as stream:
    assert b"".join(stream) == DATA
  assert stream.closed


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_came_before_a_cut_is_read(tmp_path, suffix):
  data = COMPRESS[suffix](DATA)
  members = COMPRESS[suffix](DATA[: DATA.index(b"\n") + 1]) + data[: -len(data) // 3]
  lines, error = read_up_to_error(stream_of(tmp_path / "a", members))
  assert b"".join(lines) == (DATA[: DATA.index(b"\n") + 1] + DATA)[: sum(map(len, lines))]
  assert len(lines) > 10_000 or suffix == ".bz2", "bzip2 has blocks of 900 kB"
  assert lines and "ended before the end" in str(error)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damage_is_an_error_of_reading(tmp_path, suffix):
  data = bytearray(COMPRESS[suffix](DATA))
  data[len(data) // 2] ^= 0xFF
  _, error = read_up_to_error(stream_of(tmp_path / "a", bytes(data)))
  assert str(error)


def test_a_file_that_a_server_has_decompressed_is_read_as_it_is(tmp_path):
  with stream_of(tmp_path / "a.txt.gz", b"plain") as stream:
    assert stream.read() == b"plain"
  with stream_of(tmp_path / "b.txt.gz", b"") as stream:
    assert stream.read() == b""


def test_zstandard_with_a_long_window_and_skippable_frames(tmp_path):
  zstandard = pytest.importorskip("zstandard")
  params = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
  frame = zstandard.ZstdCompressor(compression_params=params).compressobj()  # of unknown length
  data = b"\x5a\x2a\x4d\x18\x03\0\0\0xyz" + frame.compress(DATA) + frame.flush()
  with stream_of(tmp_path / "a.zst", data) as stream:
    assert stream.read() == DATA


@pytest.mark.parametrize("suffix", quick.first(COMPRESS, 2))
def test_a_small_file_that_grows_large_is_read_in_bounded_memory(tmp_path, suffix):
  line = json.dumps({"text": "x"}).encode() + b"\n"
  data = COMPRESS[suffix](line + b"0" * 150_000_000 + b"\n" + line)
  (tmp_path / f"a.jsonl{suffix}").write_bytes(data)
  dropped = documents.Dropped()
  tracemalloc.start()
  try:
    found = list(documents.documents(documents.find(tmp_path), max_bytes=1 << 20, dropped=dropped))
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert len(found) == 2 and dropped.counts == {"too long": 1}
  assert peak < 40e6


@pytest.mark.parametrize("way", ["plain", "ranges"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_the_web_is_read_with_and_without_ranges(web, way, name, monkeypatch):
  monkeypatch.setattr(streams, "_REMOTE_BLOCK", 20_000)
  address, folder = web
  texts = [f"{i} {i * 7919}" for i in range(5000)]
  lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
  if name.endswith("parquet"):
    pyarrow, parquet = (pytest.importorskip(m) for m in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(pyarrow.table({"text": texts}), folder / name)
  else:
    (folder / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
  dropped = documents.Dropped()
  found = list(documents.documents(documents.find(f"{address}/{way}/{name}"), dropped=dropped))
  if (way, name) == ("plain", "a.parquet"):
    assert dropped.counts == {"unreadable": 5000}
    assert "range requests" in dropped.examples["unreadable"][0]
    return
  assert [d.text for d in found] == texts
  assert found[-1].source == f"{name}:5000"


@pytest.mark.parametrize("way", ["flaky", "flaky-ranges"])
def test_a_connection_that_breaks_now_and_then_is_taken_up_again(web, way, monkeypatch):
  monkeypatch.setattr(streams, "_REMOTE_BLOCK", 200_000)
  monkeypatch.setattr(streams, "_WAITS", (0, 0, 0))
  address, folder = web
  (folder / "a.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(100_000)))
  dropped = documents.Dropped()
  found = list(documents.documents(documents.find(f"{address}/{way}/a.jsonl"), dropped=dropped))
  assert [d.text for d in found] == [str(i) for i in range(100_000)] and not dropped.counts


def test_a_connection_that_breaks_is_counted_and_the_next_file_is_read(web, monkeypatch):
  monkeypatch.setattr(streams, "_WAITS", (0, 0, 0))
  address, folder = web
  (folder / "a.jsonl").write_text('{"text": "x"}\n' * 100_000)
  dropped = documents.Dropped()
  listed = documents.find([f"{address}/cut/a.jsonl", f"{address}/plain/a.jsonl"])
  found = list(documents.documents(listed, dropped=dropped))
  assert 100_000 <= len(found) <= 150_000
  assert dropped.counts["unreadable"] == 1 and dropped.read == len(found) + sum(
    dropped.counts.values()
  )
