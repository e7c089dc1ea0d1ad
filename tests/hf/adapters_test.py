"""Adapters go to PEFT: base and adapter there compute what the merged export does."""

import numpy as np
import pytest

from jaxgpt.commands.actions import import_export
from jaxgpt.errors import UserError
from jaxgpt.inference import load as load_lib
from jaxgpt.training import loop
from tests import quick

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LORA = dict(rank=3, alpha=6.0, targets=("*",))
FAMILIES = {
  "llama": {},
  "gpt2": dict(
    norm="layernorm", position="learned", activation="gelu", gated=False, bias=True, num_kv_heads=4
  ),
  "phi3": dict(attention_pattern=("local",), window=16, tie_embeddings=False),
}
TOKENS = np.random.default_rng(0).integers(3, 200, (2, 16))


def logits(model):
  with torch.no_grad():
    return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, targets",
  quick.first(
    [("gpt2", ("*",)), ("llama", ("*",)), ("gpt2", ("q", "v")), ("phi3", ("q", "up", "o"))]
  ),
)
def test_base_and_adapter_are_the_merged_model(name, targets, tiny, tmp_path):
  c = tiny(train__steps=2)
  c.model.update(FAMILIES[name])
  family = {"family": name}
  loop.train(c, tmp_path / "base", {})
  import_export.export_run(tmp_path / "base", tmp_path / "base_hf", certify=False, **family)
  c.init_from = str(tmp_path / "base")
  c.model.lora.update(LORA | {"targets": targets})
  c.optim.lr = 0.1  # so that the adapters matter
  loop.train(c, tmp_path / "adapted", {})
  import_export.export_run(tmp_path / "adapted", tmp_path / "merged", certify=False, **family)
  import_export.export_adapter(tmp_path / "adapted", tmp_path / "adapter", **family)

  load = transformers.AutoModelForCausalLM.from_pretrained
  base, merged = load(tmp_path / "base_hf"), load(tmp_path / "merged")
  apart = logits(base)
  with_adapter = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
  np.testing.assert_allclose(logits(with_adapter), logits(merged), atol=1e-5)
  assert np.abs(logits(merged) - apart).max() > 1e-2
  run = load_lib.load(tmp_path / "adapted")
  ours = run.parts.model.apply(
    {"params": run.params}, TOKENS, np.broadcast_to(np.arange(16), (2, 16))
  ).logits
  np.testing.assert_allclose(ours, logits(merged), atol=1e-4)


def test_what_has_no_adapters_is_refused(tiny, tmp_path):
  loop.train(tiny(train__steps=2), tmp_path / "run", {})
  with pytest.raises(UserError, match="has no adapters"):
    import_export.export_adapter(tmp_path / "run", tmp_path / "out")
  assert not (tmp_path / "out").exists()
