"""No variant of a published model differs without a word. See `variants`.

The default suite takes one variant of each kind of fault that there was. `make test-all` takes all.
"""

import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")

from tests.hf import variants  # noqa: E402

# {variant: what the refusal says, or '' if it must be equal}. transformers reads all of them.
KNOWN = {
  "llama-tied-other-head": "",
  "llama-stale-shards": "",
  "llama-rope-longrope": "",
  "bert-untied": "",
  "bert-no-pooler": "",
  "gemma2-act-gelu": "",
  "modernbert-global": "",
  "llama-int8-one": "mlp.up_proj.weight is int8, a quantized weight: convert it to bfloat16",
  "modernbert-head-silu": "classifier_activation='silu' is not supported: hidden_activation='gelu'",
  "llama-adapter": "holds adapter_config.json",
  "qwen2-types-unused": "layer_types='sliding_attention' is not supported: use_sliding_window",
}
# transformers 5 does not load these, version 4 did: it drops a length, a null, a missing head_dim.
OLD = re.compile(
  r"phi3-old-su|gemma[23]-null-activation|mixtral-rope-.*(yarn|longrope|dynamic|original).*"
)
BY_NAME = {variant.name: variant for variant in variants.VARIANTS}


@pytest.mark.parametrize("name", KNOWN)
def test_what_was_wrong_is_equal_or_refused(name, tmp_path):
  kind, message = variants.outcome(BY_NAME[name], tmp_path)
  assert kind == ("refused" if KNOWN[name] else "equal"), message
  assert not KNOWN[name] or re.search(re.escape(KNOWN[name]), message)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_every_variant_is_equal_or_refused_by_name(name, tmp_path):
  found = variants.outcome(BY_NAME[name], tmp_path)
  assert found.kind in ("equal", "refused", *(["invalid"] if OLD.fullmatch(name) else [])), (
    found.message
  )
  if found.kind == "refused":  # by a key of config.json, a tensor, a file, or a field of `model`
    assert re.search(
      r"config\.json: |model\.\w+|\.weight|\.bias|_config\.json|safetensors", found.message
    )
