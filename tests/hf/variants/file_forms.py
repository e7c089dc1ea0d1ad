"""Forms of a model's files: shards, indices, dtypes, names, missing and surplus tensors."""

import json
import pathlib
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

from tests.hf.variants.compare import Tensors, Variant
from tests.hf.variants.small_models import T, V, of


def other_head(name: str) -> Callable[[Tensors], Tensors]:
  """Adds a head that is not the embedding."""

  def change(tensors: Tensors) -> Tensors:
    torch.manual_seed(1)
    return tensors | {name: torch.randn(V, 32)}

  return change


def same_head(name: str, embed: str) -> Callable[[Tensors], Tensors]:
  return lambda tensors: tensors | {name: tensors[embed].clone()}


def without(*parts: str) -> Callable[[Tensors], Tensors]:
  return lambda tensors: {k: v for k, v in tensors.items() if not any(p in k for p in parts)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
  return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def cast(dtype: torch.dtype, part: str = "") -> Callable[[Tensors], Tensors]:
  return lambda tensors: {k: v.to(dtype) if part in k else v for k, v in tensors.items()}


def plus(**tensors: torch.Tensor) -> Callable[[Tensors], Tensors]:
  return lambda there: there | {k.replace("__", "."): v for k, v in tensors.items()}


def sharded(folder: pathlib.Path, keep_single: bool = False, scale: float = 1.0) -> None:
  """Splits the tensors into two files with an index."""
  tensors = load_file(folder / "model.safetensors")
  where = {}
  for i in range(2):
    name = f"model-{i + 1:05}-of-00002.safetensors"
    part = {k: v * scale for j, (k, v) in enumerate(sorted(tensors.items())) if j % 2 == i}
    save_file(part, folder / name, {"format": "pt"})
    where |= dict.fromkeys(part, name)
  index = {"metadata": {}, "weight_map": where}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  if not keep_single:
    (folder / "model.safetensors").unlink()


def index_alone(folder: pathlib.Path) -> None:
  """An index whose files are gone, next to the single file."""
  where = {"lm_head.weight": "model-00001-of-00009.safetensors"}
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def index_of_single(folder: pathlib.Path) -> None:
  tensors = load_file(folder / "model.safetensors")
  index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: pathlib.Path) -> None:
  torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
  (folder / "model.safetensors").unlink()


def adapter(folder: pathlib.Path) -> None:
  (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))


def variant_file(folder: pathlib.Path) -> None:
  (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


L0 = "model.layers.0."


def file_forms() -> list[Variant]:
  return [
    of("llama", "sharded", files=sharded),
    of("llama", "stale-index", files=index_alone),
    of("llama", "stale-shards", files=lambda f: sharded(f, True, 2.0)),
    of("llama", "index-of-single", files=index_of_single),
    of("llama", "pickle", files=pickled),
    of("llama", "variant-file", files=variant_file),
    of("llama", "adapter", files=adapter),
    of("llama", "float64", tensors=cast(torch.float64)),
    of("llama", "mixed-dtypes", tensors=cast(torch.bfloat16, "mlp")),
    of("llama", "int8", tensors=cast(torch.int8)),
    of("llama", "int8-one", tensors=cast(torch.int8, L0 + "mlp.up")),
    of("llama", "int32-norm", tensors=cast(torch.int32, "norm")),
    of("llama", "uint8", tensors=cast(torch.uint8, "mlp")),
    of("llama", "bool", tensors=cast(torch.bool, "mlp")),
    of("llama", "fp8", tensors=cast(torch.float8_e4m3fn, "mlp")),
    of("llama", "fp8-e5m2", tensors=cast(torch.float8_e5m2, "proj")),
    of(
      "llama",
      "fp8-scales",
      tensors=lambda t: (
        cast(torch.float8_e4m3fn, "mlp")(t)
        | {L0 + "mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}
      ),
    ),
    of("llama", "bare-names", tensors=renamed("model.", "")),
    of("llama", "double-names", tensors=lambda t: t | {"norm.weight": t["model.norm.weight"] * 2}),
    of("llama", "missing", tensors=without(L0 + "mlp.up")),
    of("llama", "extra", tensors=plus(surprise=torch.ones(2))),
    of("llama", "extra-layer", {"num_hidden_layers": 1}),
    of(
      "llama", "extra-bias", tensors=plus(model__layers__0__self_attn__q_proj__bias=torch.ones(32))
    ),
    of(
      "llama",
      "buffers",
      tensors=plus(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    ),
    of("llama", "prefix", tensors=renamed("model.", "base_model.model.model.")),
    of("llama", "no-embed", tensors=without("embed_tokens"), tie_word_embeddings=False),
    of("llama", "tied-lost-embed", {"tie_word_embeddings": True}, tensors=without("embed_tokens")),
    of("llama", "untied-lost-head", {"tie_word_embeddings": False}, tensors=without("lm_head")),
    of("llama", "tied-other-head", {"tie_word_embeddings": True}),
    of("llama", "tied-other-head-bf16", {"tie_word_embeddings": True}, dtype=torch.bfloat16),
    of(
      "llama",
      "tied-same-head",
      tie_word_embeddings=True,
      tensors=same_head("lm_head.weight", "model.embed_tokens.weight"),
    ),
    of(
      "llama",
      "tied-larger-head",
      tie_word_embeddings=True,
      tensors=plus(lm_head__weight=torch.ones(V + 2, 32)),
    ),
    of("llama", "tied-head-sharded", {"tie_word_embeddings": True}, files=sharded),
    of("qwen2", "tied-other-head", {"tie_word_embeddings": True}),
    of("gemma", "tied-other-head", tensors=other_head("lm_head.weight")),
    of("gemma2", "tied-other-head", tensors=other_head("lm_head.weight")),
    of("gemma3", "tied-other-head", tensors=other_head("lm_head.weight")),
    of("gpt2", "tied-other-head", tensors=other_head("lm_head.weight")),
    of("bert", "tied-other-head", tensors=other_head("cls.predictions.decoder.weight")),
    of("roberta", "tied-other-head", tensors=other_head("lm_head.decoder.weight")),
    of("modernbert", "tied-other-head", tensors=other_head("decoder.weight")),
    of("gpt2", "bare-names", tensors=renamed("transformer.", "")),
    of("gpt2", "masks", tensors=plus(transformer__h__0__attn__bias=torch.ones(1, 1, T, T))),
    of(
      "bert",
      "gamma",
      tensors=lambda t: {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
          "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in t.items()
      },
    ),
    of("bert", "position-ids", tensors=plus(bert__embeddings__position_ids=torch.arange(T)[None])),
  ]
