"""Texts of a prescribed form: valid for any schema, whatever the model would rather write."""

import functools
import json
import re

import jax
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.engine import constraints, weights
from jaxgpt.inference.engine import engine as engine_lib
from jaxgpt.inference.engine.requests import Constraint, Request, problem
from jaxgpt.inference.sampling import Sampling
from jaxgpt.model import transformer
from jaxgpt.run import generation
from jaxgpt.text.tokenizers.base import ByteTokenizer

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance", reason="needs the extra [guided]")

CONTEXT, ENDS = 256, (2, 77)
PROMPT = (1, 70, 71)


@functools.cache
def engine():
  """An engine of a random model, which writes random bytes.

  An end is in no text of a form: 77 is "J".
  """
  c = config.base()
  shape = dict(num_layers=1, width=16, num_heads=2, vocab_size=300, max_len=CONTEXT, init_std=0.3)
  c.model.update(shape)
  c.data.update(dict(seq_len=CONTEXT, path=""))
  c = config.resolve(c)
  mesh, parts = load.place(c, jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = jax.jit(lambda: transformer.init(parts.model, jax.random.key(0)))()
  ends = generation.Generation({"eos_token_id": list(ENDS)})
  run = load.Run(c, parts, mesh, params, 0, ByteTokenizer(), "", ends)
  # As for a vocabulary of 8,192: decoding reads a wider head.
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(weights, "_STRIDE", 100)
    made = engine_lib.Engine(run, max_rows=16, cache_tokens=16 * CONTEXT)
  assert made._weights["head"].shape[1] > c.model.vocab_size or jax.default_backend() != "cpu"
  return made


def texts(*wanted, temperature=1.0, max_new=250):
  """(text, why it ended) for each constraint."""
  return engine().texts(
    [
      Request(PROMPT, max_new, Sampling(temperature), seed, constraint=one)
      for seed, one in enumerate(wanted)
    ]
  )


def random_schema(rng, depth=0):
  """A schema whose values are short."""
  kinds = ["integer", "boolean", "null", "enum", "string", "pattern"]
  kind = rng.choice(kinds + ["array", "object", "anyOf"] * (depth < 2))
  some = lambda: [random_schema(rng, depth + 1) for _ in range(rng.integers(1, 4))]
  if kind == "integer":
    low = int(rng.integers(-200, 200))
    return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 300))}
  if kind == "enum":
    return {"enum": ['é\n"', 3.5, None, "b"][: rng.integers(1, 5)]}
  if kind == "string":
    return {"type": "string", "minLength": 1, "maxLength": int(rng.integers(1, 6))}
  if kind == "pattern":
    return {"type": "string", "pattern": "^[a-cä]{1,4}$"}
  if kind == "array":
    return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": 2}
  if kind == "anyOf":
    return {"anyOf": some()}
  if kind == "object":
    properties = {f"k{i}": one for i, one in enumerate(some())}
    required = [name for name in properties if rng.random() < 0.7]
    return {
      "type": "object",
      "properties": properties,
      "required": required,
      "additionalProperties": False,
    }
  return {"type": str(kind)}


def test_texts_of_random_schemas_are_valid():
  rng = np.random.default_rng(0)
  schemas = [random_schema(rng) for _ in range(200)]
  found = texts(*map(Constraint.of_schema, schemas))
  assert {finish for _, finish in found} == {"stop"}
  for (text, _), schema in zip(found, schemas, strict=True):
    jsonschema.validate(json.loads(text), schema)
  assert len({text for text, _ in found}) > 100, "the texts are drawn"


def test_a_regular_expression_choices_and_free_texts_share_a_batch():
  choices = ["yes", "no", 'né\n"', "yes, sir"]
  wanted = [Constraint.of_regex("(ab?c){2,3}x"), Constraint.of_choices(choices), None] * 5
  found = texts(*wanted, max_new=20)
  for text, finish in found[::3]:
    assert finish == "stop" and re.fullmatch("(ab?c){2,3}x", text)
  assert {text for text, _ in found[1::3]} <= set(choices)
  assert [finish for _, finish in found[1::3]] == ["stop"] * 5
  alone = [Request(PROMPT, 20, Sampling(1.0), seed=2)]
  assert engine().texts(alone) == [found[2]], "a free text is that without company"
  ((text, finish),) = texts(Constraint.of_regex("[ab]{90}"), max_new=20)
  assert finish == "length" and re.fullmatch("[ab]{20}", text)


def test_a_form_that_cannot_go_on_fails_unless_the_text_has_its_last_token():
  form = Constraint.of_regex("abJ")
  assert texts(form, max_new=2) == [("ab", "length")]
  ((text, finish),) = texts(form, max_new=3)
  assert text == "ab" and "no token of the vocabulary goes on with it" in problem(finish)


def test_the_most_likely_token_of_those_allowed_is_drawn_and_log_probabilities_are_the_model_s():
  ask = lambda form: Request(PROMPT, 1, Sampling(0.0), logprobs=20, constraint=form)
  ((free,), (bound,)) = (
    [t for piece in engine().run([ask(form)]) for t in piece.tokens]
    for form in (None, Constraint.of_regex("[a-r]"))
  )
  run = engine()._run
  forward = jax.jit(lambda p, *at: run.parts.model.apply({"params": p}, *at).logits)
  logits = forward(run.params, np.array([PROMPT]), np.arange(3)[None])
  whole = jax.nn.log_softmax(logits[0, -1, : run.tokenizer.vocab_size])
  assert free.logprob == pytest.approx(float(whole.max()), abs=1e-5)
  assert bound.alternatives == free.alternatives
  assert bound.text.islower() and bound.logprob < free.logprob


@pytest.mark.parametrize(
  "constraint, words",
  [
    (Constraint("JSON schema", "{"), "give a JSON schema"),
    (Constraint.of_schema({"type": "strnig"}), "strnig"),
    (Constraint.of_schema({"$ref": "#/nothing"}), "nothing"),
    (Constraint.of_schema({"type": "integer", "minimum": 5, "maximum": 1}), "nsatisfiable"),
    (Constraint.of_regex("(a"), "regular expression: "),
  ],
)
def test_a_faulty_form_is_refused_in_one_line(constraint, words):
  with pytest.raises(UserError, match=words) as e:
    engine().add(Request(PROMPT, 3, constraint=constraint))
  assert "\n" not in str(e.value) and len(str(e.value)) < 400
  assert not engine().busy


def test_no_choice_and_an_empty_one_are_refused():
  for choices in ([], ["a", ""]):
    with pytest.raises(UserError, match="choices: give at least one"):
      Constraint.of_choices(choices)


def test_the_library_is_named_where_it_is_missing(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
  grammars = constraints.Grammars(ByteTokenizer(), ENDS)
  with pytest.raises(UserError, match=r"pip install 'jaxgpt\[guided\]'"):
    grammars.matcher(Constraint.of_regex("a"))
