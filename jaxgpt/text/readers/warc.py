"""Reader of web archives: WARC (pages) and WET (their extracted text)."""

import codecs
import io
import itertools
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxgpt.errors import optional
from jaxgpt.storage import files, streams
from jaxgpt.text.readers import records


def read(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads conversion records (WET) as text, and responses and resources as pages.

  A page is HTML or plain text. Responses with an error status and other content types are faults.
  """
  warcio = optional("warcio.archiveiterator", "data", f"reading {file.source}")
  with streams.open_stream(file) as opened:
    # warcio reads ahead. An error would cost it the records that it has read and not handed out, so
    # it sees an end instead.
    stream, is_cut = _UpToError(opened), False
    archive = iter(warcio.ArchiveIterator(stream, no_record_parse=True))
    for number in itertools.count(1):
      where = f"{file.source}:{number}"
      try:
        record = next(archive, None)
        if record is None:
          break
        if record.rec_headers.get_header("Content-Length") is None:  # every record has one
          rule = "unreadable" if stream.error else "invalid warc"
          why = "the record is cut short in its header; the rest of the file is left out"
          yield records.Fault(rule, where, why)
          return
        item = _TYPES.get(record.rec_type, _skip)(where, record, want)
      except OSError:
        raise
      except Exception as e:  # broken archives raise KeyError, ValueError and more in warcio
        why = f"{e}; the rest of the file is left out"
        item = records.Fault("invalid warc", where, why)
        if stream.error:
          break
        yield item
        return
      if item is not None:
        is_cut = isinstance(item, records.Fault) and item.rule == "unreadable"
        yield item
    if stream.error and not is_cut:
      why = stream.error.strerror or str(stream.error)
      yield records.Fault("unreadable", where, f"{why}; everything before was read")


class _UpToError(io.RawIOBase):
  """A stream that ends where another one has an error.

  Attributes:
    error: The error, or None.
  """

  def __init__(self, stream: BinaryIO):
    self._stream = stream
    self.error: OSError | None = None

  def readable(self) -> bool:
    return True

  def read(self, size: int = -1) -> bytes:
    try:
      return b"" if self.error else self._stream.read1(size)  # type: ignore[attr-defined]
    except OSError as e:
      self.error = e
      return b""


def _skip(where: str, record: Any, want: records.Want) -> None:
  del where, record, want


def _converted(where: str, record: Any, want: records.Want) -> records.Item:
  """The text of a conversion record."""
  data = _payload(where, record, want)
  if isinstance(data, records.Fault):
    return data
  item = records.decoded(where, data)
  return item._replace(id=_record_id(record)) if isinstance(item, records.Record) else item


def _page(where: str, record: Any, want: records.Want) -> records.Item:
  """The page of an HTTP response or a resource."""
  headers = record.rec_headers
  if (record.content_type or "").startswith("application/http"):
    parser = optional("warcio.statusandheaders", "data", "reading WARC").StatusAndHeadersParser
    try:
      record.http_headers = headers = parser(("HTTP/",), verify=False).parse(record.raw_stream)
    except EOFError:
      return records.Fault("invalid warc", where, "a response without content")
    if not (headers.get_statuscode() or "").startswith("2"):
      return records.Fault("http status", where, f"status {headers.get_statuscode()}")
  content_type = headers.get_header("Content-Type") or ""
  kind = content_type.partition(";")[0].strip().lower()
  if kind not in ("text/html", "application/xhtml+xml", "text/plain"):
    return records.Fault("not text", where, f"content type {kind or 'unknown'}")
  packed = (headers.get_header("Content-Encoding") or "identity").strip().lower()
  if packed not in ("identity", "gzip", "deflate"):
    return records.Fault("not text", where, f"content encoding {packed}")
  data = _payload(where, record, want)
  if isinstance(data, records.Fault):
    return data
  text = _decode_page(data, content_type)
  if "\0" in text:
    return records.Fault("binary", where, "a character is U+0000")
  return records.Record(where, text, _record_id(record), kind != "text/plain")


def _payload(where: str, record: Any, want: records.Want) -> bytes | records.Fault:
  """A record's content, or its fault."""
  stream, pieces, length = record.content_stream(), [], 0
  while length <= want.max_bytes and (data := stream.read(want.max_bytes + 1 - length)):
    pieces.append(data)
    length += len(data)
  if length > want.max_bytes:
    return records.too_long(where, want)
  if getattr(record.raw_stream, "limit", 0):
    return records.Fault("unreadable", where, "the record is cut short")
  return b"".join(pieces)


def _record_id(record: Any) -> str:
  return (record.rec_headers.get_header("WARC-Record-ID") or "").strip("<>")


def _decode_page(data: bytes, content_type: str) -> str:
  """Decodes a page with the encoding that it names, or else as browsers do."""
  named = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", content_type) or re.search(
    r"<meta[^>]+charset\s*=\s*[\"']?([\w.:-]+)", data[:4096].decode("latin-1"), re.I
  )
  if data.startswith(codecs.BOM_UTF8):
    return data.decode("utf-8-sig", "replace")
  for encoding, errors in ((named and named[1], "replace"), ("utf-8", "strict")):
    try:
      if encoding:
        return data.decode(encoding, errors)
    except (LookupError, UnicodeError):  # unknown encoding, or not UTF-8
      pass
  return data.decode("windows-1252", "replace")


_TYPES = {"conversion": _converted, "response": _page, "resource": _page}
