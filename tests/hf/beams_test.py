"""Beam search next to transformers', on models that were imported from it."""

import pytest

torch = pytest.importorskip("torch", reason="the extra [bench] is not installed")
pytest.importorskip("transformers", reason="the extra [bench] is not installed")

from jaxgpt.commands.actions import import_export  # noqa: E402
from jaxgpt.hf import parity  # noqa: E402
from jaxgpt.inference import load  # noqa: E402
from jaxgpt.inference.engine.engine import Engine  # noqa: E402
from jaxgpt.inference.engine.requests import Beams, Request  # noqa: E402
from jaxgpt.inference.sampling import Sampling  # noqa: E402
from jaxgpt.run import generation  # noqa: E402
from tests.hf.round_trip_test import FAMILIES, PROMPTS, make  # noqa: E402

CAUSAL = ("gpt2", "llama2", "gemma2", "deepseek_v3", "mixtral")
SETTINGS = (Beams(3), Beams(4, length_penalty=0.3), Beams(2, 2.0, early_stopping=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CAUSAL if name in FAMILIES])
def test_texts_are_those_of_transformers(name, tmp_path, corpus):
  theirs = make(name, tmp_path / "theirs")
  import_export.import_model(tmp_path / "theirs", tmp_path / "run", tokenizer=corpus)
  run = load.load(tmp_path / "run")
  ends = (40, 41)
  run = run._replace(
    generation=generation.Generation({"eos_token_id": list(ends)}),
    tokenizer=parity._Ids(run.c.model.vocab_size),
  )
  engine = Engine(run, max_rows=8, block_size=parity._BLOCK)
  for beams in SETTINGS:
    want = [
      theirs.generate(
        torch.tensor([ids]),
        do_sample=False,
        num_beams=beams.width,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        max_new_tokens=20,
        eos_token_id=list(ends),
        pad_token_id=0,
      )[0, len(ids) :].tolist()
      for ids in PROMPTS
    ]
    asked = [Request(tuple(ids), 20, Sampling(temperature=0.0), beams=beams) for ids in PROMPTS]
    got = {p.request: [t.id for t in p.tokens] for p in engine.run(asked) if p.finish}
    assert [got[n] for n in sorted(got)] == [[t for t in text if t not in ends] for text in want], (
      beams
    )
