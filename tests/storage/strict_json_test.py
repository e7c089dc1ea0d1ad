"""JSON without Infinity and NaN, and that no module writes them by another way."""

import ast
import json
import math
import pathlib

import pytest

import jaxgpt
from jaxgpt.storage import strict_json

ROOT = pathlib.Path(jaxgpt.__file__).parent
# Modules that call `json.dumps` by itself, and why no float gets there.
WITHOUT_FLOATS = {
  "analysis.compare_runs": "a value of a config in a table, as it is, not written",
  "hf.safetensors": "names, shapes and offsets",
  "hf.tokenizer": "names and flags",
  "inference.evaluate": "names of classes, as an option of preparing data",
  "inference.engine.requests": "choices, and a schema that the grammar's library checks",
  "inference.server.calls": "a schema from JSON, which was read without such numbers",
  "inference.server.fields": "a value of a request's JSON, shown in an error",
  "parallel.distributed": "messages between processes of one run, read by Python",
  "parallel.peer_watch": "messages between processes of one run, read by Python",
  "storage.strict_json": "it is the writer",
  "text.filters.exact_duplicates": "hashed, not written",
  "text.readers.messages": "the words of a tool call, counted and compared, not written",
  "text.tokenizers.chat_template": "strings in the source of a template",
  "text.tokenizers.base": "names and digests",
  "text.tokenizers.jinja_compile": "a template's filter, which must be as transformers has it",
  "text.tokenizers.jinja_template": "searched for the names of special tokens, not written",
  "training.compiled_step": "digests and device numbers",
  "data.stream": "names and sizes of files",
}


def refuse(constant):
  raise AssertionError(constant)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_become_null(bad):
  value = {"a": bad, "b": [1.5, (bad, "x")], "c": {"d": {"e": bad}}, "f": True}
  text = strict_json.dumps(value, indent=1)
  assert json.loads(text, parse_constant=refuse) == {
    "a": None,
    "b": [1.5, [None, "x"]],
    "c": {"d": {"e": None}},
    "f": True,
  }


def test_finite_values_are_as_json_has_them():
  value = {"b": [0.1 + 0.2, 1e-30, None], "a": "é"}
  assert strict_json.dumps(value, sort_keys=True) == json.dumps(value, sort_keys=True)


def test_a_circle_is_an_error():
  value = []
  value.append(value)
  with pytest.raises((ValueError, RecursionError)):
    strict_json.dumps(value)


def test_every_writer_of_json_is_strict():
  loose = set()
  for path in ROOT.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("json.dumps", "json.dump")
        and not any(k.arg == "allow_nan" for k in node.keywords)
      ):
        loose.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
  assert loose <= set(WITHOUT_FLOATS), loose - set(WITHOUT_FLOATS)
