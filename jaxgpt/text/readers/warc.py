"""Reader of web archives: WARC (pages) and WET (their texts)."""

import codecs
import itertools
import re

from jaxgpt.errors import optional
from jaxgpt.storage import streams
from jaxgpt.text.readers import records


def read(file, want):
  """WARC: the text of conversion records (WET), the pages (HTML or plain text) of responses."""
  warcio = optional("warcio.archiveiterator", "data", f"reading {file.source}")
  with streams.open_stream(file) as stream:
    archive = iter(warcio.ArchiveIterator(stream, no_record_parse=True))
    for number in itertools.count(1):
      where = f"{file.source}:{number}"
      try:
        record = next(archive, None)
        if record is None:
          return
        item = _TYPES.get(record.rec_type, _skip)(where, record, want)
      except OSError:
        raise
      except Exception as e:  # warcio raises KeyError, ValueError and more on what is broken
        yield records.Fault("invalid warc", where, f"{e}; the rest of the file is left out")
        return
      if item is not None:
        yield item


def _skip(where, record, want):
  del where, record, want


def _converted(where, record, want):
  data, fault = _payload(where, record, want)
  if fault:
    return fault
  item = records.decoded(where, data)
  return item._replace(id=_record_id(record)) if isinstance(item, records.Record) else item


def _page(where, record, want):
  """An HTTP response's page, or a resource."""
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
  data, fault = _payload(where, record, want)
  if fault:
    return fault
  text = _decode_page(data, content_type)
  if "\0" in text:
    return records.Fault("binary", where, "a character is U+0000")
  return records.Record(where, text, _record_id(record), kind != "text/plain")


def _payload(where, record, want):
  """(the content, None) or (None, the fault)."""
  stream, parts, length = record.content_stream(), [], 0
  while length <= want.max_bytes and (data := stream.read(want.max_bytes + 1 - length)):
    parts.append(data)
    length += len(data)
  if length > want.max_bytes:
    return None, records.too_long(where, want)
  if getattr(record.raw_stream, "limit", 0):
    return None, records.Fault("unreadable", where, "the record is cut short")
  return b"".join(parts), None


def _record_id(record):
  return (record.rec_headers.get_header("WARC-Record-ID") or "").strip("<>")


def _decode_page(data, content_type):
  """A page's text, by the encoding that it names, or as browsers guess it."""
  named = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", content_type) or re.search(
    r"<meta[^>]+charset\s*=\s*[\"']?([\w.:-]+)", data[:4096].decode("latin-1"), re.I
  )
  if data.startswith(codecs.BOM_UTF8):
    return data.decode("utf-8-sig", "replace")
  for encoding, errors in ((named and named[1], "replace"), ("utf-8", "strict")):
    try:
      if encoding:
        return data.decode(encoding, errors)
    except (LookupError, UnicodeError):  # no such encoding, or no UTF-8
      pass
  return data.decode("windows-1252", "replace")


_TYPES = {"conversion": _converted, "response": _page, "resource": _page}
