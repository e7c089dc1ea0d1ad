"""A file imports only from lower floors, or from earlier in its own row (docs/design.md)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "jaxgpt"

FLOORS = [  # each floor's rooms in the order in which they may import each other
    ["errors", "packages", "presets", "checks", "keys", "config", "tree", "compiler", "mesh", "sharding", "processes",
     "lifeline", "distributed"],
    ["text.files", "text.remote", "text.streams", "text.records", "text.tables", "text.warc",
     "text.formats",
     "text.read",
     "text.specs", "text.words", "text.clean", "text.dedup",
     "text.decontaminate",
     "text.tokenizer_base", "text.word_cache", "text.tokenizer_sentencepiece", "text.tokenizer_huggingface",
     "text.tokenizer_tiktoken", "text.tokenizer",
     "text.examples", "text.chat_jinja", "text.chat", "text.shards", "text.assemble",
     "text.store", "text.progress", "text.stages", "text.heap", "text.executors", "text.tasks", "data.packing", "text.card", "text.prepare",
     "data.source", "data.mixture", "data.masking", "data.layouts",
     "data.pipeline", "data.stream"],
    ["model.ops", "model.rope", "model.pairs", "model.context", "model.neighbours", "model.ring", "model.attention", "model.quantized", "model.layers", "model.moe", "model.remat",
     "model.pipeline", "model.stacks", "model.transformer"],
    ["head_loss", "objectives", "schedules", "optim", "metrics", "train_step",
     "parts"],
    ["generate", "evaluate", "lora", "hf.layout", "hf.fields", "hf.rotary", "hf.rows",
     "hf.families", "hf.tokenizer", "hf.convert", "hf.adapters", "plan.environment", "plan.gpus", "plan.chips",
     "plan.topology", "plan.shardings", "plan.hlo", "plan.cost", "plan.roofline", "plan.golden", "plan.estimate"],
    ["mirror", "checkpoint", "programs", "timer", "stop_signal", "workdir", "writers",
     "hf.safetensors", "hf.weights", "hf.parity"],
    ["initial", "loop", "runs", "ledger", "exchange", "demo", "reference",
     "machine", "doctor", "plan.lower", "plan.report", "plan.search",
     "plan.explain", "plan.command", "flags", "cli", "__main__"],
]
ORDER = [room for floor in FLOORS for room in floor]
PLAIN = ("errors", "packages", "presets", "processes", "lifeline",
         *(room for room in ORDER if room.startswith("text.")))
OPTIONAL = {"qwix", "tensorboardX", "tokenizers", "tiktoken", "jinja2", "torch", "transformers"}
NO_JAX = PLAIN + ("checks", "keys", "config", *(room for room in ORDER if room.startswith("data.")))


def modules():
  paths = sorted(ROOT.rglob("*.py"))
  return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths
          if p.name != "__init__.py"}


def imports(path):
  """Names of all modules that a file imports, at the top and inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_a_floor():
  assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_only_from_below(room):
  ours = {name.removeprefix("jaxgpt.") for name in imports(modules()[room])
          if name.startswith("jaxgpt.")} & set(ORDER)
  above = [name for name in ours if ORDER.index(name) >= ORDER.index(room)]
  assert not above, f"{room} imports {above} from above"


@pytest.mark.parametrize("room", NO_JAX)
def test_text_and_data_do_without_jax(room):
  heavy = [n for n in imports(modules()[room]) if n.split(".")[0] in ("jax", "flax", "optax")]
  assert not heavy


def test_imports_stand_at_the_top_but_for_the_doors():
  for room, path in modules().items():
    if room in ("cli",):
      continue
    inner = [n for f in ast.walk(ast.parse(path.read_text()))
             if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
             for n in ast.walk(f) if isinstance(n, (ast.Import, ast.ImportFrom))]
    optional = [n for n in inner if isinstance(n, ast.Import)
                and n.names[0].name.split(".")[0] in OPTIONAL]
    assert len(inner) == len(optional), f"{room} imports inside a function"
