"""Quantized weights as codes, against the package that reads them and against transformers.

Needs the extra [bench].
"""

import json

import numpy as np
import pytest

from jaxgpt import tree
from jaxgpt.analysis.compression import compressed_run, quantize
from jaxgpt.commands.actions import import_export
from jaxgpt.commands.models import export_model
from jaxgpt.errors import UserError
from jaxgpt.hf import safetensors
from jaxgpt.hf.quantized import compressed_tensors
from jaxgpt.inference import load
from jaxgpt.run.compression import quantized_weights
from jaxgpt.run.compression.matrix import Matrix
from tests.trained import train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")


def made(source, folder, bits, group=0, outside=0, **more):
  """A quantized run."""
  settings = quantize.Settings("nearest", bits, group, outside=outside, **more)
  compressed_run.quantized(source, folder, settings)
  return folder


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_packed_as_the_package_packs_them(bits):
  from compressed_tensors.compressors.pack_quantized import helpers

  rng = np.random.default_rng(0)
  codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 21)).astype(np.int8)
  found = compressed_tensors.pack(codes, bits)
  theirs = helpers.pack_to_int32(torch.tensor(codes), bits)
  np.testing.assert_array_equal(found, theirs.numpy())
  back = helpers.unpack_from_int32(torch.tensor(found), bits, torch.Size(codes.shape))
  np.testing.assert_array_equal(back.numpy(), codes)


def test_codes_and_scales_have_the_shape_of_the_parameter():
  form = quantized_weights.Form(Matrix("layers/o", (2, 3, 4, 5), (1, 2), (3,)), 4, 3)
  codes_MIO = np.arange(2 * 12 * 5).reshape(2, 12, 5) % 16 - 8
  scales_MGO = np.arange(1, 31, dtype="float32").reshape(2, 3, 5)
  codes = quantized_weights.Codes(form, codes_MIO.astype(np.int8), scales_MGO)
  expected = codes_MIO.reshape(2, 3, 4, 5) * scales_MGO[:, :, None]
  np.testing.assert_array_equal(codes.codes() * codes.scales(), expected)
  np.testing.assert_array_equal(codes.weight(scales_MGO), expected)


@pytest.fixture(scope="module")
def int4(trained, tmp_path_factory):
  return made(trained, tmp_path_factory.mktemp("int4") / "run", 4, 16)


@pytest.mark.slow
def test_transformers_reads_the_codes(int4, tmp_path, capsys):
  export_model.run(
    export_model.ExportOptions(
      workdir=str(int4), to=str(tmp_path / "hf"), dtype="bfloat16", format="compressed-tensors"
    )
  )
  said = capsys.readouterr().out
  assert "codes of 14 modules" in said and "greedy continuations are equal" in said
  certificate = json.loads((tmp_path / "hf" / "parity.json").read_text())
  assert certificate["logits"]["max_abs"] < 1e-4 < certificate["logits"]["scale"]
  assert certificate["versions"]["compressed-tensors"]
  tensors = safetensors.scan(tmp_path / "hf")
  name = "model.layers.1.self_attn.o_proj"
  assert name + ".weight" not in tensors
  packed, scale = (tensors[f"{name}.weight_{x}"] for x in ("packed", "scale"))
  assert (packed.shape, str(packed.dtype)) == ((32, 4), "int32")
  assert (scale.shape, str(scale.dtype)) == ((32, 2), "bfloat16")
  # Half a byte for each weight of the layers, and as much for scales as for codes of 4 inputs.
  layers = sum(x.nbytes for name, x in tensors.items() if "_proj" in name and "shape" not in name)
  params = tree.flatten(load.load(int4).params)
  weights = sum(x.size for path, x in params.items() if path.startswith("layers/") and x.ndim > 2)
  assert layers == weights // 2 + weights // 16 * 2


def test_the_weights_are_equal_to_the_bit(int4, tmp_path):
  import_export.export_run(int4, tmp_path / "hf", certify=False, packed=True)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    str(tmp_path / "hf"),
    dtype=torch.float32,
    quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
  )
  ours = load.load(int4).params["layers"]["mlp"]["down"]
  for i, layer in enumerate(theirs.model.layers):
    np.testing.assert_array_equal(layer.mlp.down_proj.weight.detach().numpy().T, ours[i])


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads_of_other_bits(tiny, trained, tied, tmp_path):
  c = tiny(model__tie_embeddings=tied, train__steps=2)
  train(c, tmp_path / "run")
  folder = made(tmp_path / "run", tmp_path / "small", 4, 0, 8)
  *_, certificate, notes = import_export.export_run(folder, tmp_path / "hf", packed=True)
  assert certificate["checked"] and certificate["greedy"]["equal"], certificate
  assert certificate["logits"]["max_abs"] < 1e-5
  hf = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
  found = {tuple(x["targets"]): x["weights"] for x in hf["config_groups"].values()}
  assert found[("Linear",)]["num_bits"] == 4 and found[("Linear",)]["strategy"] == "channel"
  if tied:
    assert len(found) == 1 and "lm_head" in hf["ignore"]
  else:
    assert found[("lm_head",)]["num_bits"] == 8 and "lm_head" not in hf["ignore"]
  assert notes[1] == "dequantized, since they are no Linear: embed"


def test_an_export_without_codes_is_refused(trained, tmp_path):
  with pytest.raises(UserError, match=f"{trained} has no quantized weights"):
    import_export.export_run(trained, tmp_path / "hf", packed=True)
  with pytest.raises(UserError, match="--format=compressed-tensors has no effect with --adapter"):
    export_model.ExportOptions(workdir="a", to="b", adapter=True, format="compressed-tensors")
  assert not (tmp_path / "hf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 8])
def test_queries_keys_and_values_in_one_module(tiny, group, tmp_path):
  train(tiny(train__steps=2), tmp_path / "run")
  folder = made(tmp_path / "run", tmp_path / "small", 8, group)
  *_, certificate, _ = import_export.export_run(folder, tmp_path / "hf", packed=True, family="phi3")
  assert certificate["greedy"]["equal"] and certificate["logits"]["max_abs"] < 1e-5
  name = "model.layers.0.self_attn.qkv_proj.weight_scale"
  assert safetensors.scan(tmp_path / "hf")[name].shape == (64, 32 // group if group else 1)


@pytest.mark.slow
def test_a_family_without_linears_is_refused(tiny, tmp_path):
  c = tiny(
    model__position="learned",
    model__norm="layernorm",
    model__activation="gelu",
    model__gated=False,
    model__bias=True,
    model__num_kv_heads=4,
    train__steps=2,
  )
  train(c, tmp_path / "run")
  folder = made(tmp_path / "run", tmp_path / "small", 8)
  with pytest.raises(UserError, match="gpt2 stores none of the quantized matrices as a Linear"):
    import_export.export_run(folder, tmp_path / "hf", packed=True)
  assert not (tmp_path / "hf").exists()
